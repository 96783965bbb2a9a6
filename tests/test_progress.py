"""Progress of counted work: nothing is lost, and logs get lines."""

from massl_ray.reporting import progress as module
from massl_ray.reporting.progress import counted


def test_amounts_are_handed_on(capsys):
    assert list(counted(iter([3, 4, 5]), 12)) == [3, 4, 5]
    assert capsys.readouterr().out == ""


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    list(counted(iter([1000, 1000, 1000, 1000]), 4000))
    assert capsys.readouterr().err.splitlines() == ["2,000 of 4,000 images", "4,000 of 4,000 images"]
