"""A sweep's table: on a terminal all trials as they are, elsewhere one line for each that has ended."""

import io
import json
import re

import pytest
from rich.console import Console

from massl_ray.sweeping import table as module
from massl_ray.sweeping.table import SweepTable
from massl_ray.sweeping.trials import Outcome, Trial, folder_of, write_outcome
from tests.helpers import metrics_line

TRIALS = [Trial(f"{number}-seed-0", {"optim.lr": 0.1 * 2**number}, 0) for number in range(4)]


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What a table of the trials prints while `happen` is called."""

    def shown(happen, *, terminal: bool) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=120, highlight=False, emoji=False)
        monkeypatch.setattr(module, "Console", lambda **_: console)
        with SweepTable(tmp_path, TRIALS, "loss"):
            happen()
        return out.getvalue()

    return shown


def train(root, trial: Trial, step: int) -> None:
    folder_of(root, trial).mkdir(parents=True)
    (folder_of(root, trial) / "config.toml").write_text("memory = { size = 64, num_blocks = 2 }\ntrain = { steps = 10 }\n")
    (folder_of(root, trial) / "metrics.jsonl").write_text(json.dumps(metrics_line(step) | {"loss": 1.5}) + "\n")


def happen(root) -> None:
    train(root, TRIALS[1], 10)
    write_outcome(root, TRIALS[1], Outcome("finished", 12.4))
    write_outcome(root, TRIALS[2], Outcome("failed", 3.0, "no such net"))
    train(root, TRIALS[3], 5)


def test_lines(shown, tmp_path):
    """Trials of an earlier command are not told again."""
    train(tmp_path, TRIALS[0], 10)
    write_outcome(tmp_path, TRIALS[0], Outcome("finished", 1.0))
    assert shown(lambda: happen(tmp_path), terminal=False).splitlines() == [
        "1-seed-0  finished in 12 s, healthy, 1.500: optim.lr 0.2",
        "2-seed-0  failed in 3 s, no verdict, -: optim.lr 0.4 (no such net)",
    ]


def test_terminal(shown, tmp_path):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(lambda: happen(tmp_path), terminal=True))
    last = [" ".join(line.split()) for line in text[text.rindex("trial  ") :].splitlines()]
    images = metrics_line(10)["images_seen"], metrics_line(5)["images_seen"]
    assert last[0] == "trial settings state images loss verdict"
    assert last[1:5] == [
        "0-seed-0 optim.lr 0.1 waiting 0 -",
        f"1-seed-0 optim.lr 0.2 finished in 12 s {images[0]:,} 1.500 healthy",
        "2-seed-0 optim.lr 0.4 failed in 3 s 0 -",
        f"3-seed-0 optim.lr 0.8 running {images[1]:,} 1.500 healthy",
    ]
