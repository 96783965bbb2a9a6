"""One cell of `bench learn`: a method learns from one set of images, and what its features are worth is measured.

The method, the set, the seed and the number of steps decide every figure but the seconds, bit for bit: on one thread, with keyed
views, and without anything random of the process.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import normalize

from massl_ray.benches.kept_views import made_batches, view_batches
from massl_ray.benches.labelled_sets import LabelledSet
from massl_ray.benches.peers import PEERS, Learned, train_peer
from massl_ray.config import Config, fill, keys, load, resolve
from massl_ray.errors import UserError
from massl_ray.evaluation.adapted import adapt_statistics
from massl_ray.evaluation.features import Features, backbone_features, pixel_features
from massl_ray.evaluation.knn import knn_predict
from massl_ray.evaluation.linear import linear
from massl_ray.evaluation.lowshot import lowshot
from massl_ray.evaluation.results import Split
from massl_ray.keyed import Stream, generator
from massl_ray.method.collapse import embedding_spread
from massl_ray.method.network import build_encoder
from massl_ray.method.schedules import schedule_at
from massl_ray.method.step import METRICS, MicroBatch, prepare_views, train_step
from massl_ray.training.collectives import Local
from massl_ray.training.loop import Views, assemble
from massl_ray.training.run import FREE_TO_CHANGE, Run
from massl_ray.training.state import build_state, step_settings
from massl_ray.training.verdict import Facts, judge

VERSION = 1  # of how peers learn and how all are measured; a new one leaves no old cell valid
METHODS = ("pixels", "untrained", "ours", *PEERS)
TRAINED = METHODS[2:]
CPU = torch.device("cpu")
ADAPTED_TO = 40  # batches of training views that the untrained net's running statistics are taken from
NEIGHBOURS, TEMPERATURE = 20, 0.07
PIXELS_CLASSIFIED = 16  # the side to which pixels are shrunk for the classifiers, which 32 x 32 would take minutes
RATES = (0.01, 0.046, 0.22, 1.0)  # of the linear probe's heads: of all that the protocol tries, every second one that is ever best
STRENGTHS, DRAWS, SHARE = (0.01, 0.1, 1.0), 3, 0.1  # of low-shot: a tenth of the labels
LAST = 10  # steps over which what training says at its end is averaged
SETTINGS: dict[str, tuple[str, ...]] = {
    "data": ("mean", "std"),
    "views": (),
    "model": ("backbone", "init", "drop_path"),
    "head": ("hidden_dim", "dim"),
    "train": ("global_batch_size", "precision"),
    "eval": ("crop",),
    "optim": ("lr", "lr_final", "warmup_epochs", "weight_decay", "weight_decay_final", "clip_norm"),
}
"""What peers and the untrained net look at, by section; all of a section that names nothing."""
TEACHERS = ("teacher_momentum", "teacher_momentum_final")
FIGURES = ("knn", "knn1", "linear", "lowshot", "knn_per_class", "rank", "spread", "kl", "ln_s", "seconds_per_step", "verdict")


@dataclass(frozen=True)
class Cell:
    """What is measured. Of pixels and the untrained net there are 0 steps; pixels know no seed but 0."""

    set: str
    method: str
    seed: int
    steps: int
    lr_factor: float = 1.0  # on the preset's learning rate

    def __str__(self) -> str:
        return f"{self.set} {self.method} seed {self.seed}, {self.steps} steps, {self.lr_factor:g} times the rate"


@dataclass(frozen=True)
class Recipe:
    """The settings of all methods, and the flags that only ours is given."""

    preset: str = "demo"
    ours: tuple[str, ...] = ()

    def config(self, cell: Cell) -> Config:
        flags = ["--preset", self.preset, *(self.ours if cell.method == "ours" else ())]
        config = load([*flags, "--run.seed", str(cell.seed), "--train.steps", str(max(1, cell.steps))])
        optim = config.optim.model_copy(update={"lr": config.optim.lr * cell.lr_factor})
        return config.model_copy(update={"optim": optim})


def compute(cell: Cell, recipe: Recipe, images: LabelledSet, quick: bool = False) -> dict[str, Any]:
    """The figures of a cell by name, None where there is none; `quick`: k-NN alone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    started = time.perf_counter()
    config, classes = recipe.config(cell), images.train.classes
    with threadpool_limits(1):
        if cell.method == "pixels":
            bank, queries = (pixel_features(listing, config.data) for listing in (images.train, images.test))
            found = scores(bank, queries, classes)
            bank, queries = (pixel_features(each, config.data, PIXELS_CLASSIFIED) for each in (images.train, images.test))
            found |= classified(bank, queries, classes)
        else:
            learned = learn(cell, run_of(config, images), images)
            bank, queries = (backbone_features(learned.backbone, each, config, CPU) for each in (images.train, images.test))
            found = scores(bank, queries, classes) | _spread(learned.head, queries)
            found |= {"seconds_per_step": learned.seconds_per_step, **learned.measured}
            if not quick and found["knn"] is not None:
                found |= classified(bank, queries, classes)
    whole = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()}
    return asdict(cell) | {"lr": config.optim.lr} | dict.fromkeys(FIGURES) | whole | {"wall_s": time.perf_counter() - started}


def decides(cell: Cell, recipe: Recipe, images: LabelledSet) -> dict[str, Any]:
    """All that a cell's figures depend on. Of the settings, those that its method looks at: peers stay as they are when ours
    changes."""
    config = recipe.config(cell)
    settings: dict[str, Any] = {"version": VERSION, "images": images.content, "channels": config.data.channels}
    if cell.method == "pixels":
        return settings
    wanted = {name: SETTINGS[name] for name in ("data", "views", "model", "head", "train", "eval")}
    if cell.method != "untrained":
        wanted["optim"] = SETTINGS["optim"]
    if cell.method in PEERS and PEERS[cell.method].teacher:
        wanted["optim"] += TEACHERS
    for name, fields in wanted.items():
        values = getattr(config, name).model_dump(mode="json")
        settings[name] = {field: values[field] for field in fields or values}
    if cell.method == "ours":
        settings["all"] = {key: value for key, value in keys(config).items() if not key.startswith((*FREE_TO_CHANGE, "data."))}
        settings["behaviour"] = behaviour(recipe)
    return settings


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@cache
def behaviour(recipe: Recipe) -> list[str]:
    """Losses of the first steps of ours on noise, to four digits: they tell when the method's code has changed, which no setting
    shows, and stay when it was only written anew."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = recipe.config(Cell("noise", "ours", 0, 8))
    resolved = resolve(config, 8 * config.train.global_batch_size)
    nothing: Any = None  # a run of no images
    run = Run(fill(config, resolved), resolved, nothing, None, None)
    learned = train_ours(run, (_noise(config, step) for step in range(4)))
    torch.set_num_threads(threads)
    return [f"{loss:.3e}" for loss in learned.measured["losses"]]


def run_of(config: Config, images: LabelledSet) -> Run:
    """A run without a directory."""
    resolved = resolve(config, len(images.train))
    return Run(fill(config, resolved), resolved, images.train, images.train, images.test)


def learn(cell: Cell, run: Run, images: LabelledSet) -> Learned:
    if cell.method == "untrained":
        return untrained(run)
    batches = view_batches(run, images.content, cell.steps)
    if cell.method == "ours":
        learned = train_ours(run, batches)
        return Learned(learned.backbone, learned.head, learned.seconds_per_step, _last_words(learned, run))
    return train_peer(cell.method, run, batches)


def train_ours(run: Run, batches: Iterable[Views]) -> Learned:
    """The product's own step and state, with its loop's parts, by one worker without Ray. What is exported is the teacher's."""
    config, resolved = run.config, run.resolved
    settings, state = step_settings(config, resolved, CPU), build_state(config, resolved, CPU, Local())
    seconds, rows = [], []
    for views in batches:
        started = time.process_time()  # of one thread, whoever else wants the machine
        batch = assemble(run, state, views, Local())
        rows.append(train_step(state, batch, schedule_at(state.step, config, resolved), settings, Local()))
        seconds.append(time.process_time() - started)
    lines = [dict(zip(METRICS, row.tolist(), strict=True)) for row in rows]
    said = {"lines": lines, "losses": [line["loss"] for line in lines]}
    return Learned(state.teacher.backbone, state.teacher.head, statistics.median(seconds), said)


def untrained(run: Run) -> Learned:
    """The net that training begins with, as it sees images once its running statistics fit them."""
    encoder, settings = build_encoder(run.config), step_settings(run.config, run.resolved, CPU)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = [
        prepare_views(MicroBatch(views.global_views, views.local_views, None), settings)[0]
        for views in made_batches(run, 0, ADAPTED_TO)
    ]
    backbone = adapt_statistics(encoder.backbone, batches)
    with torch.no_grad():
        return Learned(backbone, adapt_statistics(encoder.head, [backbone(images) for images in batches]))


def scores(bank: Features, queries: Features, classes: tuple[str, ...]) -> dict[str, float | None]:
    """The shares of the test images that neighbours classify rightly. None where the features are no numbers, as of a method that
    has run away."""
    if bank.labels is None or queries.labels is None:
        raise UserError("bench learn needs sets with labels.")
    if not (bank.rows.isfinite().all() and queries.rows.isfinite().all()):
        return dict.fromkeys(("knn", "knn1", "knn_per_class"))
    truth = queries.labels.long()
    right = {
        k: knn_predict(bank.rows, bank.labels, queries.rows, k=k, temperature=TEMPERATURE, num_classes=len(classes)) == truth
        for k in (NEIGHBOURS, 1)
    }
    per_class = statistics.mean(_share(right[NEIGHBOURS][truth == label]) for label in truth.unique())
    return {"knn": _share(right[NEIGHBOURS]), "knn1": _share(right[1]), "knn_per_class": per_class}


def classified(bank: Features, queries: Features, classes: tuple[str, ...]) -> dict[str, float | None]:
    """The shares that classifiers trained on the features get right: of all labels, and of a tenth of them where that has one for
    each class."""
    train, test = (Split(each.rows.numpy(), np.asarray(each.labels, dtype=np.int64), classes) for each in (bank, queries))
    found: dict[str, float | None] = {"linear": linear(train, test, rates=RATES).figures["top1"].value, "lowshot": None}
    if SHARE * len(train) >= len(np.unique(train.labels if train.labels is not None else ())):
        few = lowshot(train, test, shares=(SHARE,), per_class=(), draws=DRAWS, strengths=STRENGTHS)
        found["lowshot"] = few.figures["top1_10_percent"].value
    return found


def _share(right: Tensor) -> float:
    return right.double().mean().item()


@torch.no_grad()
def _spread(head: nn.Module, queries: Features) -> dict[str, float]:
    """Effective rank and spread of the head's unit outputs on the test images: 1 and 0 where they are one point."""
    spread, rank = embedding_spread(normalize(head.eval()(queries.rows), dim=1)).tolist()
    return {"rank": rank, "spread": spread}


def _last_words(learned: Learned, run: Run) -> dict[str, Any]:
    """What training says at its end: the divergence of student and teacher beside the logarithm of the slots of a read, and the
    product's verdict on the run, which knows no labels here."""
    config, resolved = run.config, run.resolved
    lines = []
    for step, measured in enumerate(learned.measured["lines"], 1):
        kl = measured["loss"] - resolved.koleo_weight * measured["koleo"] - measured["teacher_entropy"]
        known = {"step": step, "epoch": step * resolved.batch_size / resolved.dataset_size, "kl": kl}
        lines.append(measured | known | {"teacher_temp": schedule_at(step - 1, config, resolved).teacher_temp})
    finding = judge(lines, [], Facts.of(config.model_dump()))
    kl = statistics.mean(line["kl"] for line in lines[-LAST:])
    return {"kl": kl, "ln_s": math.log(resolved.read_size), "verdict": finding and str(finding.verdict)}


def _noise(config: Config, step: int) -> Views:
    """A batch of views, uint8, each pixel drawn on its own but for the image's own brightness."""
    views, batch = config.views, config.train.global_batch_size
    random = generator(Stream.EVALUATION, 0, step)
    middle = random.integers(40, 216, (batch, 1, 1, 1, 1))
    made = [
        np.clip(middle + random.integers(-40, 40, (batch, number, side, side, config.data.channels)), 0, 255).astype(np.uint8)
        for number, side in ((2, views.global_size), (views.num_local, views.local_size))
    ]
    return Views(*map(torch.from_numpy, made), skipped=[])
