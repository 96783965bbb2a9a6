"""The plain formulation of the method, as the reference to measure against: similarity matrices, columns gathered by block, a
softmax and a log-softmax per pair, the memory cloned, loops over parameters. Written from the method's description."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from massl_ray.method.network import Encoder
from massl_ray.method.step import StepSettings


def plain_readout(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    permutation: Tensor,
    *,
    num_views: int,
    block_size: int,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """The loss of `massl_ray.method.readout.readout_loss`, same arguments, by its definition."""
    memory = memory.clone()
    columns = permutation.view(-1, block_size)
    student_blocks = (student @ memory.T)[:, columns]  # (V*B, blocks, S)
    with torch.no_grad():
        teacher_blocks = (teacher @ memory.T)[:, columns]
    terms = []
    for i, student_view in enumerate(student_blocks.chunk(num_views)):
        for j, teacher_view in enumerate(teacher_blocks.chunk(2)):
            if i != j:
                target = softmax(teacher_view / teacher_temp, dim=-1)
                terms.append(-(target * log_softmax(student_view / student_temp, dim=-1)).sum(-1).mean())
    return torch.stack(terms).mean()


@dataclass
class PlainState:
    student: Encoder
    teacher: Encoder
    optimizer: torch.optim.Optimizer
    memory: Tensor  # (K, D)
    pointer: int = 0


def plain_optimizer(student: Encoder, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """torch's AdamW as it comes."""
    decayed = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    fixed = [parameter for parameter in student.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": fixed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def plain_step(state: PlainState, groups: Sequence[Tensor], settings: StepSettings, teacher_temp: float, momentum: float) -> float:
    """One training step on normalized views, as `massl_ray.method.step.train_step` takes it. Returns the loss."""
    num_views = 2 * sum(len(group) for group in groups) // len(groups[0])
    size = len(state.memory)
    permutation = torch.multinomial(torch.ones(size), size).to(state.memory.device)
    with torch.autocast(settings.device.type, dtype=settings.autocast or torch.bfloat16, enabled=settings.autocast is not None):
        with torch.no_grad():
            targets = state.teacher(groups[:1])
        embeddings = state.student(groups)
        loss = plain_readout(
            embeddings,
            targets,
            state.memory,
            permutation,
            num_views=num_views,
            block_size=settings.block_size,
            student_temp=settings.student_temp,
            teacher_temp=teacher_temp,
        )
    state.optimizer.zero_grad()
    loss.backward()
    for parameter in state.student.parameters():
        if parameter.grad is not None:
            factor = settings.clip_norm / (parameter.grad.norm(2).item() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
    state.optimizer.step()
    with torch.no_grad():
        for target, source in zip(state.teacher.parameters(), state.student.parameters(), strict=True):
            target.data.mul_(momentum).add_((1 - momentum) * source.detach().data)
        rows = targets.chunk(2)[1]
        updated = state.memory.clone()
        updated[state.pointer : state.pointer + len(rows)] = rows
        state.memory = updated
        state.pointer = (state.pointer + len(rows)) % size
    return loss.item()
