"""massl-ray report: writes the report of a run directory, and says what is wrong where there is none."""

import json
import os

import pytest

from massl_ray import report
from massl_ray.reporting import html
from tests.helpers import make_images, metrics_line, tiny_run


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "chart", lambda *_: "data:image/svg+xml;base64,")  # drawing takes the time
    folder = tiny_run(make_images(tmp_path / "images", 8), tmp_path / "run").dir
    (folder / "metrics.jsonl").write_text(json.dumps(metrics_line(3)) + "\n")
    return folder


def test_writes_the_report_and_says_where(run_dir, capsys):
    assert report.main([str(run_dir)]) == 0
    assert capsys.readouterr() == (f"{run_dir}/report.html\n", "")
    assert "<b>24</b>images seen" in (run_dir / "report.html").read_text()


def test_a_relative_directory(run_dir, capsys, monkeypatch):
    monkeypatch.chdir(run_dir)
    assert report.main(["."]) == 0
    assert capsys.readouterr().out == f"{os.getcwd()}/report.html\n"
    assert "<title>run</title>" in (run_dir / "report.html").read_text()


def test_the_run_is_left_as_it_was(run_dir):
    def files():
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "report.html"}

    before = files()
    report.main([str(run_dir)])
    assert files() == before
    assert sorted(path.name for path in before) == ["config.toml", "images.json", "metrics.jsonl"]


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_no_run_directory(tmp_path, capsys, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert report.main([str(tmp_path / what)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"massl-ray: {tmp_path / what} is no run directory: it has no config.toml")
    assert not (tmp_path / what / "report.html").exists()


def test_without_a_directory(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2 and "usage: massl-ray report" in capsys.readouterr().err
