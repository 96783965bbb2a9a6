"""Processes that have everything imported before they are needed.

Of the time to start a worker, most goes into imports (torch, timm: 6 s of a CPU). So on every machine that may hold a worker one
engine more than needed waits; a worker takes it and has it train for one life, after which it ends.
"""

import os
import socket
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Engine:
    """One worker's process, for one life."""

    def __init__(self) -> None:
        import torch._dynamo  # the optimizer asks for it at its first step  # noqa: F401

        import massl_ray.on_ray.life  # noqa: F401

    def pid(self) -> int:
        return os.getpid()

    def address(self) -> str:
        """Where the workers of a life may meet, as host:port, if this is the first of them."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def live(self, run: Any, telemetry: Any, layout: Any, life: int, failures: int, place: dict[str, Any]) -> dict[str, Any]:
        """Train until the run is over or is to be resized; returns the Outcome as a dict."""
        from massl_ray.on_ray.life import live

        return live(run, telemetry, layout, life, failures, place)


def start_engine(node: str) -> Any:
    """On that machine. It reserves nothing: the worker that takes it has."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(Engine).options(scheduling_strategy=here).remote()
