"""This machine, as a cluster of one."""

import os
from pathlib import Path

from massl_ray.planning.cluster_file import Cluster, Pool
from massl_ray.planning.gpus import recognized


def this_machine() -> Cluster:
    """Its CPUs, memory and GPUs; no prices."""
    import torch  # late: it takes seconds to import

    gpus, name = torch.cuda.device_count(), None
    if gpus:
        properties = torch.cuda.get_device_properties(0)
        known = recognized(properties.name, properties.total_memory / 2**30)
        name = known.name if known else properties.name
    head = Pool("this machine", min=1, max=1, cpus=os.cpu_count() or 1, gpus=gpus, gpu=name, memory_bytes=memory_bytes())
    return Cluster("this machine", "machine", head, ())


def memory_bytes() -> float:
    """Of this machine, or of the container that this runs in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return float(min(whole, int(Path(limit).read_text())))
        except (OSError, ValueError):  # there is none, or it is 'max'
            continue
    return float(whole)
