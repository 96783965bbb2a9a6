"""What there is to compute for an image: operations of the device, and seconds of a CPU for its views."""

from dataclasses import dataclass

from massl_ray.config import Config, Resolved

VIEWS_S = 2.273e-3
"""CPU seconds of one core to decode a photograph of 500 x 375 px and make the recipe's views of it: benchmarks/views_cpu.json."""
DECODE_S = 0.65e-3
"""Of these, what decoding takes (docs/log.md): all there is to do where the views are made on the GPU."""
RECIPE_PIXELS = 2 * 224**2 + 10 * 96**2
CPU_FLOPS_PER_S = {"fp32": 1.52e11, "bf16": 2.45e11}
"""Of a whole step of ViT-S, a core (AMD EPYC): half of matmul_flops_per_s x matmul_share of benchmarks/step_cpu.json."""


@dataclass(frozen=True)
class Work:
    """Of one image."""

    flops: float  # operations, two a multiply-add, of everything that student, teacher and read-out do
    cpu_s: float  # seconds of one CPU to decode it and make its views
    view_bytes: int  # of its views as levels, which travel to the worker


def readout_flops(views: int, batch: int, size: int, dim: int) -> int:
    """Two matrix products (logits, read-out) of (V + 2) B queries with K rows of width D, two operations a multiply-add."""
    return 2 * 2 * (views + 2) * batch * size * dim


def step_flops(config: Config, resolved: Resolved) -> dict[str, int]:
    """Operations of one step, two a multiply-add: matrix products, attention and convolutions of student (forward and
    backward) and teacher (forward) as torch.utils.flop_counter counts them on meta tensors, and the memory's two reads."""
    import torch  # late: the benches measure memory, and need only readout_flops
    from torch.utils.flop_counter import FlopCounterMode

    from massl_ray.planning.live import on_meta, view_shapes

    encoder, times = on_meta(config), resolved.num_micro_batches
    with torch.device("meta"):
        groups = [torch.empty(shape) for shape in view_shapes(config, resolved.micro_batch_size)]
        with FlopCounterMode(display=False) as student:
            encoder.head(torch.cat([encoder.backbone(group) for group in groups])).sum().backward()
        with FlopCounterMode(display=False) as teacher, torch.no_grad():
            encoder.head(encoder.backbone(groups[0]))
    return {
        "student": times * student.get_total_flops(),
        "teacher": times * teacher.get_total_flops(),
        "readout": readout_flops(2 + config.views.num_local, resolved.batch_size, resolved.memory_size, config.head.dim),
    }


def work(config: Config, resolved: Resolved, cpu_s: float | None = None) -> Work:
    """`cpu_s`: where it was measured; otherwise of photographs of 500 px, by the views' pixels."""
    pixels = 2 * config.views.global_size**2 + config.views.num_local * config.views.local_size**2
    making = 0.0 if config.views.device == "cuda" else (VIEWS_S - DECODE_S) * pixels / RECIPE_PIXELS
    flops = sum(step_flops(config, resolved).values()) / resolved.batch_size
    return Work(flops, DECODE_S + making if cpu_s is None else cpu_s, pixels * config.data.channels)
