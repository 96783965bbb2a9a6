"""The verdict on recorded runs: what is wrong is named in time and rightly, nothing where nothing is.

tests/recorded holds real runs of the preset demo, and of it on other images; the first line of each says with which flags."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from massl_ray.config import MonitorSection
from massl_ray.training.monitors import Ending, HealthMonitor
from massl_ray.training.verdict import ADVICE, WINDOW, Facts, Verdict, informed, judge, logit_variance
from tests.helpers import dead_lines, metrics_line

FOLDER = Path(__file__).parent / "recorded"
FACTS = Facts(block_size=32, steps=100)


@dataclass(frozen=True)
class Recorded:
    lines: list[dict]
    knn: list[dict]
    facts: Facts

    @property
    def verdict(self) -> Verdict:
        return self.verdict_at(self.lines[-1]["step"])

    def verdict_at(self, step: int) -> Verdict:
        """What is said of the run after a step, of which only that much is known."""
        lines = [line for line in self.lines if line["step"] <= step]
        finding = judge(lines, [record for record in self.knn if record["step"] <= step], self.facts)
        assert finding is not None
        return finding.verdict

    def first(self) -> dict[Verdict, int]:
        """Step at which each verdict but healthy is heard first, looking every ten steps as training does by default."""
        said: dict[Verdict, int] = {}
        for step in range(self.lines[0]["step"] + 9, self.lines[-1]["step"] + 1, 10):
            said.setdefault(self.verdict_at(step), step)
        said.pop(Verdict.HEALTHY, None)
        return said

    def ending(self) -> Ending | None:
        """How the monitor with its default bounds ends the run."""
        monitor = HealthMonitor(MonitorSection(), self.facts.block_size, self.facts.warmup_epochs)
        return next(filter(None, (monitor.judge(line["step"], line) for line in self.lines)), None)


def recorded(name: str) -> Recorded:
    head, *rows = map(json.loads, (FOLDER / f"{name}.jsonl").read_text().splitlines())
    lines = [dict(zip(head["figures"], row, strict=True)) for row in rows]
    return Recorded(lines, head["knn"], Facts(head["block_size"], head["steps"], warmup_epochs=head["warmup_epochs"]))


HEALTHY = (
    "demo", "demo_four", "elpv_four", "elpv_koleo", "fashion_four", "photos_four",
    # provocations that turned out harmless
    "tiny_blocks", "tiny_blocks_four", "tiny_memory", "tiny_memory_four", "hot_teacher", "no_warmup_four", "tiny_set_four",
)  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on_healthy_runs(name):
    run = recorded(name)
    assert run.verdict == Verdict.HEALTHY and run.first() == {} and run.ending() is None


@pytest.mark.parametrize(
    ("name", "verdict", "first"),
    [
        ("elpv", Verdict.DEAD, {Verdict.SHRINKING: 90, Verdict.DEAD: 100}),  # the preset of before KoLeo
        ("rate_5", Verdict.DEAD, {Verdict.DEAD: 30}),
        ("rate_02", Verdict.SHRINKING, {Verdict.SHRINKING: 50}),
        ("rate_02_four", Verdict.SLOW, {Verdict.SLOW: 120}),  # k-NN is 5 points below the untrained net
        ("fashion", Verdict.SLOW, {Verdict.SLOW: 200}),
        ("photos", Verdict.SLOW, {Verdict.SLOW: 200}),
        ("fast_teacher", Verdict.SLOW, {Verdict.SLOW: 120}),  # its spread falls to 0.23 at step 20 and rises again
        ("fast_teacher_four", Verdict.SLOW, {Verdict.SLOW: 120}),
        ("hot_teacher_four", Verdict.SLOW, {Verdict.SLOW: 120}),
        ("rate_1e_5", Verdict.SLOW, {Verdict.SLOW: 120}),
        ("no_warmup", Verdict.SLOW, {Verdict.SLOW: 120}),
    ],
)
def test_named_rightly_and_in_time(name, verdict, first):
    run = recorded(name)
    assert run.verdict == verdict and run.first() == first


def test_a_dead_run_is_stopped_and_no_other():
    """elpv: kl is under 0.15 for good from step 82 on; with the default patience of 50 steps that ends it at step 131."""
    ending = recorded("elpv").ending()
    assert ending is not None and ending.status == "dead" and ending.message.startswith("Step 131: the run is dead.")
    for name in {path.stem for path in FOLDER.glob("*.jsonl")} - {"elpv"}:
        assert recorded(name).ending() is None, name  # rate_5 has no 50 steps after its warm-up


@pytest.mark.parametrize(
    ("failing", "mended", "gain"),
    [
        ("elpv", "elpv_koleo", 1.9),
        ("photos", "photos_four", 5.6),
        ("fashion", "fashion_four", 3.6),
        ("rate_02_four", "demo_four", 8.7),
    ],
)
def test_the_advice_was_seen_to_help(failing, mended, gain):
    """k-NN of the run with the changed settings is ahead of the failing one's, in points, and its verdict is healthy."""
    before, after = recorded(failing), recorded(mended)
    assert before.verdict != Verdict.HEALTHY and after.verdict == Verdict.HEALTHY
    assert 100 * (after.knn[-1]["top1"] - before.knn[-1]["top1"]) == pytest.approx(gain, abs=0.06)


def test_every_verdict_has_an_advice():
    assert ADVICE.keys() == set(Verdict)
    assert all(bool(advice) == (verdict != Verdict.HEALTHY) for verdict, advice in ADVICE.items())


def test_recordings_are_small():
    for path in FOLDER.iterdir():
        assert path.stat().st_size < 30_000 and len(path.read_text().splitlines()) <= 201, path


# ---- by hand ---------------------------------------------------------------------------------------------------------


def lines(steps: int = WINDOW, **figures) -> list[dict]:
    return [metrics_line(step, **figures) for step in range(1, steps + 1)]


def said(lines: list[dict], knn: list[dict] | None = None, facts: Facts = FACTS) -> tuple[Verdict, str]:
    finding = judge(lines, knn or [], facts)
    assert finding is not None
    return finding.verdict, finding.text


def test_figures_by_hand():
    line = metrics_line(1, teacher_entropy=2.0, embedding_std=0.5, effective_rank=4.0, teacher_temp=0.05)
    assert informed(line, 32) == pytest.approx(3.4657 - 2.0, abs=1e-4)
    assert logit_variance(line) == pytest.approx(0.0625 / (2 * 4 * 0.0025))


def test_logit_variance_is_that_of_embeddings():
    """Of independent unit vectors around a mean that is at right angles to all that varies."""
    import torch

    from massl_ray.method.collapse import embedding_spread

    draws = torch.randn(2, 4000, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    rows = torch.nn.functional.normalize(torch.cat([torch.ones(2, 4000, 1), draws], dim=2), dim=2)
    spread, rank = embedding_spread(rows[0]).tolist()
    found = logit_variance(metrics_line(1, embedding_std=spread, effective_rank=rank, teacher_temp=0.04))
    inner = ((rows[0] - rows[0].mean(0)) * (rows[1] - rows[1].mean(0))).sum(1)
    assert found == pytest.approx((inner / 0.04).var().item() / 2, rel=0.1)


def test_nothing_is_said_too_early():
    assert judge([], [], FACTS) is None
    assert judge([{"step": 1, "loss": 2.0}], [], FACTS) is None  # of an old version
    assert said(dead_lines(WINDOW - 1))[0] == Verdict.HEALTHY and "too early" in said(dead_lines(WINDOW - 1))[1]
    assert said(dead_lines(WINDOW))[0] == Verdict.DEAD
    warm = Facts(32, 100, warmup_epochs=metrics_line(3)["epoch"])
    assert said(dead_lines(WINDOW + 2), facts=warm)[0] == Verdict.HEALTHY
    assert said(dead_lines(WINDOW + 3), facts=warm)[0] == Verdict.DEAD


def test_a_teacher_that_tells_nothing_is_one_however_wide_its_embeddings():
    """ln 32 is 3.466: a twentieth is 0.173. Spread 0.8 and rank 7 could tell 18 nats."""
    wide = {"kl": 0.1, "embedding_std": 0.8}
    assert said(lines(teacher_entropy=3.30, **wide))[0] == Verdict.DEAD
    assert said(lines(teacher_entropy=3.29, **wide))[0] == Verdict.HEALTHY


def test_a_death_says_its_figures_and_what_to_change():
    verdict, text = said(dead_lines(WINDOW))
    assert verdict == Verdict.DEAD and text.startswith("At step 20 the run is dead: student and teacher agree to 0.010 nats")
    assert "0.02 of 3.47 nats, the spread is 0.10." in text and text.endswith(ADVICE[Verdict.DEAD])
    assert "loss.koleo_weight 1" in text and "optim.lr" in text


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_unstable_at_once(name):
    verdict, text = said([metrics_line(1, **{name: math.nan})])
    assert verdict == Verdict.UNSTABLE and text == f"At step 1 {name} is nan. {ADVICE[Verdict.UNSTABLE]}"


def test_a_loss_far_above_ignorance_is_unstable():
    """ln 32 is 3.47: 3.4 + 1.0 is not one nat above it, 3.4 + 1.1 is."""
    assert said(lines(teacher_entropy=3.4, kl=1.0))[0] == Verdict.HEALTHY
    verdict, text = said(lines(teacher_entropy=3.4, kl=1.1))
    assert verdict == Verdict.UNSTABLE and "4.50" in text and "3.47" in text


def test_shrinking_to_a_point_or_a_line():
    assert said(lines(embedding_std=0.2, effective_rank=1.5))[0] == Verdict.HEALTHY
    assert "spread is 0.19" in said(lines(embedding_std=0.19))[1] and said(lines(embedding_std=0.19))[0] == Verdict.SHRINKING
    narrow = lines(effective_rank=1.4)
    assert "effective rank is 1.4" in said(narrow)[1] and said(narrow)[0] == Verdict.SHRINKING
    few = Facts.of({"memory": {"size": 64, "num_blocks": 2}, "train": {"steps": 9, "global_batch_size": 4}})
    assert few.directions == 3 and said(narrow, facts=few)[0] == Verdict.HEALTHY  # where there could be no more than three


def test_single_steps_do_not_count():
    """Medians of the last lines: fewer than half of them are no verdict."""
    assert said([*lines(11), *dead_lines(9)])[0] == Verdict.HEALTHY
    assert said([*lines(9), *dead_lines(11)])[0] == Verdict.DEAD


def knn(untrained: float, *trained: float, images: int = 400) -> list[dict]:
    """Records every 40 steps; of 400 images the standard error is 2.5 points at one half."""
    steps = [("untrained", 0, untrained), *((f"step_{40 * i}", 40 * i, top1) for i, top1 in enumerate(trained, 1))]
    return [{"features": name, "step": step, "top1": top1, "query_images": images} for name, step, top1 in steps]


def test_slow_is_no_gain_beyond_chance_over_the_second_half():
    done = Facts(32, 80)
    assert said(lines(80), knn(0.5, 0.54, 0.53), done)[0] == Verdict.HEALTHY  # 3.5 points
    verdict, text = said(lines(80), knn(0.5, 0.53, 0.51), done)  # 2.0
    assert verdict == Verdict.SLOW and "+2.0 points" in text and "2.5 points with 400 test images" in text
    assert said(lines(80), knn(0.5, 0.53, 0.51, images=4000), done)[0] == Verdict.HEALTHY
    assert said(lines(79), knn(0.5, 0.53, 0.51), done)[0] == Verdict.HEALTHY  # not before the end
    assert said(lines(80), knn(0.5, 0.53, 0.51)[1:], done)[0] == Verdict.HEALTHY  # nothing to compare with


def test_slow_without_labels_is_a_student_that_learns_nothing_of_the_teacher():
    """The teacher tells ln 32 - 2 = 1.47 nats."""
    done = Facts(32, 80)
    assert said(lines(80, kl=1.3), facts=done)[0] == Verdict.HEALTHY
    verdict, text = said(lines(80, kl=1.4), facts=done)
    assert verdict == Verdict.SLOW and "of the 1.47 nats that the teacher tells, 1.40 are left" in text
    assert said(lines(79, kl=1.4), facts=done)[0] == Verdict.HEALTHY
    assert said(lines(80, kl=1.4), knn(0.3, 0.6, 0.6), done)[0] == Verdict.HEALTHY  # k-NN knows better
    for name in ("rate_1e_5", "demo", "demo_four", "photos_four", "tiny_blocks", "tiny_memory_four"):
        run = recorded(name)
        assert (said(run.lines, facts=run.facts)[0] == Verdict.SLOW) == (name == "rate_1e_5"), name


def test_memorising_is_a_fall_while_the_student_still_learns():
    learning = [metrics_line(step, kl=2.0 - step / 100) for step in range(1, 121)]
    fall = knn(0.3, 0.6, 0.55, 0.5)  # 10 points; twice the standard error is 4.9
    verdict, text = said(learning, fall)
    assert verdict == Verdict.MEMORISING and "50.0%, 10.0 points below its best, 60.0% at step 40" in text
    assert said(learning, knn(0.3, 0.6, 0.55, 0.56))[0] == Verdict.HEALTHY
    assert said(lines(120, kl=1.0), fall)[0] == Verdict.HEALTHY  # it learns no more: no sign of memorising
    assert said(learning[:60], knn(0.3, 0.6))[0] == Verdict.HEALTHY


def test_facts_of_a_run():
    settings = {
        "memory": {"size": 64, "num_blocks": 2}, "train": {"steps": 90, "stop_at": 50, "global_batch_size": 16},
        "head": {"dim": 8}, "optim": {"warmup_epochs": 0.5}, "monitor": {"min_kl": 0.3},
    }  # fmt: skip
    assert Facts.of(settings) == Facts(32, 50, 8, 0.5, 0.3)
    old = {"memory": settings["memory"], "train": {"steps": 90}}
    assert Facts.of(old) == Facts(32, 90)
    assert Facts.of(old | {"monitor": {"min_kl": 0.0}}) == Facts(32, 90)  # not stopped, but named
