"""The cloud of `massl_ray.on_ray.fake_cloud`, as Ray's autoscaler takes one: machines that are processes, while there are any."""

import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

LOOK_S = 0.2


class SpotProvider(FakeMultiNodeProvider):
    """Makes a machine as soon as there is capacity, whose number stands in a file: spot machines are not always to be had."""

    def create_node_with_resources_and_labels(self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any) -> None:
        capacity = Path(self.provider_config["capacity_file"])
        for _ in range(count):
            while len(self._nodes) > int(capacity.read_text()):  # the head is one of them
                time.sleep(LOOK_S)
            self._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
