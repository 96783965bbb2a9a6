"""Matrix products in fp32 on CPUs, by oneDNN.

torch sends fp32 products on a CPU to its BLAS (MKL), which on AMD processors reaches half of what oneDNN does on the same
machine (docs/log.md). These are the same products, in full fp32; everything but fp32 on a CPU goes torch's usual way.
"""

from typing import Any

import torch
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias, of (n, k), (m, k) and (m,). No gradient is recorded. Transposed views cost no copy."""
    if ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return nn.functional.linear(a, b, bias)


class Linear(nn.Linear):
    """torch.nn.Linear by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, rows = grads[0].reshape(-1, grads[0].shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.T).view_as(x) if needs_x else None,
            product(grad.T, rows.T) if needs_weight else None,
            grad.sum(0) if needs_bias and ctx.has_bias else None,
        )


def use_onednn(module: nn.Module) -> None:
    """Let every torch.nn.Linear in `module` compute by `product`; parameters and names stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
