"""What a worker keeps in memory, against arithmetic by hand and against a step that is really taken."""

import pytest
import torch

from massl_ray.benches.step import SCHEDULE
from massl_ray.config import Config, load, resolve
from massl_ray.method.memory import block_permutation
from massl_ray.method.network import drop_path_draws
from massl_ray.method.step import Batch, MicroBatch, train_step
from massl_ray.planning import estimate
from massl_ray.planning.estimate import CPU_BYTES, CUDA_BYTES, footprint, of_worker, sums_that_wait
from massl_ray.planning.live import Live
from massl_ray.training.collectives import Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.pairwise import fold
from massl_ray.training.state import build_state, step_settings, to_tensors

IMAGES = 1000


def config(backbone: str = "test_vit", **flags: object) -> Config:
    given = {
        "views.global_size": 48,
        "views.local_size": 32,
        "views.num_local": 2,
        "model.backbone": backbone,
        "head.hidden_dim": 24,
        "head.dim": 8,
        "memory.size": 64,
        "memory.num_blocks": 4,
        "train.global_batch_size": 24,
        "train.micro_batch_size": 6,
        "train.precision": "fp32",
    } | flags
    return load(["--preset", "vit_small", *(part for key, value in given.items() for part in (f"--{key}", str(value)))])


def test_bytes_by_hand():
    """Parameters in fp32: student, teacher and two moments, so 16 bytes each; buffers of student and teacher; memory rows."""
    settings = config("test_resnet")
    resolved = resolve(settings, IMAGES)
    student = build_state(settings, resolved, torch.device("cpu"), Local()).student
    numbers = sum(parameter.numel() for parameter in student.parameters())
    buffers = sum(buffer.nbytes for buffer in student.buffers())
    found = footprint(settings, resolved, "cuda")
    assert found.state == 16 * numbers + 2 * buffers
    assert found.gradients == 4 * numbers
    assert found.memory_bank == 64 * 8 * 4
    assert found.pixels == 6 * (2 * 48 * 48 + 2 * 32 * 32) * 3 * 4
    assert found.overhead == CUDA_BYTES and footprint(settings, resolved, "cpu").overhead == CPU_BYTES
    parts = (found.state, found.memory_bank, found.gradients, found.pixels, found.activations, found.readout, found.overhead)
    assert found.total == sum(parts)
    half = footprint(config("test_resnet", **{"memory.dtype": "bfloat16"}), resolved, "cuda")
    assert half.memory_bank == 64 * 8 * 2


def test_a_checkpoint_has_the_bytes_of_the_state():
    """But for the step counts of AdamW and of the run."""
    settings = config()
    resolved = resolve(settings, IMAGES)
    state = build_state(settings, resolved, torch.device("cpu"), Local())
    for parameter in state.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    size = sum(value.nbytes for name, value in to_tensors(state).items() if not name.endswith("step") and "pointer" not in name)
    found = footprint(settings, resolved, "cpu")
    assert found.state + found.memory_bank == size


def take_steps(settings: Config, device: torch.device, steps: int, around) -> None:
    """Training steps of one worker with exact sums; `around` is entered for each."""
    resolved = resolve(settings, IMAGES)
    workers = Exact(Local(), resolved.num_micro_batches)
    state = build_state(settings, resolved, device, workers)
    views, size = settings.views, resolved.micro_batch_size
    micro = []
    for index in range(resolved.num_micro_batches):
        pixels = [
            torch.zeros(size, number, side, side, 3, dtype=torch.uint8)
            for number, side in ((2, views.global_size), (views.num_local, views.local_size))
        ]
        draws = drop_path_draws(state.student, 0, 0, index, size, 2 + views.num_local)
        micro.append(MicroBatch(pixels[0], pixels[1], None if draws is None else draws.to(device)))
    slots = block_permutation(0, 0, resolved.memory_size, resolved.block_size).to(device)
    for _ in range(steps):
        with around():
            train_step(
                state, Batch(micro, slots, resolved.num_micro_batches), SCHEDULE, step_settings(settings, resolved, device), workers
            )


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_taken_needs_what_was_estimated(backbone, precision):
    """The peak of the tensors that a second step makes, beside the state and the sums that stay from step to step."""
    settings = config(
        backbone,
        **{"train.precision": precision, "views.global_size": 64, "train.global_batch_size": 96, "train.micro_batch_size": 24},
    )
    peaks = []

    class Around(Live):
        def __exit__(self, *exception):
            peaks.append(self.peak)
            return super().__exit__(*exception)

    take_steps(settings, torch.device("cpu"), 2, Around)
    resolved = resolve(settings, IMAGES)
    found = of_worker(footprint(settings, resolved, "cpu"), settings, resolved, 1)
    assert found.pixels + found.activations + found.readout == pytest.approx(peaks[1], rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_gpu(precision):
    """ViT-S at the recipe's views, 16 images at a time: what torch allocates at most, without the process's own."""
    settings = load(
        [
            "--preset",
            "vit_small",
            "--train.precision",
            precision,
            "--train.global_batch_size",
            "64",
            "--train.micro_batch_size",
            "16",
        ]
    )
    device = torch.device("cuda", 0)
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    take_steps(settings, device, 2, lambda: torch.cuda.device(device))
    resolved = resolve(settings, IMAGES)
    found = of_worker(footprint(settings, resolved, "cuda"), settings, resolved, 1)
    assert found.total - found.overhead == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.1)


def test_activations_grow_with_the_micro_batch_and_shrink_in_bf16():
    ones = [estimate.activation_bytes(config(), size, "cuda")[0] for size in (4, 8, 16)]
    assert ones[1] - ones[0] == pytest.approx((ones[2] - ones[1]) / 2, rel=0.01)  # linear, but for weights that are cast
    bf16 = estimate.activation_bytes(config(**{"train.precision": "bf16"}), 16, "cuda")[0]
    assert 0.4 * ones[2] < bf16 < 0.8 * ones[2]


def test_sums_that_wait_are_those_of_the_fold():
    for leaves in range(1, 25):
        for workers in range(1, min(leaves, 6) + 1):
            shares = [(rank * leaves // workers, (rank + 1) * leaves // workers) for rank in range(workers)]
            folds = [fold([(0, leaf) for leaf in range(*share)], leaves) for share in shares]
            for rank in range(workers):
                others = sum(len(each.left) for index, each in enumerate(folds) if index != rank)
                assert sums_that_wait(shares, leaves)[rank] == folds[rank].depth + others / workers


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_gradients_are_as_large_as_the_buckets_of_exact_sums(workers):
    settings = config()
    resolved = resolve(settings, IMAGES)
    student = build_state(settings, resolved, torch.device("cpu"), Local()).student
    sizes = []
    for rank in range(workers):
        collectives = Local()
        collectives.rank, collectives.world_size = rank, workers
        exact = Exact(collectives, resolved.num_micro_batches)
        exact.wrap(student)
        storages = {
            each.untyped_storage()._cdata: each.untyped_storage().nbytes() for b in exact.buckets for each in (b.rows, *b.slices)
        }
        sizes.append(sum(storages.values()))
    found = of_worker(footprint(settings, resolved, "cpu"), settings, resolved, workers)
    assert found.gradients == pytest.approx(max(sizes), rel=0.02)  # buckets are aligned
    plain = settings.model_copy(update={"elastic": settings.elastic.model_copy(update={"exact": False})})
    alone = footprint(plain, resolved, "cpu")
    assert of_worker(alone, plain, resolved, workers).gradients == alone.gradients


def test_weights_are_not_fetched(monkeypatch):
    """A model with pretrained weights has the size of one without."""
    import timm

    create, asked = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda name, **given: asked.append(given["pretrained"]) or create(name, **given))
    resolved = resolve(config(), IMAGES)
    assert footprint(config(**{"model.init": "pretrained"}), resolved, "cuda") == footprint(config(), resolved, "cuda")
    assert asked and not any(asked)
