"""Rounds: nothing of a round before the one before is over, and the same trials after an end and a new start."""

import json

from massl_ray.config import load
from massl_ray.config.space import Sweep, plan
from massl_ray.sweeping.rounds import Rounds
from massl_ray.sweeping.trials import Outcome, Trial, folder_of, read_outcome, write_outcome
from tests.helpers import metrics_line

BASE = load(["--train.steps", "12"])
OPTUNA = Sweep(
    sweep={"search": "optuna", "points": 5, "round": 2, "metric": "loss"},  # type: ignore[arg-type]
    space={"loss.student_temp": {"uniform": (0.05, 0.2)}},  # type: ignore[dict-item]
)
POPULATION = Sweep(
    sweep={"scheduler": "population", "metric": "loss", "generations": 2},  # type: ignore[arg-type]
    space={"loss.student_temp": {"grid": (0.06, 0.08, 0.1, 0.12)}},  # type: ignore[dict-item]
)


def rounds_in(root, spec: Sweep) -> Rounds:
    return Rounds(root, spec, BASE, 3_000, plan(spec, BASE, 3_000))


def end(root, rounds: Rounds, trial: Trial, status: str = "finished") -> None:
    folder = folder_of(root, trial)
    folder.mkdir(parents=True, exist_ok=True)
    loss = trial.point["loss.student_temp"]
    (folder / "metrics.jsonl").write_text(json.dumps(metrics_line(12) | {"loss": loss}) + "\n")
    write_outcome(root, trial, Outcome(status, 1.0))
    rounds.done(trial)


def test_a_round_waits_for_the_one_before(tmp_path):
    rounds = rounds_in(tmp_path, OPTUNA)
    first, second = rounds.take(), rounds.take()
    assert first and second and rounds.take() is None and not rounds.over
    end(tmp_path, rounds, second)
    assert rounds.take() is None and len(rounds.trials) == 2
    end(tmp_path, rounds, first)
    names = [first.name, second.name]
    while trial := rounds.take():
        names.append(trial.name)
        end(tmp_path, rounds, trial)
    assert names == [f"{number}-seed-0" for number in range(5)] and rounds.over


def test_a_new_start_goes_on_with_the_same_trials(tmp_path):
    for name in ("whole", "often"):
        (tmp_path / name).mkdir()
    whole = rounds_in(tmp_path / "whole", OPTUNA)
    while trial := whole.take():
        end(tmp_path / "whole", whole, trial)
    for _ in range(10):  # a new start before every trial
        rounds = rounds_in(tmp_path / "often", OPTUNA)
        if trial := rounds.take():
            end(tmp_path / "often", rounds, trial)
    assert rounds.over and rounds.trials == whole.trials and len(whole.trials) == 5


def test_what_failed_is_tried_again_by_a_new_start(tmp_path):
    rounds = rounds_in(tmp_path, OPTUNA)
    first, second = rounds.take(), rounds.take()
    assert first and second
    end(tmp_path, rounds, first, "failed")
    end(tmp_path, rounds, second)
    assert rounds.take() is not None  # others go on
    again = rounds_in(tmp_path, OPTUNA)
    assert [trial.name for trial in again.left] == ["0-seed-0", "2-seed-0", "3-seed-0"] and read_outcome(tmp_path, first) is None


def test_generations(tmp_path):
    rounds = rounds_in(tmp_path, POPULATION)
    members = [rounds.take() for _ in range(4)]
    assert [(trial.name, trial.stop_at) for trial in members if trial] == [(f"{m}-seed-0-gen-0", 6) for m in range(4)]
    for trial in members:
        assert trial
        end(tmp_path, rounds, trial, "failed" if trial.name[0] == "1" else "finished")
    children = [rounds.take() for _ in range(4)]
    assert [trial.parent for trial in children if trial] == [
        "0-seed-0-gen-0",
        "0-seed-0-gen-0",  # in place of the one that failed
        "2-seed-0-gen-0",
        "3-seed-0-gen-0",
    ]
    again = rounds_in(tmp_path, POPULATION)
    assert again.trials == rounds.trials and {trial.generation for trial in again.left} == {1}  # who failed was replaced
