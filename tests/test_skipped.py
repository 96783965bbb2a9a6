"""skipped.jsonl: each unreadable image once, over all starts of a run."""

import json
from pathlib import Path

import pytest

from massl_ray.reporting.skipped import SkippedImages
from tests.helpers import no_file_over


def listed(run_dir: Path) -> list[str]:
    return [json.loads(line)["image"] for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def test_each_is_listed_once(tmp_path):
    skipped = SkippedImages(tmp_path)
    assert len(skipped) == 0 and skipped.add([]) == []
    assert not (tmp_path / "skipped.jsonl").exists()
    assert skipped.add(["b: cut", "a: empty", "b: cut"]) == ["a: empty", "b: cut"]
    assert skipped.add(["a: empty", "c: cut", "b: cut"]) == ["c: cut"]
    assert skipped.add(["c: cut"]) == []
    assert len(skipped) == 3 and listed(tmp_path) == ["a: empty", "b: cut", "c: cut"]
    assert skipped.path == tmp_path / "skipped.jsonl"


def test_a_disk_that_takes_no_more_for_a_while(tmp_path):
    skipped = SkippedImages(tmp_path)
    skipped.add(["a: empty"])
    with no_file_over(20), pytest.raises(OSError, match="File too large"):
        skipped.add(["b: cut"])
    assert skipped.add(["b: cut"]) == ["b: cut"] and listed(tmp_path) == ["a: empty", "b: cut"]


def test_an_earlier_start_counts(tmp_path):
    SkippedImages(tmp_path).add(["a: empty"])
    skipped = SkippedImages(tmp_path)
    assert len(skipped) == 1
    assert skipped.add(["a: empty", "b: cut"]) == ["b: cut"]
    assert listed(tmp_path) == ["a: empty", "b: cut"]


@pytest.mark.parametrize(
    "name", ["two\nlines.png: x", 'quo"ted\\.png: x', "猫.png: x", "line\u2028separator.png: x", "\udcff.png: x"]
)
def test_any_name_comes_back(tmp_path, name):
    SkippedImages(tmp_path).add([name])
    assert listed(tmp_path) == [name]
    assert SkippedImages(tmp_path).add([name]) == []


def test_a_line_cut_short_by_a_crash_is_no_obstacle(tmp_path):
    SkippedImages(tmp_path).add(["a: empty", "b: cut"])
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"image": "c: c')
    skipped = SkippedImages(tmp_path)
    assert len(skipped) == 2
    assert skipped.add(["c: cut", "a: empty"]) == ["c: cut"]
    again = SkippedImages(tmp_path)
    assert again.known == {"a: empty", "b: cut", "c: cut"} and again.add(["c: cut"]) == []
