"""A process that does not outlive the one that started it, even where that is killed."""

import os
import signal
import subprocess
import sys
import time

PARENT = """
import subprocess, sys, time
from massl_ray.on_ray.child import ends_with_its_parent
first = ends_with_its_parent if sys.argv[1] == "bound" else None
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, preexec_fn=first)
print(child.pid, flush=True)
time.sleep(600)
"""


def left_behind(kind: str) -> tuple[int, bool]:
    """The child of a parent that was killed, and whether it is still there."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert is_there(pid)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + (10 if kind == "bound" else 0.5)
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return pid, is_there(pid)


def is_there(pid: int) -> bool:
    """Ended processes that nobody has asked about do not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_ends_with_its_parent():
    assert not left_behind("bound")[1]
    pid, there = left_behind("free")  # as any other process does not
    assert there
    os.kill(pid, signal.SIGKILL)
