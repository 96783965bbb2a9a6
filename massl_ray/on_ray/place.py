"""Where a worker is, in a cluster and in a life."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Seat:
    """Room for one worker."""

    node: str  # id of the machine
    gpu: str | None  # which of its GPUs


@dataclass(frozen=True)
class Place:
    """Of one worker in one life."""

    rank: int
    world_size: int
    meeting: str  # where the workers meet, as torch.distributed's init_method: tcp://HOST:PORT or file://PATH
    gpu: str | None
