"""Shards written by Ray tasks, on all CPUs of the cluster. Tasks import this, so it imports nothing that is slow."""

from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from massl_ray.data.listing import Listing
from massl_ray.data.preparing import Plan, do_part, missing
from massl_ray.storage import Folder


def do_parts(images: Listing, folder: Folder, plan: Plan) -> Iterator[int]:
    """Do what is missing; gives the number of images of each part as it is done, first of those that were done before.

    Raises what a task raised (OSError among others) once Ray has tried it on other machines, too.
    """
    left = list(missing(folder, plan))
    yield plan.count - sum(len(plan.samples(part)) for part in left)
    task = ray.remote(num_cpus=1)(do_part)
    shared: Any = ray.put(images)  # once a machine, not once a task
    running: dict[ray.ObjectRef, int] = {}
    while left or running:
        while left and len(running) < 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
            part = left.pop(0)
            running[task.remote(shared, folder, plan, part)] = part
        for done in ray.wait(list(running))[0]:
            try:
                ray.get(done)
            except RayTaskError as error:
                raise error.cause from None
            yield len(plan.samples(running.pop(done)))
