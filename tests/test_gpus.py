"""The table of GPUs."""

import pytest

from massl_ray.errors import UserError
from massl_ray.planning.gpus import GPUS, gpu_named, recognized


def test_rates_by_precision():
    assert gpu_named("L4").flops_per_s("bf16") == 121e12 and gpu_named("L4").flops_per_s("fp32") == 30.3e12
    assert gpu_named("T4").flops_per_s("bf16") == gpu_named("T4").flops_per_s("fp32") == 8.1e12  # it has fp16 only


def test_the_table_is_plausible():
    for gpu in GPUS.values():
        assert 10 < gpu.memory_gib < 300 and 1.5 < gpu.tflops_16bit / gpu.tflops_fp32 < 40


def test_an_unknown_one_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="knows no GPU 'a100-80'; the nearest is 'A100-80GB'.*--rate"):
        gpu_named("a100-80")
    with pytest.raises(UserError, match="knows no GPU 'Gaudi'. Give"):
        gpu_named("Gaudi")


@pytest.mark.parametrize(
    ("driver", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A10G", 22.2, "A10G"),
        ("NVIDIA A10", 22.2, "A10"),
        ("NVIDIA L4", 22.2, "L4"),
        ("NVIDIA L40S", 44.5, "L40S"),
        ("Tesla T4", 14.6, "T4"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100-16GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 2080", 8.0, None),
    ],
)
def test_names_of_the_driver(driver, memory_gib, name):
    found = recognized(driver, memory_gib)
    assert (found.name if found else None) == name
