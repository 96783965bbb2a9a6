"""Search spaces: sweeps/*.toml become a `Sweep`, and a sweep its points. What cannot be run is refused in a sentence."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from massl_ray.config.loading import keys, nearest, read_preset, read_toml, validate
from massl_ray.config.resolve import resolve
from massl_ray.config.schema import Config, merge
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator

TRIES = 1_000  # draws for a random point that can be run
WHILE_TRAINING = ("loss.", "optim.", "memory.num_blocks", "model.drop_path", "views.")
"""Settings that a population may change from one generation to the next."""
Point = dict[str, Any]
"""Values by setting: {'memory.size': 4096, ...}."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Number = int | float
Pair = tuple[Number, Number]


class Values(Part):
    """What one setting is tried at: exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """These values, in no order."""
    grid: tuple[Number, ...] | None = None
    """These numbers."""
    uniform: Pair | None = None
    """From the one number to the other."""
    log_uniform: Pair | None = None
    """The same, evenly in the logarithm."""
    integer: tuple[int, int] | None = None
    """Whole numbers from the one to the other."""
    powers_of_two: tuple[int, int] | None = None
    """Those from the one to the other."""

    @model_validator(mode="after")
    def _one(self) -> "Values":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(Values.model_fields)}, and has {len(given)}")
        ((kind, value),) = given.items()
        if kind in ("choice", "grid") and not value:
            raise ValueError(f"{kind} is empty")
        if kind not in ("choice", "grid") and not value[0] < value[1]:
            raise ValueError(f"{kind} must rise: its lower bound {value[0]} is not below its upper bound {value[1]}")
        if kind in ("log_uniform", "powers_of_two") and value[0] <= 0:
            raise ValueError(f"{kind} is of positive numbers, and its lower bound is {value[0]}")
        if kind == "powers_of_two" and not self.listed:
            raise ValueError(f"there is no power of two from {value[0]} to {value[1]}")
        return self

    @property
    def listed(self) -> tuple[Any, ...]:
        """All of them; empty where they lie too close to be listed."""
        if self.integer is not None:
            return tuple(range(self.integer[0], self.integer[1] + 1))
        if self.powers_of_two is not None:
            low, high = self.powers_of_two
            return tuple(2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
        return self.choice or self.grid or ()

    @property
    def bounds(self) -> Pair:
        """Of numbers that are not listed."""
        found = self.uniform or self.log_uniform
        assert found is not None
        return found

    def draw(self, share: float) -> Any:
        """The value that lies at `share`, in 0..1, of the way."""
        if self.listed:
            return self.listed[min(int(share * len(self.listed)), len(self.listed) - 1)]
        low, high = self.bounds
        return low * (high / low) ** share if self.log_uniform else low + share * (high - low)


class Constraints(Part):
    """What points must fulfil besides being valid settings."""

    blocks_divide_memory: bool = False
    """memory.num_blocks divides memory.size."""
    min_block_size: Annotated[int, Field(ge=2)] = 2
    """Slots of a block, at least."""


class SweepSection(Part):
    """How the space is searched, and by what."""

    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination. random: `points` draws. optuna: `points` draws, each round by what those before have shown."""
    points: Annotated[int, Field(ge=1)] = 16
    """That random and optuna draw."""
    round: Annotated[int, Field(ge=1)] = 8
    """Points that optuna draws at a time: they wait for all points of the rounds before, and for nothing else."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """run.seed of the runs of each point: their spread says how sure a figure is."""
    metric: Literal["knn", "effective_rank", "loss"] = "knn"
    """What makes a point the better one: k-NN accuracy and effective rank high, the loss low."""
    scheduler: Literal["none", "asha", "population"] = "none"
    """asha: trials that lag behind others, at equal images seen, end early. population: after each of `generations` equal parts of
    a run the worst quarter goes on from checkpoints of the best, with settings a step away from theirs."""
    generations: Annotated[int, Field(ge=2)] = 4
    """Of a population."""
    at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials that run at the same time, at most. auto: as many as the cluster holds."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Of a trial, at most."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Of an hour of one worker, in any currency: what trials cost."""


class Sweep(Part):
    """A whole file."""

    sweep: SweepSection = SweepSection()
    settings: dict[str, Any] = {}
    """Of every trial: a preset's name, and sections as in a configuration file."""
    space: dict[str, Values] = {}
    constraints: Constraints = Constraints()

    @model_validator(mode="after")
    def _consistent(self) -> "Sweep":
        if not self.space:
            raise ValueError("the space is empty: name a setting under [space]")
        close = [key for key, values in self.space.items() if not values.listed]
        if self.sweep.search == "grid" and close:
            raise ValueError(f"{close[0]} has no values that a grid could list: give it a choice, or search at random")
        if self.sweep.scheduler == "population":
            self._one_population()
        return self

    def _one_population(self) -> None:
        fixed = [key for key in self.space if not key.startswith(WHILE_TRAINING) or key.endswith("_size")]
        if fixed:
            raise ValueError(f"{fixed[0]} cannot change while a run trains, as settings of a population do: leave it out")
        if self.sweep.search == "optuna":
            raise ValueError("a population finds its own points: give search as grid or random, which it starts from")
        if len(self.sweep.seeds) > 1:
            raise ValueError("a population has one seed: its members are compared with each other")


@dataclass(frozen=True)
class Plan:
    """Points that can be run, and why others cannot."""

    points: tuple[Point, ...]
    refused: tuple[tuple[Point, str], ...]


def read_sweep(path: Path) -> Sweep:
    """Raises UserError, naming file and key, for anything unknown or out of range."""
    values = read_toml(path)
    try:
        sweep = Sweep(**values)
    except ValidationError as error:
        raise UserError(f"{path}: {' '.join(map(_sentence, error.errors()))}") from None
    known = keys(Config())
    for key in sweep.space:
        if key not in known:
            raise UserError(f"{path}: there is no setting '{key}'{nearest(key, list(known))}.")
        if key in ("run.dir", "run.seed", "data.source"):
            raise UserError(f"{path}: {key} is no part of a space: a sweep sets it itself, or takes it as a flag.")
    base_of(sweep)
    return sweep


def base_of(sweep: Sweep, flags: Mapping[str, Any] = {}) -> Config:
    """The settings that all trials share, under the flags of the command."""
    settings = dict(sweep.settings)
    preset = settings.pop("preset", "demo")
    return validate(merge(merge(read_preset(preset), settings), flags))


def at(base: Config, point: Point) -> Config:
    """The settings of a point. Raises UserError where they cannot be."""
    nested: dict[str, Any] = {}
    for key, value in point.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return validate(merge(base.model_dump(), nested))


def why_not(sweep: Sweep, base: Config, point: Point, dataset_size: int) -> str | None:
    """Why a point cannot be run; None where it can."""
    try:
        resolved = resolve(at(base, point), dataset_size)
    except UserError as error:
        return str(error).removesuffix(".")
    size, blocks = resolved.memory_size, resolved.num_blocks
    if sweep.constraints.blocks_divide_memory and size % blocks:
        return f"memory.num_blocks {blocks} does not divide memory.size {size}"
    if size // blocks < sweep.constraints.min_block_size:
        return f"a block has {size // blocks} slots, fewer than constraints.min_block_size {sweep.constraints.min_block_size}"
    return None


def plan(sweep: Sweep, base: Config, dataset_size: int) -> Plan:
    """The points that a sweep begins with: those of a grid, as many random ones as asked for, or optuna's first round, which is
    random, too.

    Raises UserError if none can be run.
    """
    good: list[Point] = []
    refused: list[tuple[Point, str]] = []
    search, points = sweep.sweep.search, sweep.sweep.points
    wanted = {"grid": math.inf, "random": points, "optuna": min(points, sweep.sweep.round)}[search]
    for point in _candidates(sweep):
        if len(good) == wanted:
            break
        fault = why_not(sweep, base, point, dataset_size)
        if fault is None:
            good.append(point)
        else:
            refused.append((point, fault))
    if not good:
        point, fault = refused[0]
        raise UserError(f"No point of the space can be run; the first one: {words(point)}: {fault}.")
    return Plan(tuple(good), tuple(refused))


def words(point: Point) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items())


def _candidates(sweep: Sweep) -> Iterator[Point]:
    if sweep.sweep.search == "grid":
        for values in itertools.product(*(values.listed for values in sweep.space.values())):
            yield dict(zip(sweep.space, values, strict=True))
        return
    seen = set()
    for number in range(TRIES):
        shares = generator(Stream.SWEEP, sweep.sweep.seeds[0], number).random(len(sweep.space))
        point = {key: values.draw(float(share)) for (key, values), share in zip(sweep.space.items(), shares, strict=True)}
        if (form := str(point)) not in seen:
            seen.add(form)
            yield point


def _sentence(item: Any) -> str:
    """One of pydantic's errors, for people."""
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        part = {"sweep": SweepSection, "constraints": Constraints, "space": Values}[path[0]] if path[1:] else Sweep
        return f"there is no '{key}'{nearest(path[-1], list(part.model_fields))}."
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}." if key else f"{item['ctx']['error']}."
    if path[0] == "space" and len(path) == 2:
        return f"{key} is {item['input']!r}: give it values, as in {{choice = [1, 2]}}."
    return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."
