"""`bench learn`: does training learn more than its peers do, of the same images, with the same backbone and the same views?

First each method's learning rate is chosen: on the demo alone, by images held out of its training images. Then come the cells, one
for each set, method, seed and number of steps, cheap ones first. Each is a file as soon as it is done, so the command may be
killed and called again, and does only what is missing.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from massl_ray.benches.labelled_sets import NAMES, LabelledSet, every_nth, open_sets
from massl_ray.benches.learn_cell import METHODS, TRAINED, Cell, Recipe, compute, decides, digest
from massl_ray.benches.learn_table import compared, draw, table, text
from massl_ray.benches.measure import machine
from massl_ray.benches.peers import PEERS, check_library
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.training.run import write_atomically, write_json

FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the preset's learning rate
CHOOSE_STEPS, HELD = 200, 5  # the rate is chosen by every fifth training image of the demo
STAGES = ("choose", "cells", "table")
FIELDS = ("set", "method", "seed", "steps", "lr_factor", "knn", "knn1", "linear", "lowshot", "gain", "rank", "kl", "spread")

written = text  # how people read the result


@dataclass(frozen=True)
class Work:
    """A cell to compute, and the file that it becomes."""

    cell: Cell
    images: LabelledSet
    path: Path
    settings: dict[str, Any]
    quick: bool

    def result(self) -> dict[str, Any] | None:
        """What the file says, None where there is none. The factor is of the rate as the preset has it now."""
        try:
            return json.loads(self.path.read_text()) | {"lr_factor": self.cell.lr_factor}
        except FileNotFoundError:
            return None


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sets", help=f"of {', '.join(NAMES)}, and NAME=TRAIN_DIR or NAME=TRAIN_DIR:TEST_DIR of yours [demo to photos]"
    )
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)} [all]")
    parser.add_argument("--seeds", help="[0,1,2]")
    parser.add_argument("--steps", help="numbers of training steps [200,2000]")
    parser.add_argument("--out", help="folder of the cells, learn.json and learn.png [runs/learn]")
    parser.add_argument("--jobs", type=int, help="processes of one thread each [1]")
    parser.add_argument(
        "--only", choices=STAGES, help="choose the learning rates, compute the cells, or put together what there is"
    )
    parser.add_argument("--limit-s", type=float, help="start no cell after so many seconds")
    parser.add_argument("--preset", help="settings of all methods [demo]")
    parser.add_argument("--ours", help="further flags of ours alone, as '--loss.koleo_weight 1'")


def run(
    device: torch.device,
    sets: str = ",".join(NAMES),
    methods: str = ",".join(METHODS),
    seeds: str = "0,1,2",
    steps: str = "200,2000",
    out: str = "runs/learn",
    jobs: int = 1,
    only: str | None = None,
    limit_s: float = math.inf,
    preset: str = "demo",
    ours: str = "",
) -> dict[str, Any]:
    """The cells there are when the time is up, the rates, and what they come to. It runs on the CPU, whatever the device."""
    deadline = time.time() + limit_s
    recipe, asked = Recipe(preset, tuple(shlex.split(ours))), _methods(methods)
    numbers = {"--seeds": _numbers(seeds, "--seeds", 0), "--steps": _numbers(steps, "--steps", 1)}
    folder = _writable(Path(out))
    choosing = choice_works(recipe, [method for method in TRAINED if method in asked], folder / "choose")
    if only in (None, "choose"):
        finish(choosing, recipe, jobs, deadline)
    rates = chosen(choosing)
    lacking = [method for method in TRAINED if method in asked and method not in rates]
    if only == "cells" and lacking:
        raise UserError(
            f"--only cells: no learning rate of {', '.join(lacking)} is chosen yet in {folder}; call --only choose first."
        )

    found, skipped = open_sets(sets) if only != "choose" else ([], [])
    factors = {method: rate["lr_factor"] for method, rate in rates.items()}
    cells = plan(found, asked, numbers["--seeds"], numbers["--steps"], factors)
    works = [work_of(cell, recipe, images, folder / "cells") for cell, images in cells]
    if only in (None, "cells"):
        finish(works, recipe, jobs, deadline)
    done = with_gains([cell for work in works if (cell := work.result())])
    missing = sum(not work.path.exists() for work in (*works, *choosing))
    missing += len(found) * len(lacking) * len(numbers["--seeds"]) * len(numbers["--steps"])
    result = {"name": "learn", "work": _work(recipe), **machine(torch.device("cpu")), "threads": 1, "preset": preset, "ours": ours}
    result |= {"ratio": None, "rates": rates, "missing": missing, "skipped": skipped}
    result |= {"table": table(done), "compared": compared(done), "cells": done}
    result["ratio"] = result["compared"][-1]["knn_ratio"] if result["compared"] else None
    if only != "choose":
        write_json(folder / "learn.json", result)
        write_atomically(folder / "learn.png", draw(result["table"]))
    return result


def choice_works(recipe: Recipe, methods: Sequence[str], folder: Path) -> list[Work]:
    """A short training at each rate. Test images are not even listed."""
    images = open_source("demo")
    assert images.labels is not None
    held = every_nth(images.labels, HELD)
    sides = LabelledSet("demo", images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held)))
    cells = [Cell("demo", method, 0, CHOOSE_STEPS, factor) for method in methods for factor in FACTORS]
    return [work_of(cell, recipe, sides, folder, quick=True) for cell in cells]


def chosen(works: Sequence[Work]) -> dict[str, dict[str, Any]]:
    """The rate of each method whose every try is there: the one of the best k-NN, of equals the lowest."""
    tries: dict[str, list[dict[str, Any] | None]] = {}
    for work in works:
        tries.setdefault(work.cell.method, []).append(work.result())
    rates = {}
    for method, found in tries.items():
        results = [result for result in found if result]
        if len(results) == len(found):
            best = max(results, key=lambda result: -1.0 if result["knn"] is None else result["knn"])
            held_out = {f"{result['lr_factor']:g}": result["knn"] for result in results}
            rates[method] = {"lr_factor": best["lr_factor"], "lr": best["lr"], "knn_held_out": held_out}
    return rates


def plan(
    sets: Sequence[LabelledSet], methods: Sequence[str], seeds: Sequence[int], steps: Sequence[int], factors: dict[str, float]
) -> list[tuple[Cell, LabelledSet]]:
    """The cells in the order in which they are computed, cheap ones first; those of methods without a rate are left out."""
    cells: list[tuple[Cell, LabelledSet]] = []
    if "pixels" in methods:
        cells += [(Cell(images.name, "pixels", 0, 0), images) for images in sets]
    if "untrained" in methods:
        cells += [(Cell(images.name, "untrained", seed, 0), images) for seed in seeds for images in sets]
    return cells + [
        (Cell(images.name, method, seed, number, factors[method]), images)
        for number in sorted(steps)
        for seed in seeds
        for images in sets
        for method in TRAINED
        if method in methods and method in factors
    ]


def work_of(cell: Cell, recipe: Recipe, images: LabelledSet, folder: Path, quick: bool = False) -> Work:
    settings = decides(cell, recipe, images)
    name = f"{cell.set}-{cell.method}-{cell.seed}-{cell.steps}-{digest(settings)}.json"
    return Work(cell, images, folder / name, settings, quick)


def finish(works: Sequence[Work], recipe: Recipe, jobs: int, deadline: float) -> None:
    """Compute what is missing, and start nothing after the deadline (seconds since the epoch)."""
    missing = [work for work in works if not work.path.exists()]
    if any(work.cell.method in PEERS for work in missing):
        check_library()
    if jobs <= 1:
        for work in missing:
            _do(work, recipe, deadline)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        for future in [pool.submit(_do, work, recipe, deadline) for work in missing]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _do(work: Work, recipe: Recipe, deadline: float) -> None:
    if time.time() > deadline:
        return
    found = compute(work.cell, recipe, work.images, work.quick)
    work.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(work.path, found | {"settings": work.settings})
    knn = "the features are no numbers" if found["knn"] is None else f"k-NN {found['knn']:.1%}"
    print(f"{work.cell}: {knn}, in {found['wall_s']:.0f} s", file=sys.stderr, flush=True)


def with_gains(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells with the fields that others rely on first, `gain` among them: k-NN over the untrained net of that set and seed."""
    untrained = {(cell["set"], cell["seed"]): cell["knn"] for cell in cells if cell["method"] == "untrained"}
    lines = []
    for cell in cells:
        before = untrained.get((cell["set"], cell["seed"]))
        known = None in (before, cell["knn"]) or cell["method"] == "pixels"
        full = cell | {"gain": None if known else cell["knn"] - before}
        lines.append({name: full[name] for name in FIELDS} | {name: full[name] for name in full if name != "settings"})
    return lines


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}. Choose another.") from None
    return folder


def _methods(asked: str) -> list[str]:
    given = [name for name in asked.split(",") if name]
    unknown = [name for name in given if name not in METHODS]
    if unknown or not given:
        raise UserError(f"--methods: there is no '{''.join(unknown[:1])}'; there are {', '.join(METHODS)}.")
    return given


def _numbers(text: str, flag: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{flag}: give whole numbers of at least {least} with commas between them, not '{text}'.")
    return [int(part) for part in parts]


def _work(recipe: Recipe) -> str:
    config = recipe.config(Cell("", "pixels", 0, 0))
    views = config.views
    return (
        f"{config.model.backbone}, 2 x {views.global_size} + {views.num_local} x {views.local_size} px, "
        f"{config.train.global_batch_size} images a step; CPU, one thread"
    )
