"""What a run's figures say about it: whether it is healthy, or what ails it and which settings to change.

Pure functions over the lines of metrics.jsonl and the k-NN records of a run. The monitor that stops a run, its console, summary and
report, and the tables of comparisons and sweeps all ask here. Figures without another unit are in nats; S is the number of slots
of a block of the memory. Each bound says where it comes from; the runs are in tests/recorded.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from statistics import mean, median
from typing import Any

Line = Mapping[str, Any]

NEEDED = {"step", "epoch", "kl", "teacher_entropy", "teacher_temp", "embedding_std", "effective_rank"}
"""Figures of a line that a verdict rests on."""
WINDOW = 20
"""Lines, one a step, whose medians are judged: single steps of a healthy run vary by a third."""
MIN_KL = 0.15
"""A dead run's `kl` is under this. Healthy runs never fall below 0.28 (blocks of 4 slots; 0.44 with 1,024), dead ones end at 0.07
and less."""
MIN_INFORMED = 0.05
"""A dead run's teacher tells less than this share of ln S: healthy ones 9 % and more, dead ones 2.5 %
and less. Teachers of temperature 0.5 tell 0.4 to 3 %, but leave the student something to learn (hot_teacher)."""
MIN_LOGIT_VARIANCE = 0.25
"""A dead run's teacher could tell less than this by what the batch's embeddings still are, whatever old rows the memory holds:
healthy runs 0.8 and more, dead ones 0.1 and less."""
MIN_SPREAD = 0.2
"""A shrinking run's spread is under this: healthy runs stay above 0.4, and one that falls to 0.23 recovers (fast_teacher)."""
MIN_RANK = 1.5
"""A shrinking run's effective rank is under this: one direction and little else. Healthy runs stay above 1.6, one with
a rate too high ends at 1.2 (rate_02)."""
FEW = 4
"""Directions of which a rank near one says nothing, where there could be no more."""
MAX_EXCESS = 1.0
"""An unstable run's cross-entropy is above ln S, which knowing nothing costs, by more than this. 0.7 was seen with a teacher
hotter than its student (hot_teacher_four), more in no run: gradients are clipped, so that a rate too high kills a run instead."""
NOISE = 1.0
"""Standard errors of a k-NN accuracy within which two that were taken on the same images count as equal."""
MIN_LEARNT = 0.1
"""A slow run's student has learnt less than this share of what the teacher tells. One with a rate of 1e-5 6 % (rate_1e_5), healthy
ones 20 to 50 %."""
FALL = 2.0
"""Standard errors of a k-NN accuracy by which a memorising run falls below its best."""


class Verdict(StrEnum):
    """What a run is, in a word."""

    HEALTHY = "healthy"
    UNSTABLE = "unstable"  # figures that are not finite, or a loss far above what knowing nothing costs
    DEAD = "dead"  # teacher and student agree that every image is like all others: nothing is left to learn from
    SHRINKING = "shrinking"  # the embeddings are on their way to one point, or to one direction
    MEMORISING = "memorising"  # it still learns, but no longer what tells classes apart
    SLOW = "slow"  # it is alive, but no better than the same net untrained


KOLEO = "loss.koleo_weight 1 with train.micro_batch_size 64 or more"
ADVICE = {
    Verdict.HEALTHY: "",
    Verdict.UNSTABLE: "Lower optim.lr, or use --train.precision fp32.",
    Verdict.DEAD: f"Use {KOLEO}; where that is so, lower optim.lr.",
    Verdict.SHRINKING: f"Lower optim.lr, or use {KOLEO}.",
    Verdict.MEMORISING: "The checkpoint with the best k-NN is kept: use it, train fewer steps (train.steps), or give more images.",
    Verdict.SLOW: f"Use {KOLEO}, optim.lr 8e-3, optim.teacher_momentum and its final value 0.97, loss.teacher_temp 0.04; "
    "or train longer (train.steps).",
}
"""Which settings to change: sentences for people. Only what was seen to help, mostly with runs in tests/recorded:

dead: elpv came to life by KoLeo alone (kl 0.07 to 1.9, k-NN +2 points); rate_5 by the preset's rate (demo).
shrinking: rate_02, of one direction (rank 1.2), has 2 by the preset's rate (demo) and 6 by KoLeo (rate_02_four).
slow: photos, fashion and demo at rate_02_four, fast_teacher_four and hot_teacher_four are above chance by these values (*_four).
Longer: demo at 1,000 steps is 8 points above the untrained net, at 200 it is 2 to 6.
"""


@dataclass(frozen=True)
class Facts:
    """What a judgement needs to know of a run besides its figures."""

    block_size: int  # S, those of the batch that join it among them
    steps: int  # after which the run ends
    directions: int = 128  # that the embeddings of a batch can have at most: of B images min(B - 1, D)
    warmup_epochs: float = 0.0  # while the rate rises nothing but what is not finite is judged
    min_kl: float = MIN_KL

    @classmethod
    def of(cls, settings: Mapping[str, Mapping[str, Any]]) -> "Facts":
        """Of a run's own settings by section, as in its config.toml, where every 'auto' is filled in. Old runs lack some."""
        memory, train = settings["memory"], settings["train"]
        joined = 2 * train["global_batch_size"] if settings.get("loss", {}).get("batch_slots") is True else 0
        warmup = settings.get("optim", {}).get("warmup_epochs", 0.0)
        return cls(
            block_size=memory["size"] // memory["num_blocks"] + joined,
            steps=min(train["steps"], train.get("stop_at") or train["steps"]),
            directions=min(train.get("global_batch_size", 129) - 1, settings.get("head", {}).get("dim", 128)),
            warmup_epochs=0.0 if warmup == "auto" else warmup,
            min_kl=settings.get("monitor", {}).get("min_kl") or MIN_KL,
        )


@dataclass(frozen=True)
class Finding:
    """A verdict on a run, and a sentence with the figures that it rests on."""

    verdict: Verdict
    finding: str

    @property
    def advice(self) -> str:
        return ADVICE[self.verdict]

    @property
    def text(self) -> str:
        return f"{self.finding} {self.advice}".strip()


def judge(lines: Sequence[Line], knn: Sequence[Line], facts: Facts) -> Finding | None:
    """The first verdict that applies, in the order of the checks below; None before there is a line, and where old versions did
    not measure all that is needed.

    Args:
        lines: of metrics.jsonl, one a step, in order; the last WINDOW of them are enough for all but `memorising`.
        knn: records of eval/knn_*.json, `untrained` among them; empty where images have no labels.
        facts: about the run.
    """
    if not lines or not NEEDED <= lines[-1].keys():
        return None
    last = lines[-1]
    if broken := not_finite(last):
        return Finding(Verdict.UNSTABLE, f"At step {last['step']:,} {broken} is {last[broken]}.")
    recent = [line for line in islice(reversed(lines), WINDOW) if line["epoch"] > facts.warmup_epochs]
    if len(recent) < WINDOW:
        return Finding(Verdict.HEALTHY, f"At step {last['step']:,} it is too early to tell more than that all figures are finite.")
    now = medians(recent)
    checks: dict[Verdict, Callable[[], str]] = {
        Verdict.UNSTABLE: lambda: _unstable(now, facts),
        Verdict.DEAD: lambda: _dead(now, facts),
        Verdict.SHRINKING: lambda: _shrinking(now, facts),
        Verdict.MEMORISING: lambda: _memorising(lines, knn),
        Verdict.SLOW: lambda: _slow(now, knn, facts) if last["step"] >= facts.steps else "",
    }
    for verdict, check in checks.items():
        if finding := check():
            return Finding(verdict, f"At step {last['step']:,} {finding}")
    return Finding(Verdict.HEALTHY, f"At step {last['step']:,} {_healthy(now, facts)}")


def not_finite(line: Line) -> str:
    """The first of the two figures that end a run which is not finite; empty where both are."""
    return next((name for name in ("loss", "grad_norm") if not math.isfinite(line.get(name, 0.0))), "")


def medians(lines: Sequence[Line]) -> dict[str, float]:
    """Of each figure that a verdict rests on."""
    return {name: median(line[name] for line in lines) for name in NEEDED}


def informed(line: Line, block_size: int) -> float:
    """ln S - teacher entropy: how much the teacher's answers tell; 0 where it holds all slots for alike."""
    return math.log(block_size) - line["teacher_entropy"]


def logit_variance(line: Line) -> float:
    """Half the variance of the teacher's logits over embeddings like those of the batch: what it tells by them, to first order.

    With covariance C, of two independent embeddings the inner product varies by tr(C^2) = spread^4 / effective rank around what
    their mean gives. Unlike the teacher's entropy it does not wait for a memory of K slots to be written anew, K / B steps.
    """
    return line["embedding_std"] ** 4 / (2 * max(1.0, line["effective_rank"]) * line["teacher_temp"] ** 2)


def is_dead(line: Line, block_size: int, min_kl: float) -> bool:
    """Whether the student has nothing left to learn from the teacher, and the teacher nothing to tell.

    Either alone is no death: a student may follow an informed teacher closely, most of all where the two temperatures are near
    each other, and the entropy of a teacher may be high while a student has much to learn.
    """
    if line["kl"] >= min_kl:
        return False
    return informed(line, block_size) < MIN_INFORMED * math.log(block_size) or logit_variance(line) < MIN_LOGIT_VARIANCE


def _unstable(now: Line, facts: Facts) -> str:
    uniform, loss = math.log(facts.block_size), now["kl"] + now["teacher_entropy"]
    if loss <= uniform + MAX_EXCESS:
        return ""
    return (
        f"the cross-entropy is {loss:.2f}, more than the {uniform:.2f} (ln S) that knowing nothing costs: the student is sure "
        "and wrong."
    )


def _dead(now: Line, facts: Facts) -> str:
    if not is_dead(now, facts.block_size, facts.min_kl):
        return ""
    return (
        f"the run is dead: student and teacher agree to {now['kl']:.3f} nats that all images are alike. The teacher tells "
        f"{informed(now, facts.block_size):.2f} of {math.log(facts.block_size):.2f} nats, the spread is {now['embedding_std']:.2f}."
    )


def _shrinking(now: Line, facts: Facts) -> str:
    if now["embedding_std"] < MIN_SPREAD:
        return f"the embeddings shrink to a point: their spread is {now['embedding_std']:.2f}, and 1 is evenly spread."
    if now["effective_rank"] < MIN_RANK and facts.directions >= FEW:
        return f"the embeddings shrink to a line: their effective rank is {now['effective_rank']:.1f} directions."
    return ""


def _memorising(lines: Sequence[Line], knn: Sequence[Line]) -> str:
    trained = _trained(knn)
    if not trained:
        return ""
    last, best = trained[-1], max(trained, key=lambda record: record["top1"])
    if best["top1"] - last["top1"] <= FALL * _error(best) or _around(lines, last["step"]) >= _around(lines, best["step"]):
        return ""
    return (
        f"k-NN is {last['top1']:.1%}, {100 * (best['top1'] - last['top1']):.1f} points below its best, {best['top1']:.1%} at step "
        f"{best['step']:,}, while the loss has gone on falling."
    )


def _around(lines: Sequence[Line], step: int) -> float:
    """Median of what the student could still learn in the steps up to this one; infinite where they are not known."""
    until = bisect_right(lines, step, key=lambda line: line["step"])
    near = [line["kl"] for line in lines[max(0, until - WINDOW) : until]]
    return median(near) if near else math.inf


def _slow(now: Line, knn: Sequence[Line], facts: Facts) -> str:
    """By k-NN where it is known, otherwise by what the student has learnt of the teacher."""
    untrained = next((record["top1"] for record in knn if record["features"] == "untrained"), None)
    late = [record for record in _trained(knn) if 2 * record["step"] >= facts.steps]
    if untrained is None or not late:
        told = informed(now, facts.block_size)
        if now["kl"] <= (1 - MIN_LEARNT) * told:
            return ""
        return (
            f"the student has learnt next to nothing: of the {told:.2f} nats that the teacher tells, {now['kl']:.2f} are left (kl)."
        )
    reached, error = mean(record["top1"] for record in late), _error(late[-1])
    if reached - untrained > NOISE * error:
        return ""
    return (
        f"k-NN has been {reached:.1%} over the second half, {100 * (reached - untrained):+.1f} points from the same net untrained: "
        f"that is not above chance, {100 * error:.1f} points with {late[-1].get('query_images', 0):,} test images."
    )


def _trained(knn: Sequence[Line]) -> list[Line]:
    return [record for record in knn if record["features"] not in ("pixels", "untrained")]


def _error(record: Line) -> float:
    """Standard error of a share of right answers; 0 where it is not known of how many."""
    images = record.get("query_images", 0)
    return math.sqrt(record["top1"] * (1 - record["top1"]) / images) if images else 0.0


def _healthy(now: Line, facts: Facts) -> str:
    return (
        f"the student learns: kl {now['kl']:.2f}, the teacher tells {informed(now, facts.block_size):.2f} of "
        f"{math.log(facts.block_size):.2f} nats, spread {now['embedding_std']:.2f}, rank {now['effective_rank']:.1f}."
    )
