"""What a worker keeps in memory, worked out from the configuration alone: networks run on tensors without memory."""

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from massl_ray.config import Config, Resolved
from massl_ray.data.order import worker_share
from massl_ray.method.readout import readout_loss
from massl_ray.planning.live import Live, as_on, on_meta, view_shapes

CUDA_BYTES = 1 << 30
"""What a process takes of a GPU beside its tensors: context, kernels, workspaces of the libraries, NCCL's buffers. A guess."""
CPU_BYTES = 850_000_000
"""What a worker's process and its feeder take of a machine's memory beside tensors (docs/elasticity.md)."""
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes in a worker's device memory. What depends on the number of workers is in `of_worker`."""

    state: int  # student, teacher and AdamW's two moments
    memory_bank: int
    gradients: int
    pixels: int  # of all micro-batches of a step, normalized
    activations: int  # that one micro-batch keeps for its backward pass, and the most that this pass adds
    readout: int  # working memory of the loss
    overhead: int  # of the process

    @property
    def total(self) -> int:
        return self.state + self.memory_bank + self.gradients + self.pixels + self.activations + self.readout + self.overhead


def footprint(config: Config, resolved: Resolved, device: str) -> Footprint:
    """Of a worker on 'cuda' or 'cpu' with one micro-batch, alone."""
    encoder = on_meta(config)
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    all_values = sum(value.nbytes for value in encoder.state_dict().values())
    kept, extra = activation_bytes(config, resolved.micro_batch_size, device)
    return Footprint(
        state=2 * all_values + 2 * 4 * trained,
        memory_bank=resolved.memory_size * config.head.dim * BYTES[config.memory.dtype],
        gradients=4 * trained,
        pixels=micro_batch_pixels(config, resolved.micro_batch_size),
        activations=kept + extra,
        readout=readout_bytes(config, resolved, device),
        overhead=CUDA_BYTES if device == "cuda" else CPU_BYTES,
    )


def of_worker(alone: Footprint, config: Config, resolved: Resolved, world_size: int) -> Footprint:
    """The largest of `world_size` workers: its share of the micro-batches, and the sums of gradients that wait in it."""
    shares = [worker_share(rank, world_size, resolved.num_micro_batches) for rank in range(world_size)]
    waiting = 1.0  # sets of gradients
    if config.elastic.exact:
        waiting = max(sums_that_wait(shares, resolved.num_micro_batches))
    most = max(last - first for first, last in shares)
    return replace(alone, pixels=most * alone.pixels, gradients=round(waiting * alone.gradients))


def sums_that_wait(shares: list[tuple[int, int]], num_micro_batches: int) -> list[float]:
    """Sets of gradients that exact sums keep in each worker: its own sums, and its slice of what the others end with."""
    left = [_nodes(*share, num_micro_batches) for share in shares]
    own = [max(_nodes(first, stop, num_micro_batches) for stop in range(first + 1, last + 1)) for first, last in shares]
    return [most + (sum(left) - ends) / len(shares) for most, ends in zip(own, left, strict=True)]


def activation_bytes(config: Config, micro_batch_size: int, device: str) -> tuple[int, int]:
    """(kept, extra) bytes: what the student keeps of one micro-batch after its forward pass, and what the backward pass adds to
    that at its peak, gradients of parameters left out. The latter is found on the CPU also for GPUs: torch's backward pass asks
    for the device."""
    kept, _ = _passes(config, micro_batch_size, device, backward=False)
    return kept, _passes(config, micro_batch_size, "cpu", backward=True)[1]


def micro_batch_pixels(config: Config, micro_batch_size: int) -> int:
    """Bytes of the normalized views, and of their levels where the device itself makes them."""
    values = sum(number * channels * height * width for number, channels, height, width in view_shapes(config, micro_batch_size))
    return values * (5 if config.views.device == "cuda" else 4)


def readout_bytes(config: Config, resolved: Resolved, device: str) -> int:
    """Peak of what the loss allocates for one micro-batch."""
    dim, views, size = config.head.dim, 2 + config.views.num_local, resolved.micro_batch_size
    with FakeTensorMode():
        student = torch.empty(views * size, dim, device=device, requires_grad=True)
        teacher = torch.empty(2 * size, dim, device=device)
        joined = resolved.read_size - resolved.block_size
        rows = torch.empty(resolved.memory_size + joined, dim, device=device, dtype=getattr(torch, config.memory.dtype))
        slots = torch.empty(resolved.num_blocks * resolved.read_size, device=device, dtype=torch.int64)
        with Live() as live:
            readout_loss(
                student,
                teacher,
                rows,
                slots,
                num_views=views,
                block_size=resolved.read_size,
                student_temp=config.loss.student_temp,
                teacher_temp=resolved.teacher_temp,
            )
    return live.peak


def _passes(config: Config, size: int, device: str, backward: bool) -> tuple[int, int]:
    """(bytes alive after the forward pass, the peak of everything above that)."""
    encoder = on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device=device)
        views = [torch.empty(shape, device=device, memory_format=torch.channels_last) for shape in view_shapes(config, size)]
        draws = torch.empty(len(encoder.drop_paths), sum(map(len, views)), device=device) if encoder.drop_paths else None
        for parameter in encoder.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with Live() as live:
            with as_on(device, torch.bfloat16 if config.train.precision == "bf16" else None):
                embeddings = encoder(views, draws)
            kept = live.bytes
            if backward:
                embeddings.sum().backward()
    return kept, live.peak - kept


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _nodes(first: int, last: int, num_leaves: int) -> int:
    """Sums left of the leaves [first, last) when siblings have been added, in a binary tree over all leaves."""
    end = 1 << (num_leaves - 1).bit_length() if last == num_leaves else last  # a node at the ragged edge counts as whole
    count = 0
    while first < last:
        width = 1
        while first % (2 * width) == 0 and first + 2 * width <= end:
            width *= 2
        first, count = first + width, count + 1
    return count
