"""Rest for the loop in which Ray Data looks after its tasks. Tasks import this, so it imports nothing that is slow."""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback

LOOK_S = 0.1  # from one look to the next, at least


class Pace(ExecutionCallback):
    """The loop is a thread of the training process, and a look of it takes 2 ms. While tasks are at work it waits for them, 0.1 s
    at most; when what they have made may not be taken yet it does not wait at all: without this a step takes up to eight times
    as long, waiting for the interpreter."""

    def __init__(self) -> None:
        self.looked = 0.0

    def on_execution_step(self, executor: object) -> None:
        time.sleep(max(0.0, self.looked + LOOK_S - time.monotonic()))
        self.looked = time.monotonic()
