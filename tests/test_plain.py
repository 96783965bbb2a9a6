"""The reference of the benches does the same work: same loss, same gradient, same step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from massl_ray.benches.plain import PlainState, plain_optimizer, plain_readout, plain_step
from massl_ray.config import load, resolve
from massl_ray.method.readout import readout_loss
from massl_ray.method.schedules import Schedule
from massl_ray.method.step import METRICS, Batch, MicroBatch, prepare_views, train_step
from massl_ray.training.collectives import Local
from massl_ray.training.state import build_state, step_settings
from tests.images import TINY


def test_readout():
    generator = torch.Generator().manual_seed(0)
    student, teacher, memory = (
        normalize(torch.randn(rows, 16, generator=generator, dtype=torch.float64), dim=1) for rows in (20, 8, 96)
    )
    permutation = torch.randperm(96, generator=generator)
    options = {"num_views": 5, "block_size": 24, "student_temp": 0.1, "teacher_temp": 0.04}
    student.requires_grad_()
    plain = plain_readout(student, teacher, memory, permutation, **options)
    ours = readout_loss(student, teacher, memory, permutation, **options).loss
    torch.testing.assert_close(plain, ours, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (plain, ours)), rtol=1e-9, atol=1e-12)


def test_step():
    """Three steps from the same weights and memory: same losses, same student, teacher and memory.

    One block, so that the two permutations do not matter.
    """
    flags = "--loss.recipe paper --memory.num_blocks 1 --model.drop_path 0 --train.micro_batch_size 8".split()
    config = load([*TINY, *flags])
    resolved = resolve(config, 48)
    settings = replace(step_settings(config, resolved, torch.device("cpu")), dtype=torch.float64)
    schedule = Schedule(0, lr=1e-3, weight_decay=0.04, teacher_momentum=0.9, teacher_temp=0.05)
    ours, twin = (build_state(config, resolved, torch.device("cpu"), Local()) for _ in range(2))
    for state in (ours, twin):
        state.student.double(), state.teacher.double()
        state.memory.rows = state.memory.rows.double()
    plain = PlainState(twin.student, twin.teacher, plain_optimizer(twin.student, 1e-3, 0.04), twin.memory.rows)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        shapes = [(8, 2, 32, 32, 3), (8, 2, 16, 16, 3)]
        micro = MicroBatch(*(torch.randint(0, 256, s, dtype=torch.uint8, generator=generator) for s in shapes), None)  # type: ignore[misc]
        metrics = train_step(ours, Batch([micro], torch.arange(64), 1), schedule, settings, Local())
        loss = plain_step(plain, prepare_views(micro, settings), settings, 0.05, 0.9)
        assert loss == pytest.approx(metrics[METRICS.index("loss")].item(), rel=1e-10)
    for reference, module in ((plain.student, ours.student), (plain.teacher, ours.teacher)):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(reference.state_dict()[name], value, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(plain.memory, ours.memory.rows, rtol=1e-8, atol=1e-9)
    assert plain.pointer == ours.memory.pointer
