"""The state of training: how it starts, and its world-size-free form on disk and in hashes."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from massl_ray.config import Config, Resolved
from massl_ray.method.determinism import resize_alike
from massl_ray.method.memory import Memory
from massl_ray.method.network import build_encoder
from massl_ray.method.optim import build_optimizer
from massl_ray.method.products import use_onednn
from massl_ray.method.step import State, StepSettings
from massl_ray.training.collectives import Distributed, Local


def build_state(config: Config, resolved: Resolved, device: torch.device, collectives: Local | Distributed) -> State:
    """The state before the first step: a pure function of the configuration. The teacher starts as the student."""
    student = build_encoder(config, drop_path=config.model.drop_path)
    teacher = build_encoder(config)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    for encoder in (student, teacher):
        encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        choose_attention(encoder.backbone, device, config.train.precision)
        if config.elastic.exact and device.type == "cuda":
            resize_alike(encoder.backbone)
        if config.train.compile:
            encoder.backbone.compile(dynamic=False)  # a kernel a resolution
        elif device.type == "cpu":
            use_onednn(encoder)
    dtype = getattr(torch, config.memory.dtype)
    memory = Memory(resolved.memory_size, config.head.dim, seed=config.run.seed, device=device, dtype=dtype)
    return State(student, teacher, build_optimizer(student), memory, collectives.wrap(student))


def choose_attention(backbone: torch.nn.Module, device: torch.device, precision: str) -> None:
    """timm's fused attention everywhere but on CPUs in bf16, where plain matrix products are faster (docs/log.md)."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", not (device.type == "cpu" and precision == "bf16"))  # noqa: B010


def step_settings(config: Config, resolved: Resolved, device: torch.device) -> StepSettings:
    return StepSettings(
        mean=config.data.mean,
        std=config.data.std,
        block_size=resolved.block_size,
        student_temp=config.loss.student_temp,
        koleo_weight=resolved.koleo_weight,
        batch_slots=resolved.batch_slots,
        clip_norm=config.optim.clip_norm,
        autocast=torch.bfloat16 if config.train.precision == "bf16" else None,
        device=device,
    )


def to_tensors(state: State) -> dict[str, Tensor]:
    """Everything that training changes, by name, on the CPU. Nothing in it depends on the number of workers."""
    tensors = {f"student/{name}": value for name, value in state.student.state_dict().items()}
    tensors |= {f"teacher/{name}": value for name, value in state.teacher.state_dict().items()}
    for name, parameter in state.student.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors["memory/rows"] = state.memory.rows
    tensors["memory/pointer"] = torch.tensor(state.memory.pointer)
    tensors["step"] = torch.tensor(state.step)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def from_tensors(state: State, tensors: Mapping[str, Tensor]) -> None:
    """Put a stored state back, in place. Raises KeyError or RuntimeError where it does not fit."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    state.student.load_state_dict(part("student/"))
    state.teacher.load_state_dict(part("teacher/"))
    for name, parameter in state.student.named_parameters():
        moments = part(f"optimizer/{name}/")
        if moments:
            state.optimizer.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in moments.items()}
    state.memory.rows.copy_(tensors["memory/rows"])
    state.memory.pointer = int(tensors["memory/pointer"])
    state.step = int(tensors["step"])


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy beside the parameter. The fused optimizer walks parameter and moments in memory order, so their strides must agree."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """One hash over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value.reshape(-1).view(torch.uint8).numpy()).data)
    return digest.hexdigest()
