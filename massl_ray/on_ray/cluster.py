"""The cluster that a command runs on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from massl_ray.on_ray.knobs import HEAD, set_knobs


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (a Ray job sets it), or one of our own on this machine for as long as this lasts."""
    address = os.environ.get("RAY_ADDRESS")
    set_knobs(watched=bool(address))
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(**quiet)
    else:
        # A private cluster on loopback needs no token, and writing one would lock `ray job` out of a later `ray start`.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", include_dashboard=False, _system_config=HEAD, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
