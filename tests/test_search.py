"""What comes next: Optuna's rounds and a population's generations, as pure functions of what came out."""

import math
import sys

import pytest

from massl_ray.config import load
from massl_ray.config.space import Sweep, Values
from massl_ray.errors import UserError
from massl_ray.sweeping.search import _moved, check_search, next_trials, stop_of
from massl_ray.sweeping.trials import Row, Trial, trials_of

BASE = load(["--train.steps", "90"])


def row(trial: Trial, value: float, status: str = "finished") -> Row:
    return Row(trial, status, "", 1.0, None, 640, value, 10, 10, value, value)


def sweep(space: dict, **section) -> Sweep:
    return Sweep(sweep=section, space=space)  # type: ignore[arg-type]


def hill(point: dict) -> float:
    """Highest at 4,096 slots and a temperature of 0.1."""
    return 1 - 0.1 * abs(math.log2(point["memory.size"]) - 12) - abs(math.log(point["loss.student_temp"] / 0.1))


def test_optuna_is_an_extra(monkeypatch):
    spec = sweep({"memory.size": {"choice": (256, 512)}}, search="optuna")
    check_search(spec)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install 'massl-ray\[optuna\]'"):
        check_search(spec)
    check_search(sweep({"memory.size": {"choice": (256, 512)}}))


class TestOptuna:
    SPACE = {
        "memory.size": {"powers_of_two": (256, 65536)},
        "loss.student_temp": {"log_uniform": (0.01, 1.0)},
        "head.num_layers": {"choice": (2, 3)},
    }

    def run(self, metric="knn", rounds=6, seed=0) -> list[Row]:
        spec = sweep(self.SPACE, search="optuna", points=8 * rounds, round=8, metric=metric, seeds=[seed])
        random = sweep(self.SPACE, search="random", points=8, seeds=[seed])
        from massl_ray.config.space import plan

        trials = trials_of(plan(random, BASE, 3_000).points, [seed], of=8 * rounds)
        past: list[Row] = []
        while trials:
            sign = -1 if metric == "loss" else 1
            past += [row(trial, sign * hill(trial.point)) for trial in trials]
            trials = next_trials(spec, BASE, 3_000, past)
        return past

    @pytest.mark.parametrize("metric", ["knn", "loss"])
    def test_it_climbs(self, metric):
        """Later rounds lie higher than the random one, whichever way is up."""
        for seed in range(3):
            heights = [hill(row.trial.point) for row in self.run(metric, seed=seed)]
            first, last = heights[:8], heights[-8:]
            assert len(heights) == 48 and sum(last) / 8 > sum(first) / 8 + 0.5 and max(heights) > 0.8, seed

    def test_it_is_a_pure_function(self):
        assert self.run() == self.run()
        assert self.run() != self.run(seed=1)

    def test_points_are_in_the_space_and_not_twice(self):
        rows = self.run()
        points = [row.trial.point for row in rows]
        assert len({str(point) for point in points}) == len(points) == 48
        assert {point["memory.size"] for point in points} <= {2**power for power in range(8, 17)}
        assert {point["head.num_layers"] for point in points} == {2, 3}
        assert all(0.01 <= point["loss.student_temp"] <= 1 for point in points)
        assert [row.trial.name for row in rows[7:9]] == ["07-seed-0", "08-seed-0"]

    def test_every_seed_of_a_point_before_the_next_round(self):
        spec = sweep(self.SPACE, search="optuna", points=6, round=4, seeds=[3, 5])
        first = trials_of([{"memory.size": 256 * 2**i, "loss.student_temp": 0.1, "head.num_layers": 2} for i in range(4)], [3, 5])
        following = next_trials(spec, BASE, 3_000, [row(trial, 0.5) for trial in first])
        assert [trial.name for trial in following] == ["4-seed-3", "5-seed-3", "4-seed-5", "5-seed-5"]
        assert following[0].point == following[2].point
        assert next_trials(spec, BASE, 3_000, [row(trial, 0.5) for trial in [*first, *following]]) == []

    def test_a_space_may_be_used_up(self):
        spec = sweep({"memory.num_blocks": {"choice": (1, 2, 4)}}, search="optuna", points=10, round=2)
        first = trials_of([{"memory.num_blocks": 1}, {"memory.num_blocks": 4}], [0], of=10)
        following = next_trials(spec, BASE, 3_000, [row(trial, 0.5) for trial in first])
        assert [trial.point for trial in following] == [{"memory.num_blocks": 2}]
        assert next_trials(spec, BASE, 3_000, [row(trial, 0.5) for trial in [*first, *following]]) == []

    def test_failures_do_not_count(self):
        spec = sweep(self.SPACE, search="optuna", points=20, round=4)
        points = [{"memory.size": 256 * 2**i, "loss.student_temp": 0.1, "head.num_layers": 2} for i in range(4)]
        past = [row(trial, math.nan, "failed") for trial in trials_of(points, [0], of=20)]
        assert len(next_trials(spec, BASE, 3_000, past)) == 4


class TestPopulation:
    SPACE = {"loss.student_temp": {"log_uniform": (0.05, 0.2)}, "memory.num_blocks": {"powers_of_two": (1, 16)}}
    SPEC = sweep(SPACE, scheduler="population", search="random", points=8, generations=3)

    def members(self, generation: int = 0) -> list[Trial]:
        points = [{"loss.student_temp": 0.06 + 0.01 * member, "memory.num_blocks": 4} for member in range(8)]
        stop_at = stop_of(self.SPEC, BASE, 3_000, generation)
        return [Trial(f"{m}-seed-0-gen-{generation}", point, 0, "", generation, stop_at) for m, point in enumerate(points)]

    def test_generations_are_equal_parts(self):
        assert [stop_of(self.SPEC, BASE, 3_000, generation) for generation in range(3)] == [30, 60, 90]
        assert stop_of(sweep(self.SPACE, search="random"), BASE, 3_000, 0) is None

    def test_the_worst_go_on_from_the_best(self):
        values = [0.1, 0.8, 0.3, 0.4, 0.9, 0.6, 0.2, 0.5]
        members = self.members()
        children = next_trials(self.SPEC, BASE, 3_000, [row(*pair) for pair in zip(members, values, strict=True)])
        assert [child.name for child in children] == [f"{member}-seed-0-gen-1" for member in range(8)]
        assert all((child.generation, child.stop_at) == (1, 60) for child in children)
        for member in (1, 2, 3, 4, 5, 7):
            assert (children[member].parent, children[member].point) == (members[member].name, members[member].point)
        for member in (0, 6):
            child = children[member]
            parent = next(trial for trial in members if trial.name == child.parent)
            assert parent.name in ("1-seed-0-gen-0", "4-seed-0-gen-0")
            factor = child.point["loss.student_temp"] / parent.point["loss.student_temp"]
            assert factor == pytest.approx(1.25) or factor == pytest.approx(0.8)
            assert child.point["memory.num_blocks"] in (2, 8)

    def test_less_loss_is_better(self):
        spec = sweep(self.SPACE, scheduler="population", search="random", metric="loss", generations=3)
        values = [0.1, 0.8, 0.3, 0.4, 0.9, 0.6, 0.2, 0.5]
        children = next_trials(spec, BASE, 3_000, [row(*pair) for pair in zip(self.members(), values, strict=True)])
        assert {children[member].parent for member in (1, 4)} <= {"0-seed-0-gen-0", "6-seed-0-gen-0"}

    def test_who_failed_is_replaced_too(self):
        members = self.members()
        past = [row(trial, 0.5 + 0.01 * member) for member, trial in enumerate(members)]
        past[2], past[3], past[4] = (row(trial, math.nan, "failed") for trial in members[2:5])
        children = next_trials(self.SPEC, BASE, 3_000, past)
        assert {children[member].parent for member in (2, 3, 4)} <= {"6-seed-0-gen-0", "7-seed-0-gen-0"}
        assert children[0].parent == "0-seed-0-gen-0"
        assert next_trials(self.SPEC, BASE, 3_000, [row(trial, math.nan, "failed") for trial in members]) == []

    def test_steps_stay_in_the_space(self):
        edge = [{"loss.student_temp": 0.2, "memory.num_blocks": 16}] * 8
        past = [row(Trial(f"{m}-seed-0-gen-0", point, 0), float(m)) for m, point in enumerate(edge)]
        moved = [child.point for child in next_trials(self.SPEC, BASE, 3_000, past)[:2]]
        assert moved == [{"loss.student_temp": pytest.approx(0.16), "memory.num_blocks": 8}] * 2

    @pytest.mark.parametrize(
        ("values", "value", "steps"),
        [
            ({"uniform": (0.1, 1.0)}, 0.1, {0.125}),
            ({"uniform": (0.1, 1.0)}, 0.5, {0.4, 0.625}),
            ({"uniform": (0.1, 1.0)}, 0.9, {0.72}),
            ({"uniform": (0.9, 1.0)}, 0.95, {1.0}),
            ({"grid": (1, 2, 3)}, 1, {2}),
            ({"grid": (1, 2, 3)}, 2, {1, 3}),
            ({"grid": (1, 2, 3)}, 3, {2}),
            ({"grid": (1,)}, 1, {1}),
        ],
    )
    def test_a_step(self, values, value, steps):
        """Inwards at an edge."""
        moved = {_moved(Values(**values), value, up) for up in (False, True)}
        assert sorted(moved) == pytest.approx(sorted(steps))

    def test_it_ends(self):
        past = [row(trial, 0.5) for generation in range(3) for trial in self.members(generation)]
        assert next_trials(self.SPEC, BASE, 3_000, past) == []
        assert len(next_trials(self.SPEC, BASE, 3_000, past[:16])) == 8


def test_grids_and_draws_have_one_round():
    for search in ("grid", "random"):
        spec = sweep({"memory.size": {"choice": (256, 512)}}, search=search)
        trials = trials_of([{"memory.size": 256}], [0])
        assert next_trials(spec, BASE, 3_000, [row(trial, 0.5) for trial in trials]) == []
