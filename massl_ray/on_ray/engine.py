"""Processes that have everything imported before they are needed, and that outlive a change of the number of workers.

Of the time to start a worker, most goes into imports (torch, timm: 6 s of a CPU). So on every machine that may hold a worker one
engine more than needed waits. An engine that leaves a life in good order keeps its model on its device and may lead the next.
"""

import gc
import os
import socket
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from massl_ray.on_ray.knobs import MEETINGS


class Engine:
    """One worker's process."""

    def __init__(self) -> None:
        gc.disable()  # which would go through all that is imported again and again, for a sixth of the time
        from massl_ray.on_ray.feeder import start_feeder

        feeder = start_feeder()  # which imports in the meantime what it needs
        import torch._dynamo  # the optimizer asks for it at its first step  # noqa: F401

        from massl_ray.on_ray.life import Remains

        gc.freeze()
        gc.enable()
        ray.get(feeder.ready.remote())
        self.remains = Remains(feeder)

    def report(self) -> tuple[int, str]:
        """That it is there: its process id, and where the workers of a life may meet if this is the first."""
        return os.getpid(), meeting_place()

    def live(self, run: Any, telemetry: Any, layout: Any, life: int, failures: int, place: Any) -> dict[str, Any]:
        """Train until the run is over or is to be resized; returns the Outcome as a dict."""
        from massl_ray.on_ray.life import live

        return live(run, telemetry, layout, life, failures, place, self.remains)


def start_engine(node: str) -> Any:
    """On that machine. It reserves nothing: its seat has."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(Engine).options(scheduling_strategy=here).remote()


def meeting_place() -> str:
    """Where workers may meet, as torch.distributed's init_method: a free port of this machine, or on a cluster of our own a file
    that does not exist yet. A port would be open to all who reach the machine."""
    if folder := os.environ.get(MEETINGS):
        return f"file://{folder}/{uuid.uuid4().hex}"
    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
