"""`bench cost`: what exactness costs in a step of two workers, and what checkpoints cost in a step of the demo preset.

Two processes of one thread with gloo, without Ray. Both sides of each comparison take turns on the same state.
"""

import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from massl_ray.benches.measure import alternate, machine
from massl_ray.config import Config, load
from massl_ray.method.schedules import schedule_at
from massl_ray.method.step import State, train_step
from massl_ray.training.checkpoint import CheckpointWriter
from massl_ray.training.collectives import Distributed, Local
from massl_ray.training.exact_sums import Exact
from massl_ray.training.loop import Views, assemble
from massl_ray.training.run import Run, prepare_run
from massl_ray.training.state import build_state, step_settings, to_tensors

WORKERS, EVERY = 2, 10
VIT_S = (
    "--preset vit_small --train.precision fp32 --train.global_batch_size 32 --train.micro_batch_size 8 --views.global_size 64 "
    "--views.local_size 32 --views.num_local 4 --memory.size 4096 --data.source demo"
).split()
DEMO = ["--preset", "demo"]


def run(device: torch.device, rounds: int = 7) -> dict[str, Any]:
    """Shares of a step's time: medians over `rounds`."""
    port = _free_port()
    command = [sys.executable, "-m", __spec__.name]
    workers = [
        subprocess.Popen([*command, json.dumps([rank, port, rounds])], stdout=subprocess.PIPE, text=True) for rank in range(WORKERS)
    ]
    printed = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a worker of bench cost failed; what it said stands above")
    exact = json.loads(printed[0])
    return {
        "name": "cost",
        "work": f"exact: ViT-S, {WORKERS} workers, gloo; checkpoint: demo preset, every {EVERY} steps",
        **machine(device),
        **exact,
        **_checkpoint_cost(rounds),
    }


def _exact_cost(rank: int, port: int, rounds: int) -> dict[str, float]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    with TemporaryDirectory() as folder:
        prepared = prepare_run(load([*VIT_S, "--run.dir", f"{folder}/run"]))
    workers = Distributed(prepared.resolved.num_micro_batches)
    sides = {"false": workers, "true": Exact(workers, prepared.resolved.num_micro_batches)}
    steps = {name: _stepper(prepared, collectives) for name, collectives in sides.items()}
    seconds = alternate({name: step for name, (step, _) in steps.items()}, torch.device("cpu"), rounds)
    dist.destroy_process_group()
    inexact, exact = (statistics.median(seconds[name]) for name in ("false", "true"))
    cost = statistics.median(e / i - 1 for e, i in zip(seconds["true"], seconds["false"], strict=True))
    return {"inexact_s": inexact, "exact_s": exact, "exact_cost": cost}


def _checkpoint_cost(rounds: int) -> dict[str, float]:
    """A block of EVERY steps with one checkpoint beside one without."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        prepared = prepare_run(load([*DEMO, "--run.dir", f"{folder}/run"]))
        step, state = _stepper(prepared, Exact(Local(), prepared.resolved.num_micro_batches))
        writer = CheckpointWriter(f"{folder}/checkpoints", keep=2, note=lambda text: print(text, file=sys.stderr))

        def block(save: bool) -> Callable[[], None]:
            def steps() -> None:
                for _ in range(EVERY):
                    step()
                if save:
                    writer.save(to_tensors(state), {})

            return steps

        seconds = alternate({"without": block(False), "with": block(True)}, torch.device("cpu"), rounds)
        writer.close()
    cost = statistics.median(w / o - 1 for w, o in zip(seconds["with"], seconds["without"], strict=True))
    without, with_one = (statistics.median(seconds[name]) for name in ("without", "with"))
    return {"block_s": without, "checkpoint_block_s": with_one, "checkpoint_cost": cost}


def _stepper(prepared: Run, collectives: Any) -> tuple[Callable[[], Tensor], State]:
    """A training step on views of noise, and the state that it advances."""
    config, resolved, device = prepared.config, prepared.resolved, torch.device("cpu")
    state = build_state(config, resolved, device, collectives)
    settings, views = step_settings(config, resolved, device), _noise(config, resolved.batch_size // collectives.world_size)

    def step() -> Tensor:
        batch = assemble(prepared, state, views, collectives)
        return train_step(state, batch, schedule_at(state.step, config, resolved), settings, collectives)

    return step, state


def _noise(config: Config, images: int) -> Views:
    random, views = torch.Generator().manual_seed(0), config.views
    shapes = [
        (images, 2, views.global_size, views.global_size, 3),
        (images, views.num_local, views.local_size, views.local_size, 3),
    ]
    global_views, local_views = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=random) for shape in shapes)
    return Views(global_views, local_views, [])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return opened.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(_exact_cost(*json.loads(sys.argv[1]))))
