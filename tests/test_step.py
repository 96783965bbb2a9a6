"""Whole steps: against the golden trajectory, and against themselves cut into micro-batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from massl_ray.config import HeadSection
from massl_ray.method.collapse import alignment, memory_usage, signs_of_collapse
from massl_ray.method.memory import Memory
from massl_ray.method.network import Encoder, Head
from massl_ray.method.optim import build_optimizer
from massl_ray.method.readout import readout_loss
from massl_ray.method.schedules import Schedule
from massl_ray.method.step import METRICS, Batch, MicroBatch, State, StepSettings, prepare_views, train_step
from massl_ray.training.collectives import Local

TRAJECTORY = Path(__file__).parents[2] / "shared" / "golden" / "trajectory.npz"
SETTINGS = StepSettings((0, 0, 0), (1 / 255, 1 / 255, 1 / 255), 16, 0.1, 0.0, 3.0, None, torch.device("cpu"), torch.float64)


def tiny_encoder(batch_norm: bool = False) -> Encoder:
    backbone = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    return Encoder(backbone, Head(32, HeadSection(hidden_dim=64, dim=16, batch_norm=batch_norm))).double()


def state_of(student: Encoder, teacher: Encoder, memory: Memory) -> State:
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return State(student, teacher, build_optimizer(student), memory, student)


@pytest.mark.skipif(not TRAJECTORY.exists(), reason="the golden trajectory (4 MB) is not part of the repository")
def test_golden_trajectory():
    """Five optimizer steps of a tiny ViT: losses, final student and teacher, memory."""
    golden = np.load(TRAJECTORY)
    student = tiny_encoder()
    student.load_state_dict({key[5:]: torch.from_numpy(golden[key]) for key in golden if key.startswith("init/")}, strict=True)
    memory = Memory(64, 16, dtype=torch.float64)
    memory.rows.copy_(torch.from_numpy(golden["memory_before"]))
    state = state_of(student, tiny_encoder(), memory)
    for step in range(len(golden["losses"])):
        views = torch.from_numpy(golden["views"][step]).permute(1, 0, 3, 4, 2)
        batch = Batch([MicroBatch(views[:, :2], views[:, 2:], None)], torch.from_numpy(golden["permutations"][step]), 1)
        values = (float(golden[key][step]) for key in ("lr", "weight_decay", "ema_momentum", "teacher_temp"))
        metrics = train_step(state, batch, Schedule(0, *values), SETTINGS, Local())
        assert metrics[METRICS.index("loss")].item() == pytest.approx(golden["losses"][step], rel=1e-10)
    for prefix, encoder in (("final_student/", state.student), ("final_teacher/", state.teacher)):
        for name, value in encoder.state_dict().items():
            expected = torch.from_numpy(golden[prefix + name])
            assert (value - expected).norm() <= 1e-9 * expected.norm(), prefix + name
    np.testing.assert_allclose(state.memory.rows.numpy(), golden["memory_after"], rtol=1e-10, atol=1e-12)


def cut(images: int, size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    global_views = torch.randint(0, 256, (images, 2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    local_views = torch.randint(0, 256, (images, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)
    micro_batches = [MicroBatch(g, v, None) for g, v in zip(global_views.split(size), local_views.split(size), strict=True)]
    return Batch(micro_batches, torch.randperm(64, generator=generator), len(micro_batches))


def tiny_vit() -> Encoder:
    """Takes both resolutions of `cut`; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = timm.create_model("test_vit", num_classes=0, img_size=32, dynamic_img_size=True)
        return Encoder(backbone, Head(64, HeadSection(hidden_dim=32, dim=16))).double()


def run(size: int, steps: int = 3, settings: StepSettings = SETTINGS) -> State:
    state = state_of(tiny_vit(), tiny_vit(), Memory(64, 16, dtype=torch.float64))
    for step in range(steps):
        train_step(state, cut(8, size, seed=step), Schedule(0, 1e-3, 0.04, 0.9, 0.04), settings, Local())
    return state


def test_micro_batches_add_up():
    """Without layers that look across images, one batch of 8, 2 of 4 and 4 of 2 give the same state."""
    whole = run(8)
    for size in (4, 2):
        parts = run(size)
        for name, value in whole.student.state_dict().items():
            torch.testing.assert_close(parts.student.state_dict()[name], value, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(parts.memory.rows, whole.memory.rows, rtol=1e-9, atol=1e-11)
        assert parts.memory.pointer == whole.memory.pointer == 24


def test_the_batch_is_written_after_it_is_compared():
    """The first rows become the teacher's embeddings of the second global views; the loss is that against the rows before."""
    student, teacher = tiny_vit(), tiny_vit()
    state = state_of(student, teacher, Memory(16, 16, dtype=torch.float64))
    before = state.memory.rows.clone()
    batch = replace(cut(4, 4, 0), permutation=torch.arange(16))
    views = prepare_views(batch.micro_batches[0], SETTINGS)
    with torch.no_grad():
        targets, embeddings = state.teacher(views[:1]), state.student(views)
    options = {"num_views": 4, "block_size": 16, "student_temp": 0.1, "teacher_temp": 0.04}
    expected = readout_loss(embeddings, targets, before, batch.permutation, **options).loss
    metrics = train_step(state, batch, Schedule(0, 0.0, 0.0, 1.0, 0.04), SETTINGS, Local())
    torch.testing.assert_close(metrics[METRICS.index("loss")], expected)
    torch.testing.assert_close(state.memory.rows[:4], targets.chunk(2)[1])
    torch.testing.assert_close(state.memory.rows[4:], before[4:])


@pytest.mark.parametrize("size", [8, 4, 2])
def test_signs_of_collapse_are_of_the_teacher_and_of_the_memory_before(size):
    state, batch = run(8, steps=2), replace(cut(8, size, 2), permutation=torch.arange(64).roll(-8))
    with torch.no_grad():
        first, second = state.teacher(prepare_views(cut(8, 8, 2).micro_batches[0], SETTINGS)[:1]).chunk(2)
    state.memory.rows[:8], state.memory.rows[8:10] = second, second[:2]  # outside of the first block each finds itself
    before = state.memory.rows.clone()
    expected = torch.cat([alignment(first, second).unsqueeze(0), signs_of_collapse(second, before[8:24])])
    metrics = train_step(state, batch, Schedule(0, 1e-3, 0.04, 0.9, 0.04), SETTINGS, Local())
    names = ("alignment", "embedding_std", "effective_rank", "uniformity", "memory_usage")
    found = torch.stack([metrics[METRICS.index(name)] for name in names])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    others = [memory_usage(second, rows) for rows in (state.memory.rows[8:24], before, before[:16])]
    assert found[-1] < 0.9 and torch.stack(others).tolist() == pytest.approx([1, 1, 1]), "the test tells them apart"


def test_the_batch_is_compared_with_itself_where_settings_say_so():
    """The loss is that of a plain loop in which every block's softmax also runs over the teacher's rows of all images."""
    state = state_of(tiny_vit(), tiny_vit(), Memory(16, 16, dtype=torch.float64))
    memory, batch = (
        state.memory.rows.clone(),
        replace(cut(4, 2, 0), permutation=torch.randperm(16, generator=torch.Generator().manual_seed(1))),
    )
    whole = prepare_views(cut(4, 4, 0).micro_batches[0], SETTINGS)
    with torch.no_grad():
        teacher, student = state.teacher(whole[:1]).view(2, 4, -1), state.student(whole).view(4, 4, -1)
    losses = []
    for places in batch.permutation.split(8):
        rows = torch.cat([memory[places], teacher.flatten(0, 1)])
        for i, view in enumerate(student):
            for j, target in enumerate(teacher):
                if i != j:
                    wanted = (target @ rows.T / 0.04).softmax(1)
                    losses.append(-(wanted * (view @ rows.T / 0.1).log_softmax(1)).sum(1).mean())
    settings = replace(SETTINGS, block_size=8, batch_slots=True)
    metrics = train_step(state, batch, Schedule(0, 0.0, 0.0, 1.0, 0.04), settings, Local())
    assert metrics[METRICS.index("loss")].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    torch.testing.assert_close(state.memory.rows[:4], teacher[1])
    torch.testing.assert_close(state.memory.rows[4:], memory[4:])


def test_micro_batches_add_up_where_the_batch_joins_the_memory():
    """Each micro-batch is compared with the rows of the whole batch, whoever computed them."""
    settings = replace(SETTINGS, batch_slots=True)
    whole, *others = (run(size, settings=settings) for size in (8, 4, 2))
    for parts in others:
        for name, value in whole.student.state_dict().items():
            torch.testing.assert_close(
                parts.student.state_dict()[name], value, rtol=1e-6, atol=1e-7
            )  # AdamW divides by small moments
        torch.testing.assert_close(parts.memory.rows, whole.memory.rows, rtol=1e-6, atol=1e-8)
    assert (run(8).memory.rows - whole.memory.rows).norm() > 1e-3, "the batch makes a difference"


def test_the_gather_hides_behind_the_student():
    """It starts when the teacher is done and is waited for only when the memory is written, after the optimizer's step."""
    events: list[str] = []

    class Watched(Local):
        def start_gather(self, rows):
            events.append("start")
            return lambda: (events.append("wait"), rows)[1]

    student, teacher = tiny_vit(), tiny_vit()
    student.register_forward_pre_hook(lambda *_: events.append("student"))
    teacher.register_forward_hook(lambda *_: events.append("teacher"))
    state = state_of(student, teacher, Memory(64, 16, dtype=torch.float64))
    state.optimizer.register_step_post_hook(lambda *_: events.append("optimizer"))
    train_step(state, cut(8, 4, 0), Schedule(0, 1e-3, 0.0, 0.9, 0.04), SETTINGS, Watched())
    assert events == ["teacher", "teacher", "start", "student", "student", "optimizer", "wait"]


def test_prepare_views_is_view_major_and_normalized():
    global_views = torch.arange(2 * 2 * 8 * 8 * 3).remainder(256).to(torch.uint8).view(2, 2, 8, 8, 3)
    micro = MicroBatch(global_views, torch.empty(2, 0, 4, 4, 3, dtype=torch.uint8), None)
    settings = replace(SETTINGS, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    (group,) = prepare_views(micro, settings)
    for view in range(2):
        for image in range(2):
            pixels = global_views[image, view].double().permute(2, 0, 1) / 255
            expected = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
            torch.testing.assert_close(group[view * 2 + image], expected.double(), rtol=1e-6, atol=1e-6)
