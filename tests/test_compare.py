"""massl-ray compare: runs of any state side by side."""

import json
import shutil
from pathlib import Path

import pytest

from massl_ray import compare
from massl_ray.config import load, to_toml
from massl_ray.reporting.comparison import cautions, curve, distinct_names, figures, knn_curve, read_runs, settings_table
from tests.helpers import dead_lines, metrics_line, older_line
from tests.images import TINY
from tests.test_html import Page


def make_run(folder: Path, steps: int = 6, *flags: str, knn: bool = True, done: bool = True) -> Path:
    """Files of a run, invented."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(load([*TINY, "--run.dir", str(folder), "--train.steps", "6", *flags])))
    lines = [metrics_line(step) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, name, top1 in [(0, "pixels", 0.3), (0, "untrained", 0.4), (3, "step_3", 0.7), (6, "step_6", 0.6)] if knn else []:
        record = {"features": name, "step": step, "top1": top1, "k": 20, "temperature": 0.07, "bank_images": 9, "query_images": 3}
        record |= {"adapted": True} if name == "untrained" else {"top1_k1": top1 - 0.125}
        (folder / "eval" / f"knn_{name}.json").write_text(json.dumps(record))
    if done:
        (folder / "summary.json").write_text(json.dumps({"steps": steps, "wall_s": 61.0}))
    return folder


def evaluation(folder: Path, step: int | None, value: float) -> None:
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1}
    record = {"subject": "x", "from": {"step": step}, "data": {"name": "d"}, "protocols": {"knn": {"figures": {"top1": figure}}}}
    (folder / "eval" / f"evaluation_x{step}_d.json").write_text(json.dumps(record))


def test_a_run_that_ended_early_is_unfinished_whatever_its_summary(tmp_path):
    folder = make_run(tmp_path / "one", 3)
    assert figures(read_runs([folder])[0])["steps"] == "3"
    (folder / "summary.json").write_text(json.dumps({"status": "dead", "steps": 3, "wall_s": 61.0}))
    assert figures(read_runs([folder])[0])["steps"] == "3 (unfinished)"


def test_figures_settings_and_curves(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", 3, "--memory.size", "128", "--optim.lr", "0.1", done=False, knn=False)
    for step, value in ((6, 0.9), (3, 0.5), (None, 0.1)):
        evaluation(one, step, value)
    runs = read_runs([one, two])
    first, second = map(figures, runs)
    assert first["steps"] == "6" and second["steps"] == "3 (unfinished)"
    assert first["loss, last"] == "3.400" and second["loss, last"] == "3.700"
    assert (first["k-NN, last"], first["k-NN, best"], first["k-NN, raw pixels"]) == ("60.0%", "70.0% at step 3", "30.0%")
    assert first["k-NN, untrained"] == "40.0%, statistics adapted" and first["k-NN at k = 1, last"] == "47.5%"
    assert first["k-NN, last over untrained"] == "+20.0 points" and second["k-NN, last over untrained"] == "-"
    assert second["k-NN, last"] == second["wall time"] == "-" and first["wall time"] == "61 s"
    assert first["images/s, median"] == "103.5"
    assert settings_table(runs) == [["", "one", "two"], ["memory.size", "64", "128"], ["optim.lr", "0.0005", "0.1"]]
    assert runs[0].evaluations == {("d", "knn", "top1"): {"value": 0.9, "low": 0.8, "high": 1.0}}
    assert knn_curve(runs[0]) == ([0, 24, 48], pytest.approx([40, 70, 60])) and knn_curve(runs[1]) == ([], [])
    assert curve(runs[1], "loss") == ([8, 16, 24], pytest.approx([3.9, 3.8, 3.7]))
    assert curve(runs[0], "loss", most=2) == ([16, 40], pytest.approx([3.8, 3.5])) and curve(runs[0], "nothing") == ([], [])
    said = " ".join(cautions(runs))
    assert "different scales, because of memory.size" in said and "different numbers of images" in said and "one seed" in said
    assert not cautions(read_runs([one, one]))


def test_gains_of_old_runs_are_not_compared_in_silence(tmp_path):
    old = make_run(tmp_path / "old")
    path = old / "eval" / "knn_untrained.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "adapted"}))
    new = make_run(tmp_path / "new")
    assert any("statistics were not adapted" in sentence for sentence in cautions(read_runs([old, new])))
    assert figures(read_runs([old])[0])["k-NN, untrained"] == "40.0%"
    assert not cautions(read_runs([old, old])) and not cautions(read_runs([new, new]))


def test_page_and_console_and_json(tmp_path, capsys):
    runs = [make_run(tmp_path / "a" / "<b>run"), make_run(tmp_path / "c" / "<b>run", 2, "--run.seed", "1", done=False)]
    evaluation(runs[0], 6, 0.9)
    out = tmp_path / "new" / "page.html"
    assert compare.main([*map(str, runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "a/<b>run" in printed and "c/<b>run" in printed and "d knn top1" in printed and printed.endswith("page.html\n")
    assert "0.900 [0.800, 1.000]" in printed
    page = Page(out)
    assert "a/<b>run" in page.texts and [tag for tag, _ in page.tags].count("img") == 8
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in page.tags)
    assert compare.main([*map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["finished"] for run in found["runs"]] == [True, False] and found["runs"][1]["last"]["step"] == 2
    assert found["runs"][0]["evaluations"][0]["value"] == 0.9 and found["differing_settings"] == {}


def test_the_verdict_is_a_figure(tmp_path, capsys):
    """Of a run that has ended and of one on its way."""
    fine, dead = make_run(tmp_path / "fine"), make_run(tmp_path / "dead", 6, done=False)
    (dead / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dead_lines(20)))
    runs = read_runs([fine, dead, make_run(tmp_path / "bare", 0, knn=False, done=False)])
    assert [figures(run)["verdict"] for run in runs] == ["healthy", "dead", "-"]
    assert compare.main([str(fine), str(dead), "--json"]) == 0
    assert [run["verdict"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["healthy", "dead"]


def test_the_same_names_are_told_apart(tmp_path):
    paths = [tmp_path / name for name in ("x/run", "y/run", "y/run", "x/y/run", "z")]
    base = tmp_path.name
    assert distinct_names(paths) == ["x/run", f"{base}/y/run", f"{base}/y/run (2)", "x/y/run", "z"]
    assert distinct_names([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]


def test_missing_files_are_gaps_not_errors(tmp_path, capsys):
    bare = make_run(tmp_path / "bare", 0, knn=False, done=False)
    (bare / "metrics.jsonl").unlink()
    shutil.rmtree(bare / "eval")
    cut = make_run(tmp_path / "cut", 4)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "images_se')
    out = tmp_path / "page.html"
    assert compare.main([str(bare), str(cut), "--out", str(out)]) == 0
    assert "0 (unfinished)" in capsys.readouterr().out
    assert compare.main([str(bare), str(bare), "--out", str(out)]) == 0
    assert "No step is recorded yet." in Page(out).texts
    old = make_run(tmp_path / "old", 1)
    (old / "metrics.jsonl").write_text(json.dumps({"step": 1, "images_seen": 8, "loss": float("nan")}) + "\n")
    assert compare.main([str(old), str(cut), "--out", str(out)]) == 0


def test_a_run_of_an_older_version(tmp_path, capsys):
    new, old = make_run(tmp_path / "new"), make_run(tmp_path / "old")
    (old / "metrics.jsonl").write_text("".join(json.dumps(older_line(step)) + "\n" for step in range(1, 7)))
    first, second = map(figures, read_runs([new, old]))
    for name, value in (("alignment", "0.500"), ("uniformity", "-2.500"), ("use of the memory", "0.900")):
        assert (first[f"{name}, last"], second[f"{name}, last"]) == (value, "-")
    for runs, charts in (([new, old], 8), ([old, new], 8), ([old, old], 5)):
        assert compare.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
        assert [tag for tag, _ in Page(tmp_path / "page.html").tags].count("img") == charts
        assert ("uniformity, last" in capsys.readouterr().out) == (new in runs)


def test_what_is_no_run_is_a_sentence(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for runs, said in [
        ([tmp_path / "empty", run], "is no run directory: it has no config.toml"),
        ([run, tmp_path / "nowhere"], "is no run directory"),
        ([run], "is one run: give two or more"),
    ]:
        assert compare.main(list(map(str, runs))) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert compare.main([str(run), str(run), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    for name, text in [
        ("summary.json", "[1"),
        ("config.toml", "a = "),
        ("eval/knn_x.json", "[]"),
        ("eval/evaluation_x_y.json", "{}"),
    ]:
        broken = make_run(tmp_path / f"broken_{name.replace('/', '_')}")
        (broken / name).write_text(text)
        assert compare.main([str(run), str(broken)]) == 2
        assert capsys.readouterr().err.startswith("massl-ray: ")
