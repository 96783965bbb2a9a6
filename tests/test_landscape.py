"""The map of embeddings."""

import numpy as np
import pytest
from PIL import Image

from massl_ray.evaluation.landscape import landscape
from massl_ray.reporting.plane import draw_map, drawable


def groups(number: int = 40, dims: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(number) % 3
    return (np.eye(3, dims)[labels] * 4 + random.normal(0, 0.3, (number, dims))).astype(np.float32), labels


def test_groups_stay_together_and_the_map_is_the_same_each_time():
    vectors, labels = groups(90)
    made = landscape(vectors)
    distances = np.linalg.norm(made.points[:, None] - made.points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.98
    assert made.kept is not None and made.kept > 0.5 and made.perplexity == pytest.approx(89 / 3)
    assert (landscape(vectors).points == made.points).all()


def test_no_global_generator_is_touched():
    before = np.random.get_state()[1].copy()
    landscape(groups(12)[0])
    assert (np.random.get_state()[1] == before).all()


def test_few_and_equal_images():
    with pytest.raises(ValueError, match="at least 5 images, and there are 4"):
        landscape(groups(4)[0])
    assert landscape(groups(5)[0]).points.shape == (5, 2) and landscape(groups(5)[0]).kept is None
    assert np.isfinite(landscape(np.ones((8, 3), np.float32)).points).all()


@pytest.mark.parametrize("number", [1, 3, 20, 21, 50])
def test_legend_has_at_most_20_classes(number, tmp_path, monkeypatch):
    import matplotlib.axes

    seen = []
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda self, **how: seen.extend(self.get_legend_handles_labels()[1]))
    labels = np.arange(200) % number
    draw_map(np.random.default_rng(0).normal(size=(200, 2)), labels, [f"_class {n}" for n in range(number)])
    assert len(seen) == min(number, 20)
    assert (f"{number - 19} other classes" in seen) == (number > 20)


def test_any_name_can_be_drawn_and_thumbnails_lie_where_points_do(tmp_path):
    names = ["$x_1^", "_hidden", "\u4e2d\u6587", "a\nb", "\ud800", "x" * 300]
    points = np.random.default_rng(0).normal(size=(60, 2))
    small = [np.full((8, 8, 3), 4 * index, np.uint8) for index in range(60)]
    png = draw_map(points, np.arange(60) % 6, names, small)
    (tmp_path / "map.png").write_bytes(png)
    assert Image.open(tmp_path / "map.png").size[0] > 500
    assert "\n" not in drawable("a\nb") and drawable("\u4e2d") == "\\u4e2d" and len(drawable("x" * 300)) == 28
    assert not drawable("_hidden").startswith("_")
    draw_map(np.zeros((1, 2)))
