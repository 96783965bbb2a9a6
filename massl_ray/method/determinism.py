"""The same bits each time on a GPU, where torch by itself adds in whatever order its threads come.

On CPUs nothing of this is needed. What is not covered: another kind of GPU, another version of torch or of CUDA.
"""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode


def compute_alike(device: torch.device) -> None:
    """Have this process choose deterministic kernels on `device`. Call before the first product on it; holds for the process.

    Operations that have none raise RuntimeError from then on.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)  # no warn_only: attention would then stay as it is
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it would fill all new memory
        torch.backends.cudnn.benchmark = False


def resize_alike(backbone: nn.Module) -> None:
    """Have timm's transformers resize their position embeddings by matrix products."""
    for module in backbone.modules():
        if hasattr(module, "_pos_embed"):
            setattr(module, "_pos_embed", partial(_by_products, module._pos_embed))  # noqa: B010


def _by_products(embed: Any, *args: Any, **kwargs: Any) -> Any:
    with _ResizeByProducts():
        return embed(*args, **kwargs)


class _ResizeByProducts(TorchFunctionMode):
    """Antialiased resizing inside this context: torch has no deterministic backward of it on CUDA. Around a whole backbone it would
    cost half a step in Python."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is interpolate and kwargs and kwargs.get("antialias") and kwargs.get("size") is not None:
            return resize(args[0] if args else kwargs["input"], tuple(kwargs["size"]), kwargs["mode"])
        return function(*args, **(kwargs or {}))


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """(n, c, h, w) to (n, c, *size), as torch.nn.functional.interpolate(antialias=True) does it, which is linear and separable."""
    down, across = (_matrix(before, after, mode, images) for before, after in zip(images.shape[2:], size, strict=True))
    return down @ images @ across.mT


def _matrix(before: int, after: int, mode: str, like: Tensor) -> Tensor:
    """(after, before): what resizing makes of each unit vector."""
    with torch.no_grad():
        unit = torch.eye(before, device=like.device, dtype=like.dtype).view(1, 1, before, before)
        return interpolate(unit, size=(after, before), mode=mode, antialias=True)[0, 0]


def names_no_deterministic_way(error: RuntimeError) -> bool:
    """Whether torch refused an operation because it has none."""
    return "does not have a deterministic implementation" in str(error)
