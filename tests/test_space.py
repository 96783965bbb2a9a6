"""Search spaces: what a file may say, which points that makes, and which of them cannot be run."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

from massl_ray.config import to_toml
from massl_ray.config.space import Sweep, Values, at, base_of, plan, read_sweep, why_not, words
from massl_ray.errors import UserError

ROOT = Path(__file__).parent.parent
BASE = base_of(Sweep(space={"memory.size": {"choice": [64]}}))  # type: ignore[dict-item]


def sweep(space: dict, **more) -> Sweep:
    return Sweep(**{"space": space} | more)


def read(tmp_path: Path, text: str) -> Sweep:
    (tmp_path / "s.toml").write_text(text)
    return read_sweep(tmp_path / "s.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda path: path.name)
def test_those_in_the_repository(path):
    spec = read_sweep(path)
    found = plan(spec, base_of(spec), 3_000)
    assert len(found.points) >= 6
    assert all(why_not(spec, base_of(spec), point, 3_000) is None for point in found.points)


def test_there_are_four():
    assert [path.name for path in sorted((ROOT / "sweeps").iterdir())] == [
        "all.toml",
        "memory.toml",
        "smoke.toml",
        "temperatures.toml",
    ]


def test_a_grid_is_every_combination():
    spec = sweep(
        {"memory.size": {"powers_of_two": (100, 600)}, "optim.lr": {"grid": (0.1, 0.2)}, "memory.num_blocks": {"integer": (1, 3)}}
    )
    points = plan(spec, BASE, 3_000).points
    assert [tuple(point.values()) for point in points] == list(product((128, 256, 512), (0.1, 0.2), (1, 2, 3)))


@pytest.mark.parametrize(
    ("values", "low", "high", "scale"),
    [({"uniform": (0.02, 0.05)}, 0.02, 0.05, float), ({"log_uniform": (1e-4, 1e-1)}, math.log(1e-4), math.log(1e-1), math.log)],
)
def test_random_points_are_spread_as_said(values, low, high, scale):
    spec = sweep({"optim.lr": values}, sweep={"search": "random", "points": 500})
    points = plan(spec, BASE, 3_000).points
    drawn = np.array([scale(point["optim.lr"]) for point in points])
    assert kstest((drawn - low) / (high - low), "uniform").pvalue > 0.01
    assert points == plan(spec, BASE, 3_000).points  # the same each time
    other = sweep({"optim.lr": values}, sweep={"search": "random", "points": 500, "seeds": [1]})
    assert points != plan(other, BASE, 3_000).points


def test_listed_values_are_drawn_alike():
    values = Values(powers_of_two=(1, 8))
    assert [values.draw(share) for share in (0, 0.249, 0.25, 0.5, 0.75, 0.999)] == [1, 1, 2, 4, 8, 8]


def test_random_draws_no_point_twice():
    spec = sweep({"memory.num_blocks": {"integer": (1, 5)}}, sweep={"search": "random", "points": 30})
    assert sorted(point["memory.num_blocks"] for point in plan(spec, BASE, 3_000).points) == [1, 2, 3, 4, 5]


def test_points_that_cannot_be_run_are_left_out_by_name():
    spec = sweep(
        {"memory.size": {"choice": (96, 256)}, "memory.num_blocks": {"choice": (1, 5, 64)}},
        constraints={"blocks_divide_memory": True, "min_block_size": 4},
    )
    found = plan(spec, BASE, 3_000)
    assert [words(point) for point in found.points] == [
        "memory.size 96, memory.num_blocks 1",
        "memory.size 256, memory.num_blocks 1",
        "memory.size 256, memory.num_blocks 64",
    ]
    faults = {words(point): fault for point, fault in found.refused}
    assert faults["memory.size 96, memory.num_blocks 5"] == "memory.num_blocks 5 does not divide memory.size 96"
    assert "is too small for memory.num_blocks 64" in faults["memory.size 96, memory.num_blocks 64"]


def test_the_sides_of_the_smallest_block():
    for least, runs in ((16, True), (17, False)):
        spec = sweep({"memory.size": {"choice": [64]}, "memory.num_blocks": {"choice": [4]}}, constraints={"min_block_size": least})
        assert (why_not(spec, BASE, {"memory.size": 64, "memory.num_blocks": 4}, 3_000) is None) == runs


def test_no_point_at_all():
    spec = sweep({"memory.size": {"choice": [2]}, "memory.num_blocks": {"choice": [64]}})
    with pytest.raises(UserError, match=r"^No point of the space can be run; the first one: memory.size 2, memory.num_blocks 64: "):
        plan(spec, BASE, 3_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the space is empty: name a setting under [space]"),
        ('[space]\n"memory.size" = {choices = [1]}', "there is no 'space.memory.size.choices'; the nearest is 'choice'"),
        ('[space]\n"optim.lr" = 3', "space.optim.lr is 3: give it values, as in {choice = [1, 2]}"),
        ("[extra]\na = 1", "there is no 'extra'"),
        ("[space]", "the space is empty: name a setting under [space]"),
        ('[space]\n"memory.sise" = {choice = [1]}', "there is no setting 'memory.sise'; the nearest is 'memory.size'"),
        ('[space]\n"memory.size" = {choice = []}', "choice is empty"),
        (
            '[space]\n"memory.size" = {}',
            "needs exactly one of choice, grid, uniform, log_uniform, integer, powers_of_two, and has 0",
        ),
        ('[space]\n"memory.size" = {choice = [1], grid = [2]}', "and has 2"),
        ('[space]\n"memory.size" = {integer = [5, 5]}', "integer must rise: its lower bound 5 is not below its upper bound 5"),
        ('[space]\n"optim.lr" = {log_uniform = [0, 1]}', "log_uniform is of positive numbers, and its lower bound is 0"),
        ('[space]\n"memory.size" = {powers_of_two = [5, 7]}', "there is no power of two from 5 to 7"),
        ('[space]\n"optim.lr" = {uniform = [0.1, 1]}', "optim.lr has no values that a grid could list"),
        ('[space]\n"run.seed" = {choice = [1]}', "run.seed is no part of a space"),
        ('[sweep]\nsearch = "bayes"\n[space]\n"optim.lr" = {grid = [1]}', "sweep.search is 'bayes'"),
        ('[sweep]\nmetrik = 1\n[space]\n"optim.lr" = {grid = [1]}', "there is no 'sweep.metrik'; the nearest is 'metric'"),
        ('[settings]\npreset = "tiny"\n[space]\n"optim.lr" = {grid = [1]}', "There is no preset 'tiny'"),
        ('[settings.memory]\nsise = 1\n[space]\n"optim.lr" = {grid = [1]}', "There is no setting 'memory.sise'"),
        ("[space", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_of_all_trials(tmp_path):
    spec = read(tmp_path, '[settings]\ntrain = {steps = 7}\nmemory = {size = 128}\n[space]\n"optim.lr" = {grid = [1]}')
    base = base_of(spec, {"train": {"steps": 9}})
    assert (base.train.steps, base.memory.size, base.model.backbone) == (9, 128, "test_byobnet")
    config = at(base, {"optim.lr": 0.5, "memory.size": 256})
    assert (config.optim.lr, config.memory.size, config.train.steps) == (0.5, 256, 9)
    assert to_toml(at(base, {})) == to_toml(base)
