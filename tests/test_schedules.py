"""Schedules: against golden arrays, hand-computed values, and in units of images."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_ray.config import resolve, validate
from massl_ray.method.schedules import cosine, schedule_at

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")


@pytest.mark.parametrize("case", sorted(name for name in GOLDEN if not name.endswith("_args")))
@pytest.mark.parametrize("batch", [1, 48])
def test_golden(case, batch):
    base, final, epochs, steps_per_epoch, warmup_epochs, start = GOLDEN[f"{case}_args"].tolist()
    images_an_epoch = steps_per_epoch * batch
    values = [
        cosine(step * batch, base, final, epochs * images_an_epoch, warmup_epochs * images_an_epoch, start, batch)
        for step in range(len(GOLDEN[case]))
    ]
    assert len(values) == epochs * steps_per_epoch
    np.testing.assert_allclose(values, GOLDEN[case], rtol=1e-12, atol=1e-18)


def test_hand_computed():
    assert cosine(0, 1.0, 0.2, 100) == 1.0
    assert cosine(50, 1.0, 0.2, 100) == pytest.approx(0.6)
    assert cosine(25, 1.0, 0.2, 100) == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert cosine(100, 1.0, 0.2, 100) == pytest.approx(0.2)
    assert [cosine(i, 1.0, 0.0, 100, warmup=40, start=0.4, batch=10) for i in (0, 10, 20, 30, 40)] == pytest.approx(
        [0.4, 0.6, 0.8, 1.0, 1.0]
    )
    assert cosine(70, 1.0, 0.0, 100, warmup=40, batch=10) == pytest.approx(0.5)  # halfway between 40 and 100


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_stays_between_its_ends_and_starts_at_the_start(steps, batch, share, base, final, start):
    total = steps * batch
    warmup = share * total
    values = [cosine(step * batch, base, final, total, warmup, start, batch) for step in range(steps)]
    low, high = min(base, final, start), max(base, final, start)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert values[0] == pytest.approx(start if warmup > 0 else base)


def config(batch: int, steps: int):
    return validate(
        {
            "loss": {"teacher_temp_start": 0.04, "teacher_temp": 0.07, "teacher_temp_epochs": 1.0},
            "optim": {
                "lr": 0.01,
                "lr_final": 0.001,
                "warmup_epochs": 2.0,
                "weight_decay": 0.1,
                "weight_decay_final": 0.5,
                "teacher_momentum": 0.9,
                "teacher_momentum_final": 1.0,
            },
            "train": {"global_batch_size": batch, "steps": steps},
        }
    )


def test_schedule_at_hand_computed():
    """100 images, batches of 10: an epoch is 10 steps, the run 40, its warm-up 20; the peak rate is 0.01 * 10 / 256."""
    settings_ = config(batch=10, steps=40)
    resolved = resolve(settings_, 100)
    peak = 0.01 * 10 / 256

    first = schedule_at(0, settings_, resolved)
    assert (first.images_seen, first.lr, first.teacher_temp) == (0, 0, 0.04)
    assert (first.weight_decay, first.teacher_momentum) == pytest.approx((0.1, 0.9))

    third = schedule_at(3, settings_, resolved)
    assert third.images_seen == 30
    assert third.lr == pytest.approx(peak * 3 / 19)
    assert third.teacher_temp == pytest.approx(0.04 + 0.03 * 3 / 9)

    assert schedule_at(9, settings_, resolved).teacher_temp == pytest.approx(0.07)
    assert schedule_at(19, settings_, resolved).lr == pytest.approx(peak)

    middle = schedule_at(20, settings_, resolved)
    assert middle.lr == pytest.approx(peak)
    assert middle.weight_decay == pytest.approx(0.3)
    assert middle.teacher_momentum == pytest.approx(0.95)
    assert middle.teacher_temp == pytest.approx(0.07)

    late = schedule_at(30, settings_, resolved)
    assert late.lr == pytest.approx((peak + 0.001) / 2)
    assert late.weight_decay == pytest.approx(0.5 - 0.4 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert late.teacher_momentum == pytest.approx(1.0 - 0.1 * (1 + math.cos(0.75 * math.pi)) / 2)


def test_same_images_seen_same_values_at_another_batch_size():
    small, large = config(batch=10, steps=40), config(batch=20, steps=20)
    for step in (10, 13, 19):  # past the warm-up, which ends a batch early
        one = schedule_at(2 * step, small, resolve(small, 100))
        other = schedule_at(step, large, resolve(large, 100))
        for name in ("images_seen", "weight_decay", "teacher_momentum", "teacher_temp"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-13), name
