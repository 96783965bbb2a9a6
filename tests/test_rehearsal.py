"""Rehearsal: it runs what a step runs, and leaves no trace."""

from unittest import mock

import pytest
import torch

from massl_ray.config import Config, resolve, validate
from massl_ray.training import rehearsal
from massl_ray.training.collectives import Local
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, state_sha256, to_tensors
from tests.helpers import listed


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(backbone: str, num_local: int) -> Config:
    return validate(
        {
            "views": {"global_size": 32, "local_size": 16, "num_local": num_local},
            "model": {"backbone": backbone, "drop_path": 0.2},
            "head": {"hidden_dim": 24, "dim": 8, "batch_norm": True},
            "memory": {"size": 20, "num_blocks": 2},
            "train": {"steps": 10, "global_batch_size": 12, "micro_batch_size": 3, "precision": "fp32"},
        }
    )


def run_of(settings: Config) -> Run:
    return Run(settings, resolve(settings, 60), listed("", []), None, None)


@pytest.mark.parametrize(("backbone", "num_local"), [("test_vit", 2), ("test_resnet", 2), ("test_resnet", 0)])
def test_state_is_as_before(backbone, num_local):
    run = run_of(config(backbone, num_local))
    state = build_state(run.config, run.resolved, torch.device("cpu"), Local())
    before, random = state_sha256(to_tensors(state)), torch.random.get_rng_state()
    seconds = rehearsal.rehearse(run, state, Local())
    assert state_sha256(to_tensors(state)) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in state.student.parameters())
    assert state.student.training and state.teacher.training
    assert seconds > 0


def test_runs_forward_backward_and_teacher_on_whole_micro_batches():
    run = run_of(config("test_resnet", 2))
    state = build_state(run.config, run.resolved, torch.device("cpu"), Local())
    seen: dict[str, list[list[int]]] = {"student": [], "teacher": [], "backward": []}
    state.student.head.register_forward_hook(lambda *call: seen["student"].append(list(call[2].shape)))
    state.teacher.head.register_forward_hook(lambda *call: seen["teacher"].append(list(call[2].shape)))
    state.student.backbone.conv1[0].weight.register_hook(lambda grad: seen["backward"].append(list(grad.shape)))
    rehearsal.rehearse(run, state, Local())
    assert seen["student"] == [[12, 8]] * 2  # 3 images, 4 views
    assert seen["teacher"] == [[6, 8]] * 2
    assert len(seen["backward"]) == 2


def test_estimate_is_the_second_time_by_the_share_of_a_worker():
    """The first round takes 100 s, the second 2 s; a worker alone has all four micro-batches, one of three has one."""
    run = run_of(config("test_resnet", 0))
    state = build_state(run.config, run.resolved, torch.device("cpu"), Local())
    for world_size, expected in ((1, 8.0), (3, 2.0)):
        collectives = Local()
        collectives.world_size = world_size
        with mock.patch.object(rehearsal, "time") as clock:
            clock.perf_counter.side_effect = [0.0, 100.0, 100.0, 102.0]
            assert rehearsal.rehearse(run, state, collectives) == expected
