"""AdamW with the recipe's groups, gradient clipping per tensor, and the teacher's moving average."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def build_optimizer(student: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: all parameters decay but biases and one-dimensional ones. Rate and decay are set each step."""
    named = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    fixed = [parameter for name, parameter in named if parameter.ndim < 2 or name.endswith(".bias")]
    decayed = [parameter for name, parameter in named if not (parameter.ndim < 2 or name.endswith(".bias"))]
    groups = [{"params": decayed, "decays": True}, {"params": fixed, "decays": False}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_per_parameter(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each parameter's gradient to a norm of at most `max_norm`; returns the norms before, (number of parameters,)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    factors = torch._foreach_add(norms, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, max_norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)
    return torch.stack(norms)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
