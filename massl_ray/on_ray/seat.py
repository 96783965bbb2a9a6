"""What Ray Train calls on every rank. With elastic.in_place it only holds the machine's CPUs or GPU for an engine, which outlives
it; otherwise it trains itself, and Ray Train starts every worker anew when their number changes.

Ray Train starts these processes anew each time, so nothing that is slow is imported before it is needed.
"""

import os
import time
from typing import Any, cast

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from massl_ray.on_ray.place import Place, Seat
from massl_ray.on_ray.telemetry import failure_event

LOOK_S = 0.25


class Regroup(Exception):
    """Raised on every rank to have Ray Train start them again on the machines there are now."""


def hold_seat(arguments: dict[str, Any]) -> dict[str, Any]:
    """Hold a seat until the run is over; returns its Outcome as a dict. Raises Regroup on request."""
    telemetry, layout = arguments["telemetry"], arguments["layout"]
    context = ray.train.get_context()
    number = ray.get(telemetry.begin_group.remote(context.get_world_size())) if context.get_world_rank() == 0 else None
    group: Any = broadcast_from_rank_zero(number)
    telemetry.sit.remote(group, _seat(layout.use_gpu))
    order: Any = "hold"
    while (order := ray.get(telemetry.order.remote(group))) == "hold":
        time.sleep(LOOK_S)
    if order == "leave":
        raise Regroup
    return order


def train_here(arguments: dict[str, Any]) -> dict[str, Any]:
    """One life of one worker, in this process. Returns the Outcome as a dict; the same on every rank."""
    from massl_ray.on_ray.engine import meeting_place
    from massl_ray.on_ray.feeder import start_feeder
    from massl_ray.on_ray.life import Remains, live

    telemetry, layout = arguments["telemetry"], arguments["layout"]
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    begun = (*ray.get(telemetry.begin.remote()), meeting_place()) if rank == 0 else None
    life, failures, meeting = cast(Any, broadcast_from_rank_zero(begun))
    seat = _seat(layout.use_gpu)
    try:
        telemetry.announce.remote(life, {"kind": "placed", "rank": rank, "node": seat.node, "pid": os.getpid()})
        place = Place(rank, world_size, meeting, seat.gpu)
        outcome = live(ray.get(arguments["run"][0]), telemetry, layout, life, failures, place, Remains(start_feeder()))
    except Exception as error:
        ray.get(telemetry.announce.remote(life, failure_event(rank, error)))  # before this process ends
        raise
    if outcome["status"] == "resize":
        raise Regroup
    return outcome


def _seat(use_gpu: bool) -> Seat:
    return Seat(ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0]) if use_gpu else None)
