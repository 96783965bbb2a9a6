"""The watcher against endpoints that behave as the clouds' do, and against a real Ray."""

import json
import os
import subprocess
import sys

import pytest

from massl_ray.errors import UserError
from massl_ray.on_ray.clouds import Aws, NoAnswer, Notice, find_source
from massl_ray.on_ray.spot import Undrainable, main, watch
from tests.clouds import AwsCloud, Clock, Cloud, GcpCloud, action, served


def test_auto_without_a_cloud_is_the_users_mistake(capsys):
    with Cloud() as cloud, pytest.raises(UserError, match=f"^no metadata endpoint of aws, gcp, azure answers at {cloud.url}: "):
        find_source("auto", cloud.url)
    assert main(["--metadata-url", cloud.url]) == 2  # nobody listens any more
    assert capsys.readouterr().err.startswith("massl-ray: no metadata endpoint of aws, gcp, azure answers at http://127.0.0.1:")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--metadata-url", "169.254.169.254"], "--metadata-url 169.254.169.254 is no base address"),
        (["--metadata-url", "http://127.0.0.1:x"], "--metadata-url http://127.0.0.1:x is no base address"),
        (["--metadata-url", "http://127.0.0.1/latest"], "--metadata-url http://127.0.0.1/latest is no base address"),
        (["--poll", "0"], "--poll 0 does not lie between 0 and 120 seconds"),
        (["--poll", "nan"], "--poll nan does not lie between 0 and 120 seconds"),
        (["--cloud", "gcp", "--ray-address", "nonsense"], "nonsense is no address of a Ray's head: give HOST:PORT"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(flags, sentence, capsys):
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith(f"massl-ray: {sentence}")


# Watching


def test_watch_outlives_an_endpoint_that_goes_away():
    said, drained = [], []
    with served(AwsCloud(), Aws) as (cloud, source, clock):

        def come_back():
            cloud.__enter__()
            cloud.token, cloud.body = "another", action("terminate", 75)

        clock.then = {2: lambda: cloud.__exit__(), 4: come_back}
        left = watch(source.look, drained.append, 5.0, say=said.append, sleep=clock.sleep, clock=clock)
    assert drained == [left] == [Notice("aws", "terminate", 75)]
    assert clock.sleeps == [5.0] * 4
    assert len(said) == 3
    assert said[0].startswith(f"The aws metadata endpoint at {cloud.url} does not answer (ConnectionRefusedError")
    assert said[0].endswith(" Asking again every 5 s.")
    assert said[1:] == ["It answers again.", "aws takes this machine back (terminate) in 75 s."]


def test_each_outage_is_told_once():
    answers = iter([NoAnswer("Gone."), NoAnswer("Gone."), None, NoAnswer("Gone."), Notice("gcp", "preempted", 30)])
    said = []

    def look():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch(look, lambda notice: None, 1.0, say=said.append, sleep=Clock().sleep)
    assert said[:4] == ["Gone. Asking again every 1 s.", "It answers again."] * 2 and len(said) == 5


def test_a_silent_ray_is_asked_again_with_the_time_that_remains():
    clock, asked = Clock(), []

    def drain(notice):
        asked.append(notice.seconds_left)
        if len(asked) < 4:
            raise NoAnswer("No Ray.")

    left = watch(lambda: Notice("azure", "Preempt", 2), drain, 5.0, say=lambda _: None, sleep=clock.sleep, clock=clock)
    assert asked == [2, 1, 0, 0] and left.seconds_left == 0


def test_a_refusal_ends_the_watch():
    def drain(notice):
        raise Undrainable("No such node.")

    with pytest.raises(Undrainable):
        watch(lambda: Notice("gcp", "preempted", 30), drain, 1.0, say=lambda _: None)


def test_a_refused_drain_ends_with_1(monkeypatch, capsys):
    from massl_ray.on_ray import spot

    class Gone:
        address, node_id = "127.0.0.1:6379", "ab"

        def __init__(self, *_):
            pass

        def drain(self, notice):
            raise Undrainable("the Ray at 127.0.0.1:6379 has no living node ab.")

    monkeypatch.setattr(spot, "RayNode", Gone)
    with GcpCloud() as cloud:
        cloud.body = "TRUE"
        assert main(["--metadata-url", cloud.url]) == 1
    assert capsys.readouterr().err.endswith("massl-ray: the Ray at 127.0.0.1:6379 has no living node ab.\n")


# With Ray

TWO_NODES = """
import json, os, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo
from massl_ray.errors import UserError
from massl_ray.on_ray.clouds import Notice
from massl_ray.on_ray.spot import RayNode, Undrainable

def error_of(call):
    try:
        call()
    except (UserError, Undrainable) as error:
        return f"{type(error).__name__}: {error}"

url, temp = sys.argv[1:]
loopback = {"node_ip_address": "127.0.0.2"}  # Ray would turn 127.0.0.1 into an address that others can reach
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": temp, "include_dashboard": False} | loopback)
second = cluster.add_node(num_cpus=1, resources={"second": 1}, **loopback)
ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

@ray.remote(resources={"second": 1})
class Busy:  # an idle node leaves as soon as it drains
    def ready(self):
        return True

busy = Busy.remote()
ray.get(busy.ready.remote())
os.environ["RAY_ADDRESS"] = cluster.address
node = RayNode(None, second.node_id)
told = {"address": cluster.address, "head": cluster.head_node.node_id, "second": second.node_id, "found": node.address}
told["two"] = error_of(lambda: RayNode(cluster.address, None))
told["unknown"] = error_of(lambda: RayNode(cluster.address, "ab" * 28))

started = time.time()
command = [sys.executable, "-m", "massl_ray.on_ray.spot", "--metadata-url", url, "--ray-address", cluster.address]
watcher = subprocess.run([*command, "--node-id", second.node_id], capture_output=True, text=True)
told |= {"exit": watcher.returncode, "said": watcher.stderr, "started": started, "ended": time.time()}
told["draining"] = ray._private.state.state.get_draining_nodes()

ray.kill(busy)
deadline = time.monotonic() + 30
with node._gcs() as gcs:
    while time.monotonic() < deadline:
        info = next(each for each in gcs.get_all_node_info(timeout=5).values() if each.node_id.hex() == second.node_id)
        if info.state != 0:
            break
        time.sleep(0.05)
told["reason"] = NodeDeathInfo.Reason.Name(info.death_info.reason)
told["message"] = info.death_info.reason_message
told["gone"] = error_of(lambda: node.drain(Notice("aws", "terminate", 5.0)))
told["one"] = RayNode(cluster.address, None).node_id
print(json.dumps(told))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_notice_drains_the_node_in_ray(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spot")
    (folder / "ray").mkdir()
    env = os.environ | {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    env.pop("RAY_ADDRESS", None)
    with AwsCloud() as cloud:
        cloud.body = action("terminate", 100)
        command = [sys.executable, "-c", TWO_NODES, cloud.url, str(folder / "ray")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    address, second = told["address"], told["second"]

    assert told["exit"] == 0, told["said"]
    assert list(told["draining"]) == [second]
    assert told["started"] + 99 < told["draining"][second] / 1000 < told["ended"] + 100
    assert told["reason"] == "AUTOSCALER_DRAIN_PREEMPTED"
    assert told["message"] == "aws takes the machine back (terminate)"
    assert f"massl-ray: Watching aws every 5 s for node {second} of the Ray at {address}.\n" in told["said"]
    assert told["said"].endswith(f"massl-ray: Node {second} drains, 100 s before its end.\n")

    assert told["found"] == address
    assert told["two"] == f"UserError: 2 nodes of the Ray at {address} run on this machine: choose with --node-id."
    assert told["unknown"] == f"UserError: the Ray at {address} has no living node {'ab' * 28}."
    assert told["gone"] == f"Undrainable: the Ray at {address} has no living node {second}."
    assert told["one"] == told["head"]
