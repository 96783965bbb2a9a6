"""`bench step`: a whole training step, ours beside the plain formulation, with the same networks on the same views."""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from massl_ray.benches.measure import alternate, extra_peak, in_fresh_process, machine, matmul_rate, median_ratio
from massl_ray.benches.plain import PlainState, plain_optimizer, plain_step
from massl_ray.config import Config, load, resolve
from massl_ray.method.memory import Memory, block_permutation
from massl_ray.method.network import Encoder, build_encoder, drop_path_draws
from massl_ray.method.schedules import Schedule
from massl_ray.method.step import Batch, MicroBatch, prepare_views, train_step
from massl_ray.planning.work import step_flops
from massl_ray.training.collectives import Local
from massl_ray.training.state import build_state, step_settings

IMAGES = 1_281_167  # of the recipes' data set
SCHEDULE = Schedule(images_seen=0, lr=1e-4, weight_decay=0.04, teacher_momentum=0.996, teacher_temp=0.04)


def run(device: torch.device, rounds: int = 7) -> dict[str, Any]:
    """fp32 and bf16 on a CPU; bf16 for ViT-S and ViT-B on CUDA. Time, peak memory, share of the matmul rate."""
    if device.type == "cuda":
        cases = {"vit_small_bf16": ("vit_small", "bf16", 64), "vit_base_bf16": ("vit_base", "bf16", 64)}
    else:
        cases = {"vit_small_fp32": ("vit_small", "fp32", 4), "vit_small_bf16": ("vit_small", "bf16", 4)}
    results = {name: _case(device, rounds, *case) for name, case in cases.items()}
    first = next(iter(results.values()))
    return {
        "name": "step",
        "work": "2 x 224 + 10 x 96 px, K=131072, S=16384, " + ", ".join(f"{name} B={case[2]}" for name, case in cases.items()),
        **machine(device),
        "ratio": first["time_ratio"],
        "time_ratio": first["time_ratio"],
        "memory_ratio": first["memory_ratio"],
        "matmul_share": first["matmul_share"],
        "cases": results,
    }


def _case(device: torch.device, rounds: int, preset: str, precision: str, batch: int) -> dict[str, Any]:
    config = _config(preset, precision, batch)
    plain, ours = calls(config, device)
    seconds = alternate({"plain": plain, "ours": ours}, device, rounds)
    del plain, ours
    peaks = {side: _peak(device, preset, precision, batch, side) for side in ("plain", "ours")}
    flops = step_flops(config, resolve(config, IMAGES))
    rate = matmul_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    ours_s = statistics.median(seconds["ours"])
    return {
        "reference_s": statistics.median(seconds["plain"]),
        "ours_s": ours_s,
        "time_ratio": median_ratio(seconds["plain"], seconds["ours"]),
        "reference_peak_bytes": peaks["plain"],
        "ours_peak_bytes": peaks["ours"],
        "memory_ratio": peaks["plain"] / peaks["ours"],
        "flops": flops,
        "matmul_flops_per_s": rate,
        "matmul_share": sum(flops.values()) / ours_s / rate,
        "images_per_s": batch / ours_s,
    }


def calls(config: Config, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(plain, ours): one training step each, of states of their own."""
    return plain_call(config, device), ours_call(config, device)


def ours_call(config: Config, device: torch.device) -> Callable[[], Any]:
    resolved = resolve(config, IMAGES)
    settings = step_settings(config, resolved, device)
    state = build_state(config, resolved, device, Local())
    size, num_views = resolved.micro_batch_size, 2 + config.views.num_local
    views = _views(config, resolved.batch_size)

    def ours() -> Any:
        micro_batches = []
        for index in range(resolved.num_micro_batches):
            rows = slice(index * size, (index + 1) * size)
            draws = drop_path_draws(state.student, 0, state.step, index, size, num_views)
            draws = None if draws is None else draws.to(device, non_blocking=True)
            micro_batches.append(MicroBatch(views.global_views[rows], views.local_views[rows], draws))
        permutation = block_permutation(0, state.step, resolved.memory_size, resolved.block_size)
        batch = Batch(micro_batches, permutation.to(device, non_blocking=True), resolved.num_micro_batches)
        return train_step(state, batch, SCHEDULE, settings, Local())

    return ours


def plain_call(config: Config, device: torch.device) -> Callable[[], Any]:
    resolved = resolve(config, IMAGES)
    settings = step_settings(config, resolved, device)
    student, teacher = _plain_encoder(config, config.model.drop_path), _plain_encoder(config, 0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    memory = Memory(resolved.memory_size, config.head.dim).rows
    student.to(device)
    state = PlainState(student, teacher.to(device), plain_optimizer(student, SCHEDULE.lr, SCHEDULE.weight_decay), memory.to(device))
    views = _views(config, resolved.batch_size)

    def plain() -> Any:
        return plain_step(state, prepare_views(views, settings), settings, SCHEDULE.teacher_temp, SCHEDULE.teacher_momentum)

    return plain


def _plain_encoder(config: Config, drop_path: float) -> Encoder:
    """The same network with timm's own stochastic depth and attention as timm chooses it."""
    import timm

    encoder = build_encoder(config)
    size = config.views.global_size
    backbone = timm.create_model(
        config.model.backbone, num_classes=0, img_size=size, dynamic_img_size=True, drop_path_rate=drop_path
    )
    backbone.load_state_dict(encoder.backbone.state_dict())
    encoder.backbone = backbone
    return encoder


def _views(config: Config, batch: int) -> MicroBatch:
    views, generator = config.views, torch.Generator().manual_seed(0)
    shapes = [(batch, 2, views.global_size, views.global_size, 3), (batch, views.num_local, views.local_size, views.local_size, 3)]
    global_views, local_views = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
    return MicroBatch(global_views, local_views, None)


def _config(preset: str, precision: str, batch: int, **others: Any) -> Config:
    flags = {"train.precision": precision, "train.global_batch_size": batch, "train.micro_batch_size": batch, **others}
    return load(["--preset", preset, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))])


def _peak(device: torch.device, preset: str, precision: str, batch: int, side: str) -> int:
    arguments = {"device": str(device), "preset": preset, "precision": precision, "batch": batch, "side": side}
    return in_fresh_process(__spec__.name, **arguments)["bytes"]


def _peak_here(device: str, preset: str, precision: str, batch: int, side: str) -> int:
    """Peak of building everything and taking two steps, above a process that has warmed its libraries on a tiny model."""
    target, make = torch.device(device), ours_call if side == "ours" else plain_call
    tiny = {"model.backbone": "test_vit", "head.hidden_dim": 8, "memory.size": 64, "views.num_local": 1}
    _two_steps(make, _config(preset, precision, 2, **tiny), target)
    return extra_peak(lambda: _two_steps(make, _config(preset, precision, batch), target), target)


def _two_steps(make: Callable[[Config, torch.device], Callable[[], Any]], config: Config, device: torch.device) -> None:
    call = make(config, device)
    call()
    call()


if __name__ == "__main__":
    print(json.dumps({"bytes": _peak_here(**json.loads(sys.argv[1]))}))
