"""The cluster that a command runs on."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from massl_ray.on_ray.knobs import HEAD, MEETINGS, PRIVATE, set_knobs


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names (a Ray job sets it), or one of our own on this machine for as long as this lasts."""
    address = os.environ.get("RAY_ADDRESS")
    set_knobs(watched=bool(address))
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(**quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with private():
        ray.init(address="local", include_dashboard=False, _system_config=HEAD, **quiet)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def private() -> Iterator[None]:
    """Around the life of a cluster of our own: who has not this process's environment can read, write and run nothing on it.

    Ray's processes listen on every interface whatever address they are given, and who connects to them may run code as their user.
    The cluster gets a random token that only the environment of its processes holds, which no other user can read; a token of the
    user's own is for another cluster and stays out of it.
    """
    with TemporaryDirectory(prefix="massl-ray-") as folder, environment(guard() | {MEETINGS: folder}):
        yield


def guard() -> dict[str, str | None]:
    """Environment variables of a cluster with a token of its own; None stands for one that must not be set."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_TOKEN_PATH": None, **PRIVATE}


@contextmanager
def environment(wanted: Mapping[str, str | None]) -> Iterator[None]:
    """These variables for as long as this lasts, for this process's Ray and all that it starts; None for one that is not set."""
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()  # Ray reads both once a process
    Config.initialize("")
