"""What Ray Train calls on every rank, again after each resize: find an engine on this machine and have it train.

Ray Train starts this process anew each time, so it imports nothing that is slow; the engine has done so beforehand.
"""

from typing import Any, cast

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from massl_ray.on_ray.engine import start_engine


class Resize(Exception):
    """Raised on every worker to have Ray Train start them again with the machines there are now. The state is kept."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One life of one worker. Returns the Outcome as a dict; the same on every rank."""
    telemetry, layout = arguments["telemetry"], arguments["layout"]
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    node = ray.get_runtime_context().get_node_id()

    def take() -> Any:
        return ray.get(telemetry.take_engine.remote(node)) or start_engine(node)

    meeting: Any = None
    engine: Any = None
    if rank == 0:
        begun = ray.get(telemetry.begin.remote())  # before an engine is taken: it ends those of the life before
        engine = take()
        meeting = (*begun, ray.get(engine.address.remote()))
    life, failures, address = cast(Any, broadcast_from_rank_zero(meeting))
    engine = engine or take()
    place = {"rank": rank, "world_size": world_size, "address": address, "gpus": ray.get_gpu_ids() if layout.use_gpu else []}
    try:
        pid = ray.get(engine.pid.remote())
        telemetry.announce.remote(life, {"kind": "placed", "rank": rank, "node": node, "pid": pid})
        outcome: Any = ray.get(engine.live.remote(arguments["run"][0], telemetry, layout, life, failures, place))
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        telemetry.announce.remote(life, {"kind": "failure", "text": f"Worker {rank}: {type(cause).__name__}: {cause}"})
        raise
    finally:
        ray.kill(engine)
    if outcome["status"] == "resize":
        raise Resize
    return outcome
