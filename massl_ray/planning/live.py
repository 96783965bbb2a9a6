"""Bytes of the tensors that are alive while something runs, also of tensors without memory (torch's fake ones): how much memory a
network would take is found in half a second, on a machine that could not hold it."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from massl_ray.config import Config
from massl_ray.method.network import Encoder, build_encoder


class Live(TorchDispatchMode):
    """Counts storages, each once however many views it has, from the operation that makes it until the last tensor lets go of it.
    What was there before is not counted, nor is what a kernel needs for itself.

    Attributes:
        bytes: alive now.
        peak: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, int] = {}  # storages by address: their bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):  # what was there before: known, at no cost
            if isinstance(tensor, Tensor):
                self._count(tensor, new=False)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor, new=True)
        return made

    def _count(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.known:
            return
        self.known[address] = size = storage.nbytes() if new else 0
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._let_go, address)

    def _let_go(self, address: int) -> None:
        self.bytes -= self.known.pop(address)


class FlashAttention(TorchFunctionMode):
    """Attention as a GPU computes it: no kernel keeps the matrix of all pairs of tokens. Without a GPU torch would choose one that
    does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **others) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def as_on(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Arithmetic of a device that need not be there: autocast to `dtype` (None: none), and a GPU's attention."""
    if device == "cpu":
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)  # torch.autocast refuses to where there is no such device
    torch.set_autocast_dtype(device, dtype or torch.bfloat16)
    try:
        with FlashAttention():
            yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def on_meta(config: Config) -> Encoder:
    """The student without memory, with no weights fetched."""
    plain = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    with torch.device("meta"):
        encoder = build_encoder(plain, drop_path=config.model.drop_path)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def view_shapes(config: Config, size: int) -> list[tuple[int, int, int, int]]:
    """Of the views of `size` images, a shape a resolution."""
    views, channels = config.views, config.data.channels
    sides = [(2 * size, views.global_size), (views.num_local * size, views.local_size)]
    return [(number, channels, side, side) for number, side in sides if number]
