"""Rest for the loop in which Ray Data looks after its tasks. Tasks import this, so it imports nothing that is slow."""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback

PACE_S = 0.05  # between two looks


class Pace(ExecutionCallback):
    """The loop is a thread of the training process and does not rest while nobody takes what has been made: without this a step
    takes up to eight times as long, waiting for the interpreter."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(PACE_S)
