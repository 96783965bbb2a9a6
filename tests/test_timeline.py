"""The picture of a resize shows what was measured."""

import numpy as np

from massl_ray.benches.timeline import draw

SIDE = {"steps": [[0.0, 1], [1.0, 2], [4.0, 3]], "sizes": [[0.0, 1], [3.5, 2]], "happenings": [[1.5, "add"], [3.8, "kill"]]}


def test_both_sides_on_one_axis_of_time():
    later = SIDE | {"steps": [[0.0, 1], [9.0, 2]]}
    ours, stock = draw({"ours": SIDE, "stock": later}).axes
    assert ours.get_xlim() == stock.get_xlim() == (0, 9)
    np.testing.assert_array_equal(ours.lines[0].get_xydata(), SIDE["steps"])
    np.testing.assert_array_equal(stock.lines[0].get_xydata(), later["steps"])
    assert [line.get_xdata()[0] for line in ours.lines[1:]] == [1.5, 3.8]
    assert [text.get_text().strip() for text in ours.texts] == ["a machine joins", "a machine vanishes"]
    shaded = [patch.get_extents().transformed(ours.transData.inverted()).x0 for patch in ours.patches]
    np.testing.assert_allclose(shaded, [0.0, 3.5], atol=1e-6)
