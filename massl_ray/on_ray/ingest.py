"""Ray Data as the source of views: this worker's slice of every step's batch, from any step on, in order."""

import warnings
from collections import deque
from collections.abc import Generator
from typing import Any

import numpy as np
import ray
import torch
from ray.data.block import BlockAccessor
from torch import Tensor

from massl_ray.data.making import ViewMaker
from massl_ray.data.order import worker_share
from massl_ray.method.device_views import device_views, padded
from massl_ray.method.views import draw_views
from massl_ray.on_ray.feeder import Feed
from massl_ray.on_ray.layout import DataTasks
from massl_ray.training.loop import Views
from massl_ray.training.run import Run

READY = 2  # steps whose views are on this machine before they are needed


def stream_views(
    run: Run, rank: int, world_size: int, start_step: int, tasks: DataTasks, device: torch.device, feeder: Any
) -> Generator[Views, None, None]:
    """Views of this worker's share of each step's batch, from `start_step` to the end of the run. `feeder`, of `start_feeder`,
    begins at once.

    What comes out depends on (configuration, images, step, share) only, so a restart at any step and any number of workers
    continues with the very next sample.
    """
    size = run.resolved.micro_batch_size
    first, last = (edge * size for edge in worker_share(rank, world_size, run.resolved.num_micro_batches))
    make = ViewMaker(run.images, run.config, run.resolved.batch_size, start_step, first, last - first)
    feeder.open.remote(Feed(make, last - first, max(0, run.resolved.end - start_step), tasks, _row_bytes(run)))
    calls = deque(feeder.next.remote() for _ in range(READY))

    def views() -> Generator[Views, None, None]:
        try:
            while blocks := ray.get(calls.popleft()):
                calls.append(feeder.next.remote())
                yield _to_views(ray.get(blocks), run, device)
        finally:
            feeder.close.remote()

    return views()


def _row_bytes(run: Run) -> int:
    """About what an image's row of the dataset takes."""
    config = run.config.views
    if config.device != "cpu":
        return run.config.data.channels * 2**20  # decoded, a megapixel
    return run.config.data.channels * (2 * config.global_size**2 + config.num_local * config.local_size**2)


def _to_views(blocks: list[Any], run: Run, device: torch.device) -> Views:
    parts = [BlockAccessor.for_block(block).to_numpy() for block in blocks]
    rows = {name: np.concatenate([part[name] for part in parts]) if parts[1:] else parts[0][name] for name in parts[0]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")  # and nobody writes to it
        if "pixels" in rows:
            global_views, local_views = _views_on_device(rows, run, device)
        else:
            global_views, local_views = torch.from_numpy(rows["global_views"]), torch.from_numpy(rows["local_views"])
    skipped = [line for lines in rows["skipped"] if lines for line in str(lines).split("\0")]  # no path has a NUL
    return Views(global_views, local_views, skipped)


def _views_on_device(rows: dict[str, np.ndarray], run: Run, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the views of decoded images, a micro-batch at a time: its images are the same whichever worker has it, and so are
    the last bits of sums over them."""
    config, size = run.config.views, run.resolved.micro_batch_size
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, len(rows["pixels"]), size):
        part = {name: column[first : first + size].tolist() for name, column in rows.items()}
        images = [
            torch.frombuffer(pixels, dtype=torch.uint8).view(*shape)
            for pixels, shape in zip(part["pixels"], part["shape"], strict=True)
        ]
        drawn = [
            draw_views(config, width, height, seed=run.config.run.seed, epoch=epoch, sample=sample)
            for (width, height), epoch, sample in zip(part["size"], part["epoch"], part["sample"], strict=True)
        ]
        batch = padded(images, device)
        groups[0].append(device_views(batch, part["shrunk"], [views[:2] for views in drawn]))
        side = config.local_size
        empty = torch.empty(len(images), 0, side, side, run.config.data.channels, dtype=torch.uint8, device=device)
        groups[1].append(device_views(batch, part["shrunk"], [views[2:] for views in drawn]) if config.num_local else empty)
    return torch.cat(groups[0]), torch.cat(groups[1])
