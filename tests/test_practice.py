"""Scripts of what happens to a run, played against events that are invented."""

import os
import subprocess
import sys

import pytest

from massl_ray.on_ray.practice import Scenario

ADDRESS = """
from massl_ray.on_ray.practice import practice_cluster
with practice_cluster(1) as cluster:
    import ray
    assert len(cluster.machines) == 1 and ray.cluster_resources()["CPU"] == 1
"""


def progress(step: int, life: int = 1) -> dict:
    return {"kind": "progress", "life": life, "step": step}


def test_a_script_waits_for_steps_and_transitions():
    happened = []

    def script(scenario):
        event = yield from scenario.transition(1)
        happened.append(("begun", event["step"]))
        yield from scenario.steps(3)
        happened.append(("three more", scenario.step))
        yield from scenario.transition(2)
        happened.append(("grown", scenario.life))

    scenario = Scenario(script)
    for event in [progress(0, 0), {"kind": "metrics"}, {"kind": "transition", "to": 1, "step": 5}, progress(6), progress(7)]:
        scenario.meet(event)
    assert happened == [("begun", 5)] and scenario.step == 7
    scenario.meet(progress(8))
    assert happened[1:] == [("three more", 8)]
    scenario.meet({"kind": "transition", "to": 1, "step": 8})  # not the one that is waited for
    assert not scenario.over
    scenario.meet(progress(8, life=2))
    scenario.meet({"kind": "transition", "to": 2, "step": 8})
    assert scenario.over and happened[2:] == [("grown", 2)]
    scenario.meet(progress(9))  # nothing is left to happen
    assert scenario.step == 8


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"], ids=["no Ray before", "beside another Ray"])
def test_nobody_elses_address_is_touched(tmp_path, address):
    """Where nothing of Ray's lies yet, and where the address of somebody's cluster does. In a process that has no Ray yet."""
    known = tmp_path / "ray" / "ray_current_cluster"
    if address:
        known.parent.mkdir()
        known.write_text(address)
    environment = os.environ | {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", ADDRESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (known.read_text() if known.exists() else None) == address
