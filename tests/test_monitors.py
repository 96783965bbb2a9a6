"""Health of a run: a non-finite figure ends it at once, a collapse or a death after patience runs out."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.config import MonitorSection
from massl_ray.training.monitors import HealthMonitor
from massl_ray.training.verdict import ADVICE, Verdict

FINE = {
    "loss": 2.5, "grad_norm": 1.0, "embedding_std": 0.8, "effective_rank": 9.0, "kl": 0.5, "teacher_entropy": 2.0,
    "teacher_temp": 0.04, "epoch": 3.0,
}  # fmt: skip
DEAD = FINE | {"kl": 0.1, "teacher_entropy": 3.4, "embedding_std": 0.19}


def monitor(patience: int = 3, min_spread: float = 0.05, min_kl: float = 0.15, warmup_epochs: float = 0.0) -> HealthMonitor:
    config = MonitorSection(patience=patience, min_spread=min_spread, min_kl=min_kl)
    return HealthMonitor(config, block_size=32, warmup_epochs=warmup_epochs)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_ends_at_once(name, value):
    verdict = monitor().judge(17, FINE | {name: value})
    assert verdict is not None and verdict.status == "non_finite"
    assert verdict.message.startswith(f"Step 17: {name} is {value}.") and "optim.lr" in verdict.message


def test_other_figures_may_be_anything():
    assert monitor().judge(1, FINE | {"agreement": math.nan, "loss": -1e30, "grad_norm": 1e30}) is None


def test_non_finite_comes_before_collapse():
    verdict = monitor(patience=1).judge(1, DEAD | {"loss": math.nan, "embedding_std": 0.0})
    assert verdict is not None and verdict.status == "non_finite"


def test_collapse_by_hand():
    watch = monitor(patience=3)
    spreads = [0.04, 0.01, 0.05, 0.049, 0.02, 0.8, 0.0, 0.0, 0.0]  # 0.05 is not under the bound
    verdicts = [watch.judge(step, FINE | {"embedding_std": spread}) for step, spread in enumerate(spreads, 1)]
    assert verdicts[:8] == [None] * 8
    last = verdicts[8]
    assert last is not None and last.status == "collapsed"
    assert last.message.startswith("Step 9: the embeddings have collapsed.")
    for words in ("under 0.05", "for 3 steps", "now 0;", "loss is 2.500", "3.466", ADVICE[Verdict.SHRINKING]):
        assert words in last.message
    assert f"{math.log(32):.3f}" == "3.466"


@settings(deadline=None, max_examples=60)
@given(spreads=st.lists(st.sampled_from([0.01, 0.3]), max_size=30), patience=st.integers(1, 5))
def test_collapse_is_patience_steps_in_a_row(spreads, patience):
    watch = monitor(patience)
    for step, spread in enumerate(spreads):
        verdict = watch.judge(step, FINE | {"embedding_std": spread})
        row = spreads[max(0, step + 1 - patience) : step + 1]
        assert (verdict is not None) == (row == [0.01] * patience)


def test_a_bound_of_0_never_ends_a_run():
    watch = monitor(patience=1, min_spread=0.0)
    assert [watch.judge(step, FINE | {"embedding_std": 0.0}) for step in range(100)] == [None] * 100


def test_death_by_hand():
    watch = monitor(patience=3)
    kls = [0.1, 0.1, 0.15, 0.149, 0.12, 0.6, 0.1, 0.11, 0.09]  # 0.15 is not under the bound
    endings = [watch.judge(step, DEAD | {"kl": kl}) for step, kl in enumerate(kls, 1)]
    assert endings[:8] == [None] * 8
    last = endings[8]
    assert last is not None and last.status == "dead" and last.message.startswith("Step 9: the run is dead. For 3 steps")
    for words in ("less than 0.15 nats", "now 0.090", "0.07 of 3.47 nats", "spread is 0.19", ADVICE[Verdict.DEAD]):
        assert words in last.message


@pytest.mark.parametrize(
    "change",
    [
        {"kl": 0.2},  # the student has something to learn
        {"teacher_entropy": 3.0, "embedding_std": 0.7},  # the teacher tells images apart: the student follows it closely
        {"epoch": 0.5},  # the rate still rises
    ],
)
def test_what_is_no_death(change):
    watch = monitor(patience=3, warmup_epochs=1.0)
    assert [watch.judge(step, DEAD | change) for step in range(1, 50)] == [None] * 49
    assert watch.judge(50, DEAD) is watch.judge(51, DEAD) is None and watch.judge(52, DEAD) is not None


def test_old_rows_of_the_memory_hide_no_death():
    """A teacher that tells new embeddings from the random rows of the start tells nothing of images: its entropy is low until the
    memory is written anew, but the spread and rank of its embeddings say so at once. By hand: 0.19^4 / (2 * 9 * 0.04^2) = 0.05."""
    told = DEAD | {"teacher_entropy": 2.5}
    watch = monitor(patience=3)
    assert [watch.judge(step, told) is not None for step in (1, 2, 3)] == [False, False, True]
    wider, watch = told | {"embedding_std": 0.3}, monitor(patience=3)  # 0.28
    assert [watch.judge(step, wider) for step in range(9)] == [None] * 9


def test_a_run_on_its_way_out_is_left_alone():
    """Until what it can learn grows no more."""
    watch = monitor(patience=4)
    rising = [0.01 * 1.2**step for step in range(12)]
    assert [watch.judge(step, DEAD | {"kl": kl}) for step, kl in enumerate(rising)] == [None] * 12
    endings = [watch.judge(step, DEAD | {"kl": rising[-1]}) is not None for step in range(12, 16)]
    assert endings == [False, True, True, True]


def test_death_can_be_switched_off():
    watch = monitor(patience=1, min_kl=0.0)
    assert [watch.judge(step, DEAD | {"kl": 0.0}) for step in range(9)] == [None] * 9
