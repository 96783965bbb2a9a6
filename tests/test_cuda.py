"""What only a GPU can show; passed over where there is none. Needs no Ray."""

from pathlib import Path

import numpy as np
import pytest
import torch

from massl_ray.benches.step import IMAGES, SCHEDULE, _config
from massl_ray.config import ViewsSection, resolve
from massl_ray.method.determinism import compute_alike
from massl_ray.method.device_views import device_views, padded
from massl_ray.method.memory import block_permutation
from massl_ray.method.network import drop_path_draws
from massl_ray.method.readout import readout_loss
from massl_ray.method.step import METRICS, Batch, MicroBatch, train_step
from massl_ray.method.views import draw_views
from massl_ray.training.collectives import Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.state import build_state, from_tensors, state_sha256, step_settings, to_tensors
from tests.helpers import photograph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda", 0)
GOLDEN = sorted((Path(__file__).parent / "golden").glob("readout_*.npz"))


@pytest.fixture
def alike():
    compute_alike(CUDA)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_readout(path: Path):
    """The fused kernel rounds queries and rows to fp16: the loss within 2e-4 of float64, the gradient within 1 %."""
    golden = np.load(path)
    names = ("student", "teacher", "memory_before")
    student, teacher, memory = (torch.from_numpy(golden[name]).to(CUDA, torch.float32) for name in names)
    options = {name: golden[name].item() for name in ("num_views", "block_size", "student_temp", "teacher_temp")}
    student.requires_grad_()
    result = readout_loss(student, teacher, memory, torch.from_numpy(golden["permutation"]).to(CUDA), **options)
    (grad,) = torch.autograd.grad(result.loss, student)
    assert result.loss.item() == pytest.approx(golden["loss"].item(), rel=2e-4)
    expected = torch.from_numpy(golden["grad_student"])
    assert (grad.cpu().double() - expected).norm() <= 1e-2 * expected.norm()


def trained(device: torch.device, steps: int, backbone: str, precision: str, batch_norm: bool = False) -> tuple[dict, list[float]]:
    """A state after some steps on noise, and the losses."""
    flags = {"model.backbone": backbone, "memory.size": 256, "memory.num_blocks": 4, "views.num_local": 2, "head.hidden_dim": 64}
    flags |= {"views.global_size": 64, "views.local_size": 32, "head.batch_norm": str(batch_norm).lower()}
    config = _config("vit_small", precision, 16, **flags | {"train.micro_batch_size": 4, "head.dim": 64})
    resolved = resolve(config, IMAGES)
    workers = Exact(Local(), resolved.num_micro_batches)
    state = build_state(config, resolved, device, workers)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        shapes = [(16, 2, 64, 64, 3), (16, 2, 32, 32, 3)]
        sides = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).split(4) for shape in shapes]
        draws = [drop_path_draws(state.student, 0, step, index, 4, 4) for index in range(4)]
        micro = [MicroBatch(g, v, None if d is None else d.to(device)) for g, v, d in zip(*sides, draws, strict=True)]
        batch = Batch(micro, block_permutation(0, step, 256, 64).to(device), 4)
        metrics = train_step(state, batch, SCHEDULE, step_settings(config, resolved, device), workers)
        losses.append(metrics[METRICS.index("loss")].item())
    return to_tensors(state), losses


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "test_byobnet", "convnext_atto"])
def test_the_same_bits_each_time(alike, backbone):
    hashes = {state_sha256(trained(CUDA, 4, backbone, "bf16", batch_norm=True)[0]) for _ in range(3)}
    assert len(hashes) == 1


def test_steps_follow_the_cpu(alike):
    _, on_gpu = trained(CUDA, 4, "vit_tiny_patch16_224", "fp32")
    _, on_cpu = trained(torch.device("cpu"), 4, "vit_tiny_patch16_224", "fp32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_a_state_goes_to_another_device_and_back(alike):
    tensors, _ = trained(CUDA, 1, "vit_tiny_patch16_224", "bf16")
    flags = {"memory.size": 256, "memory.num_blocks": 4, "head.hidden_dim": 64, "head.dim": 64, "views.global_size": 64}
    config = _config("vit_small", "bf16", 16, **flags | {"model.backbone": "vit_tiny_patch16_224", "views.local_size": 32})
    for device in (torch.device("cpu"), CUDA):
        state = build_state(config, resolve(config, IMAGES), device, Local())
        from_tensors(state, tensors)
        assert state_sha256(to_tensors(state)) == state_sha256(tensors)


def test_views_as_on_the_cpu():
    images = [torch.from_numpy(np.asarray(photograph(*size)).copy()) for size in ((160, 120), (90, 140))]
    config = ViewsSection(global_size=64, local_size=48)
    drawn = [draw_views(config, *reversed(image.shape[:2]), seed=0, epoch=0, sample=number) for number, image in enumerate(images)]
    for first, last in ((0, 2), (2, 12)):
        views = [row[first:last] for row in drawn]
        made = [device_views(padded(images, device), [1, 1], views).cpu().float() for device in (torch.device("cpu"), CUDA)]
        assert (made[0] - made[1]).abs().mean() < 0.05
