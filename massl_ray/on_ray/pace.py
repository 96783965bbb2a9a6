"""Rest for the loop in which Ray Data looks after its tasks. Tasks import this, so it imports nothing that is slow."""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback

LOOK_S = 0.1  # from one look to the next, at least


class Pace(ExecutionCallback):
    """While tasks are at work the loop waits for them, 0.1 s at most. When what they have made may not be taken yet it does not
    wait at all: without this it takes a whole CPU."""

    def __init__(self) -> None:
        self.looked = 0.0

    def on_execution_step(self, executor: object) -> None:
        time.sleep(max(0.0, self.looked + LOOK_S - time.monotonic()))
        self.looked = time.monotonic()
