"""Health of a run: a non-finite figure ends it at once, a collapse after patience runs out."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.config import MonitorSection
from massl_ray.training.monitors import HealthMonitor

FINE = {"loss": 2.5, "grad_norm": 1.0, "embedding_std": 0.8}


def monitor(patience: int = 3, min_spread: float = 0.05) -> HealthMonitor:
    return HealthMonitor(MonitorSection(patience=patience, min_spread=min_spread), block_size=32)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_ends_at_once(name, value):
    verdict = monitor().judge(17, FINE | {name: value})
    assert verdict is not None and verdict.status == "non_finite"
    assert verdict.message.startswith(f"Step 17: {name} is {value}.") and "optim.lr" in verdict.message


def test_other_figures_may_be_anything():
    assert monitor().judge(1, FINE | {"effective_rank": math.nan, "loss": -1e30, "grad_norm": 1e30}) is None


def test_non_finite_comes_before_collapse():
    verdict = monitor(patience=1).judge(1, {"loss": math.nan, "grad_norm": 1.0, "embedding_std": 0.0})
    assert verdict is not None and verdict.status == "non_finite"


def test_collapse_by_hand():
    watch = monitor(patience=3)
    spreads = [0.04, 0.01, 0.05, 0.049, 0.02, 0.8, 0.0, 0.0, 0.0]  # 0.05 is not under the bound
    verdicts = [watch.judge(step, FINE | {"embedding_std": spread}) for step, spread in enumerate(spreads, 1)]
    assert verdicts[:8] == [None] * 8
    last = verdicts[8]
    assert last is not None and last.status == "collapsed"
    assert last.message.startswith("Step 9: the embeddings have collapsed.")
    for words in ("under 0.05", "for 3 steps", "now 0;", "loss is 2.500", "3.466", "memory.size", "loss.teacher_temp"):
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
