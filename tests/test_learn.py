"""The judge judged: same cell, same figures; nothing computed twice; no look at test images while choosing; figures by hand."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray.bench import main
from massl_ray.benches import learn
from massl_ray.benches.labelled_sets import open_sets
from massl_ray.benches.learn import FACTORS, choice_works, chosen, plan, with_gains
from massl_ray.benches.learn_cell import (
    METHODS,
    TRAINED,
    Cell,
    Recipe,
    adapt_statistics,
    behaviour,
    compute,
    decides,
    digest,
    run_of,
    scores,
    untrained,
)
from massl_ray.evaluation.features import Features, pixel_features
from massl_ray.evaluation.knn import knn_accuracy
from massl_ray.method.network import build_encoder
from tests.images import write_images

STEPS = 3
TIMES = ("seconds_per_step", "wall_s")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache whose demo has few images, with noise so that no method gets all of them right."""
    folder = tmp_path / "cache/demo-tiles-1"
    random = np.random.default_rng(0)
    for part, number in (("train", 60), ("test", 30)):
        for path in sorted(write_images(folder / part, number, 24).rglob("*.png")):
            pixels = np.asarray(Image.open(path)).astype(float) * 0.2 + random.normal(100, 40, (24, 24, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(learn, "CHOOSE_STEPS", STEPS)
    return tmp_path


@pytest.fixture
def images(place):
    return open_sets("demo")[0][0]


def figures(result):
    return {name: value for name, value in result.items() if name not in TIMES}


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_computed_twice_gives_the_same_bits(method, images):
    cell = Cell("demo", method, 1, 0 if method in METHODS[:2] else STEPS, 2.0)
    torch.manual_seed(0)
    first = compute(cell, Recipe(), images)
    torch.manual_seed(1)
    torch.rand(3)
    assert figures(compute(cell, Recipe(), images)) == figures(first)
    assert 0.2 < first["knn"] < 1 and 0.2 < first["linear"] <= 1 and 0.2 < first["lowshot"] <= 1
    if method != "pixels":
        assert 1 < first["rank"] < 30 and 0 < first["spread"] <= 1
    if method in TRAINED:
        assert first["lr"] == 2 * Recipe().config(Cell("", "simclr", 0, 1)).optim.lr
    assert (first["kl"] is not None) == (method == "ours")


@pytest.mark.parametrize("method", TRAINED)
def test_training_moves_what_is_judged(method, images):
    """Other rates, seeds and numbers of steps give other embeddings."""
    cell = Cell("demo", method, 0, STEPS)
    others = [cell, replace(cell, seed=1), replace(cell, steps=STEPS + 1), replace(cell, lr_factor=4.0)]
    found = [compute(each, Recipe(), images, quick=True) for each in others]
    assert len({each["rank"] for each in found}) == len(others)
    assert found[0]["linear"] is None


def test_pixels_equal_a_direct_call(images):
    found = compute(Cell("demo", "pixels", 0, 0), Recipe(), images)
    data = Recipe().config(Cell("demo", "pixels", 0, 0)).data
    bank, queries = pixel_features(images.train, data), pixel_features(images.test, data)
    for name, k in (("knn", 20), ("knn1", 1)):
        assert found[name] == pytest.approx(
            knn_accuracy(bank.rows, bank.labels, queries.rows, queries.labels, k=k, temperature=0.07)
        )


def test_mean_per_class_by_hand():
    """Three images of one class are right, one of another is not: three quarters of the images, half of the classes."""
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    bank = Features(torch.cat([one, other]), torch.arange(2), torch.tensor([0, 2]))
    queries = Features(torch.cat([one, one, one, one * 2]), torch.arange(4), torch.tensor([0, 0, 0, 2]))
    assert scores(bank, queries, ("a", "b", "c")) == {"knn": 0.75, "knn1": 0.75, "knn_per_class": 0.5}
    broken = replace(queries, rows=queries.rows / 0)
    assert scores(bank, broken, ("a", "b", "c")) == {"knn": None, "knn1": None, "knn_per_class": None}


def test_statistics_are_means_over_batches():
    layer = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5))
    batches = [torch.tensor([[0.0, 2.0], [2.0, 2.0]]), torch.tensor([[4.0, 0.0], [8.0, 2.0]])]
    adapted = adapt_statistics(layer, batches)
    assert adapted[0].running_mean.tolist() == [3.5, 1.5] and adapted[0].running_var.tolist() == [5.0, 1.0]
    assert layer[0].running_mean.tolist() == [0.0, 0.0] and not adapted.training and not adapted[0].training
    assert adapted[0].momentum == layer[0].momentum


def test_the_untrained_net_keeps_its_weights_and_gets_statistics(images):
    run = run_of(Recipe().config(Cell("demo", "untrained", 3, 0)), images)
    fresh, adapted = build_encoder(run.config).backbone, untrained(run).backbone
    buffers = dict(adapted.named_buffers())
    assert all(torch.equal(value, dict(adapted.named_parameters())[name]) for name, value in fresh.named_parameters())
    assert any(not torch.equal(value, buffers[name]) for name, value in fresh.named_buffers() if name.endswith("running_var"))


def test_what_leaves_a_cell_valid(images):
    """Peers' cells survive a change of ours; ours, and its code, do not; other images leave none."""
    changed = Recipe(ours=("--loss.koleo_weight", "0.37"))

    def key(method, recipe=Recipe(), sides=images):  # noqa: B008, it is frozen
        return digest(decides(Cell("demo", method, 0, STEPS), recipe, sides))

    for method in METHODS:
        assert (key(method) == key(method, changed)) == (method != "ours")
        assert key(method) != key(method, sides=replace(images, test=images.test.take(np.arange(20))))
    other = Recipe(preset="vit_small")
    assert key("pixels") == key("pixels", other) and key("simclr") != key("simclr", other)
    optim = decides(Cell("demo", "simclr", 0, STEPS), Recipe(), images)["optim"]
    assert "teacher_momentum" not in optim
    assert "teacher_momentum" in decides(Cell("demo", "dino", 0, STEPS), Recipe(), images)["optim"]


def test_a_changed_step_is_noticed(monkeypatch):
    from massl_ray.method import step

    before = behaviour(Recipe())
    whole = step.update_teacher
    monkeypatch.setattr(step, "update_teacher", lambda teacher, student, momentum: whole(teacher, student, momentum / 2))
    behaviour.cache_clear()
    after = behaviour(Recipe())
    behaviour.cache_clear()
    assert len(before) == 4 and all(math.isfinite(float(loss)) for loss in before) and before != after


def bench(place, *flags):
    return main(["learn", "--json", "--sets", "demo", "--out", str(place / "out"), "--steps", str(STEPS), *flags])


def test_the_choice_looks_at_no_test_image(place, capsys):
    """Every file of the test side is spoiled and its folder taken away: the same rates are chosen."""
    assert bench(place, "--only", "choose", "--methods", "ours,dino") == 0
    first = json.loads(capsys.readouterr().out)["rates"]
    for path in (place / "cache/demo-tiles-1/test").rglob("*.png"):
        path.write_bytes(b"spoiled")
    (place / "cache/demo-tiles-1/test").rename(place / "gone")
    (place / "out").rename(place / "before")
    assert bench(place, "--only", "choose", "--methods", "ours,dino") == 0
    assert json.loads(capsys.readouterr().out)["rates"] == first
    assert set(first) == {"ours", "dino"} and set(first["ours"]["knn_held_out"]) == {"0.5", "1", "2", "4"}


def test_held_out_images_are_not_learned_from(place):
    work = choice_works(Recipe(), ["simclr"], place)[0]
    names = [{side.name(number) for number in range(len(side))} for side in (work.images.train, work.images.test)]
    assert not names[0] & names[1] and len(names[0]) == 48 and len(names[1]) == 12
    assert np.bincount(work.images.test.labels).tolist() == [4, 4, 4]


def test_the_best_rate_is_chosen_and_of_equals_the_lowest(place):
    works = choice_works(Recipe(), ["simclr", "dino"], place / "choose")
    (place / "choose").mkdir()
    for work, knn in zip(works, [0.5, 0.6, 0.6, None, 0.1, 0.2, 0.3], strict=False):
        work.path.write_text(json.dumps({"lr_factor": 9, "lr": 1e-3 * work.cell.lr_factor, "knn": knn}))
    rates = chosen(works)  # of dino one is not there yet
    assert rates == {"simclr": {"lr_factor": 1.0, "lr": 1e-3, "knn_held_out": {"0.5": 0.5, "1": 0.6, "2": 0.6, "4": None}}}


def test_a_killed_run_goes_on_where_it_was(place, capsys, monkeypatch):
    """Killed after its first cells. What it had done is read, not computed again; the rest is what one run gives."""
    computed = []

    def noting(cell, recipe, images, quick):
        computed.append((cell, quick))
        return compute(cell, recipe, images, quick)

    def counting(cell, *others):
        if len(computed) == 7:
            raise KeyboardInterrupt
        return noting(cell, *others)

    flags = ("--methods", "untrained,simclr", "--seeds", "0,1")
    monkeypatch.setattr(learn, "compute", counting)
    with pytest.raises(KeyboardInterrupt):
        bench(place, *flags)
    capsys.readouterr()
    monkeypatch.setattr(learn, "compute", noting)
    assert bench(place, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(computed) == len(set(computed)) == len(FACTORS) + 4 and result["missing"] == 0
    assert [(cell["method"], cell["seed"]) for cell in result["cells"]] == [
        ("untrained", 0),
        ("untrained", 1),
        ("simclr", 0),
        ("simclr", 1),
    ]
    assert bench(place, *flags) == 0
    assert json.loads(capsys.readouterr().out) == result and len(computed) == len(FACTORS) + 4


def test_the_command_and_its_files(place, capsys):
    """All methods, two processes; then nothing but the table, from files, as people read it."""
    assert bench(place, "--limit-s", "-1") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == len(FACTORS) * len(TRAINED) + 1 + 3 + 3 * len(TRAINED)
    assert bench(place, "--only", "cells") == 2
    assert "call --only choose first" in capsys.readouterr().err
    learned = ("--methods", "pixels,untrained,ours,simclr", "--seeds", "0")
    assert bench(place, *learned) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((place / "out/learn.json").read_text())
    untrained_knn = next(cell["knn"] for cell in result["cells"] if cell["method"] == "untrained")
    ours, simclr = (next(cell for cell in result["cells"] if cell["method"] == name) for name in ("ours", "simclr"))
    assert ours["gain"] == ours["knn"] - untrained_knn and ours["lr_factor"] == result["rates"]["ours"]["lr_factor"]
    assert result["ratio"] == ours["knn"] / simclr["knn"]
    fields = "set method seed steps lr_factor knn knn1 linear lowshot gain rank kl spread seconds_per_step".split()
    assert all(set(fields) <= set(cell) for cell in result["cells"])
    assert Image.open(place / "out/learn.png").width > 400
    assert main(["learn", "--sets", "demo", "--out", str(place / "out"), "--steps", str(STEPS), *learned, "--only", "table"]) == 0
    shown = capsys.readouterr().out
    assert f"{100 * ours['knn']:.1f}" in shown and "ours minus the best peer" in shown


@pytest.mark.slow
def test_processes_give_what_one_gives(place, capsys):
    flags = ("--methods", "untrained,vicreg", "--seeds", "0,1")
    assert bench(place, *flags, "--only", "choose") == 0
    capsys.readouterr()
    found = []
    for jobs in ("1", "2"):
        assert bench(place, *flags, "--jobs", jobs) == 0
        found.append([figures(cell) for cell in json.loads(capsys.readouterr().out)["cells"]])
        (place / "out/cells").rename(place / f"cells{jobs}")
    assert found[0] == found[1] and len(found[0]) == 4


def test_cheap_cells_first(images):
    order = plan([images, replace(images, name="b")], ["ours", "untrained", "pixels"], [0, 1], [20, 2], {"ours": 2.0})
    cells = [(cell.set, cell.method, cell.seed, cell.steps) for cell, _ in order]
    assert cells[:6] == [
        *(("demo", "pixels", 0, 0), ("b", "pixels", 0, 0)),
        *((name, "untrained", seed, 0) for seed in (0, 1) for name in ("demo", "b")),
    ]
    assert cells[6:] == [(name, "ours", seed, steps) for steps in (2, 20) for seed in (0, 1) for name in ("demo", "b")]
    assert all(cell.lr_factor == 2.0 for cell, _ in order[6:])


def test_gain_is_over_the_untrained_net_of_that_seed():
    cells = [dict.fromkeys(learn.FIELDS) | {"set": "a", "seed": seed, "method": "untrained", "knn": 0.5 + seed} for seed in (0, 1)]
    cells.append(cells[0] | {"method": "ours", "seed": 1, "knn": 1.75})
    cells.append(cells[2] | {"set": "b"})
    assert [cell["gain"] for cell in with_gains(cells)] == [0.0, 0.0, 0.25, None]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "ours,mocho"], "no 'mocho'"),
        (["--seeds", "0,x"], "--seeds: give whole numbers"),
        (["--steps", "0"], "at least 1"),
        (["--sets", "moon"], "no set 'moon'"),
        (["--out", "/dev/null/out"], "--out /dev/null/out cannot be made"),
        (["--ours", "--loss.koleo 1"], "loss.koleo"),
    ],
)
def test_mistakes_end_with_a_sentence(flags, words, place, capsys):
    given = ["--methods", "pixels", "--out", str(place / "out"), *flags]
    if "--ours" in flags:
        given[1] = "ours"
    assert main(["learn", "--json", *given]) == 2
    assert words in capsys.readouterr().err


def test_lightly_is_asked_for_late_and_named_where_it_is_missing(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    assert bench(place, "--methods", "pixels") == 0
    assert bench(place, "--methods", "simclr") == 2
    assert "pip install 'massl-ray[dev]'" in capsys.readouterr().err


def test_neither_ray_nor_lightly_is_imported_with_it():
    code = "import sys, massl_ray.benches.learn; print('ray' in sys.modules, 'lightly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"] * 2
