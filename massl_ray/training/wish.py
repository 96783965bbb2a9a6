"""What workers are asked for between two steps. Without torch: processes that only pass it on start in a second."""

from enum import IntEnum


class Wish(IntEnum):
    """Of several workers' wishes the largest counts."""

    NONE = 0
    SAVE = 1  # this machine may go away soon
    RESIZE = 2  # there are more machines, or fewer: leave, to start again with those
    STOP = 3
