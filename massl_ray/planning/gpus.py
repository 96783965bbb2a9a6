"""GPUs that clouds rent out: memory and peak rates, from their makers' data sheets, and what training makes of them."""

import difflib
from dataclasses import dataclass

from massl_ray.errors import UserError

PRODUCTS = 0.8
"""Share of a GPU's peak that its matrix products reach: 7.7e14 of 9.9e14 on an H100 (benchmarks/step_h100.json)."""
TRAFFIC = 22.0
"""How often a step moves each byte of what a micro-batch keeps for its backward pass and adds to that: fitted, with PRODUCTS, to
steps of ViT-S and ViT-B on an H100, whose times it gives within 11 % (tests/test_plan.py). Training mostly waits for memory."""


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know. Rates are of dense products, in 1e12 operations a second, two a multiply-add."""

    name: str
    memory_gib: float  # as torch.cuda.get_device_properties says, rounded down: a little less than the name promises
    tflops_16bit: float  # with sums in fp32: bf16, or fp16 where there is no bf16
    tflops_fp32: float  # without TF32, which torch leaves off
    gb_per_s: float  # of its memory
    has_bf16: bool = True

    def flops_per_s(self, precision: str) -> float:
        """Peak rate in 'bf16' or 'fp32'. Without units for bf16 torch computes it no faster than fp32."""
        return 1e12 * (self.tflops_16bit if precision == "bf16" and self.has_bf16 else self.tflops_fp32)

    def images_per_s(self, precision: str, flops: float, kept_bytes: float) -> float:
        """Of a network that does so many operations and keeps so many bytes for an image."""
        return 1 / (flops / (PRODUCTS * self.flops_per_s(precision)) + TRAFFIC * kept_bytes / (1e9 * self.gb_per_s))


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 14.5, 65, 8.1, 320, has_bf16=False),  # NVIDIA T4 data sheet: mixed precision (fp16) 65, fp32 8.1
        Gpu("V100-16GB", 15.7, 125, 15.7, 900, has_bf16=False),  # V100 data sheet, SXM2: tensor (fp16) 125, fp32 15.7
        Gpu("V100-32GB", 31.7, 125, 15.7, 900, has_bf16=False),
        Gpu("A10", 22.0, 125, 31.2, 600),  # A10 data sheet: bf16 125 (250 with sparsity), fp32 31.2
        Gpu("A10G", 22.0, 70, 31.5, 600),  # AWS's own (EC2 G5): bf16 70 (140 with sparsity), fp32 31.5
        Gpu("L4", 22.0, 121, 30.3, 300),  # L4 data sheet: bf16 242 with sparsity, fp32 30.3
        Gpu("L40S", 44.3, 362, 91.6, 864),  # L40S data sheet: bf16 362 (733 with sparsity), fp32 91.6
        Gpu("A100-40GB", 39.4, 312, 19.5, 1555),  # A100 data sheet: bf16 312 (624 with sparsity), fp32 19.5
        Gpu("A100-80GB", 79.1, 312, 19.5, 2039),
        Gpu("H100", 79.1, 989, 67, 3350),  # H100 data sheet, SXM: bf16 1,979 with sparsity, fp32 67
        Gpu("H200", 139.7, 989, 67, 4800),  # H200 data sheet, SXM: the same units
        Gpu("B200", 178.0, 2250, 75, 8000),  # HGX B200 data sheet, a GPU of eight: bf16 4,500 with sparsity, fp32 75
        Gpu("RTX 3090", 23.5, 71, 35.6, 936),  # GA102 white paper: bf16 with fp32 sums 71, fp32 35.6
        Gpu("RTX 4090", 23.5, 165, 82.6, 1008),  # Ada white paper: bf16 with fp32 sums 165.2, fp32 82.6
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError for one that is not in the table."""
    if name not in GPUS:
        near = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0.5)
        hint = f"; the nearest is '{near[0]}'" if near else ""
        raise UserError(
            f"massl-ray knows no GPU '{name}'{hint}. Give the images a second of one GPU as --rate; or name it, as label "
            f"massl-ray/gpu of a cluster file, one of {', '.join(GPUS)}."
        )
    return GPUS[name]


def recognized(device_name: str, memory_gib: float) -> Gpu | None:
    """The GPU that a driver calls, say, 'NVIDIA A100-SXM4-80GB'; of a name in several sizes that of its memory."""
    words = device_name.upper().replace("-", " ").split()
    alike = [gpu for gpu in GPUS.values() if set(gpu.name.upper().split("-")[0].split()) <= set(words)]
    return min(alike, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)
