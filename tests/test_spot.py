"""The watcher against endpoints that behave as the clouds' do, and against a real Ray."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from massl_ray.errors import UserError
from massl_ray.on_ray.spot import Aws, Azure, Gcp, NoAnswer, Notice, Undrainable, find_source, main, watch

NOW = datetime(2017, 9, 18, 8, 20, 0, tzinfo=UTC)  # the cloud's time, far from this machine's


class Cloud:
    """A metadata endpoint on loopback. `body` is what it says, None for nothing yet; `status` spoils every answer."""

    def __init__(self):
        self.body: str | None = None
        self.status = 200
        self.date: datetime | None = NOW
        self.asked: list[str] = []
        self.port = 0
        self.headers: dict[str, str] = {}

    def __enter__(self):
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                cloud.asked.append(f"{self.command} {self.path}")
                status, body = cloud.answer(self.command, self.path, self.headers)
                if cloud.status != 200:
                    status, body = cloud.status, "spoilt"
                self.send_response_only(status)
                if cloud.date:
                    self.send_header("Date", format_datetime(cloud.date, usegmt=True))
                for name, value in cloud.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method, path, headers) -> tuple[int, str]:
        return 404, "not found"


class AwsCloud(Cloud):
    def __init__(self):
        super().__init__()
        self.token = "none yet"
        self.tokens = 0

    def answer(self, method, path, headers):
        if (method, path) == ("PUT", "/latest/api/token"):
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return 400, "bad request"
            self.tokens += 1
            self.token = f"AQAE{self.tokens}=="
            return 200, self.token
        if headers.get("X-aws-ec2-metadata-token") != self.token:
            return 401, "unauthorized"
        if (method, path) != ("GET", "/latest/meta-data/spot/instance-action") or self.body is None:
            return 404, "not found"
        return 200, self.body


class GcpCloud(Cloud):
    def __init__(self):
        super().__init__()
        self.headers = {"Metadata-Flavor": "Google"}

    def answer(self, method, path, headers):
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "forbidden"
        if (method, path) != ("GET", "/computeMetadata/v1/instance/preempted"):
            return 404, "not found"
        return 200, "FALSE" if self.body is None else self.body


class AzureCloud(Cloud):
    def answer(self, method, path, headers):
        if method != "GET" or headers.get("Metadata") != "true":
            return 400, "bad request"
        if path == "/metadata/instance/compute/name?api-version=2021-02-01&format=text":
            return 200, "workers_3"
        if path == "/metadata/scheduledevents?api-version=2020-07-01":
            return 200, events() if self.body is None else self.body
        return 404, "not found"


def action(what: str, seconds: float) -> str:
    return json.dumps({"action": what, "time": (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")})


def event(kind: str, name: str, seconds: float | None) -> dict:
    when = "" if seconds is None else format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
    return {"EventId": "1", "EventType": kind, "ResourceType": "VirtualMachine", "Resources": [name], "NotBefore": when}


def events(*each: dict) -> str:
    return json.dumps({"DocumentIncarnation": 1, "Events": list(each)})


class Clock:
    """Stands still but for the sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.then: dict[int, object] = {}  # what happens during which sleep
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)
        assert len(self.sleeps) < 50, "never ends"
        self.then.get(len(self.sleeps), lambda: None)()


@contextmanager
def served(cloud: Cloud, source):
    with cloud:
        clock = Clock()
        yield cloud, source(cloud.url, clock), clock


# What each cloud says


@pytest.mark.parametrize("what, seconds, left", [("terminate", 90, 90), ("stop", 600, 120), ("stop", -5, 0), ("hibernate", 100, 0)])
def test_aws_notice_is_timed_by_the_clouds_clock(what, seconds, left):
    with served(AwsCloud(), Aws) as (cloud, source, _):
        assert source.look() is None and source.look() is None
        cloud.body = action(what, seconds)
        assert source.look() == Notice("aws", what, left)
        assert cloud.tokens == 1


def test_aws_token_is_renewed_once_it_has_expired():
    with served(AwsCloud(), Aws) as (cloud, source, _):
        assert source.look() is None
        cloud.token, cloud.body = "another", action("terminate", 60)
        assert source.look() == Notice("aws", "terminate", 60)
        assert cloud.tokens == 2


@pytest.mark.parametrize("spoil", ["date", "time"])
def test_a_notice_without_a_time_counts_from_the_last_look_without_one(spoil):
    with served(AwsCloud(), Aws) as (cloud, source, clock):
        assert source.look() is None
        clock.now += 5
        cloud.body = action("terminate", 60)
        if spoil == "date":
            cloud.date = None
        else:
            cloud.body = '{"action": "terminate", "time": "soon"}'
        assert source.look() == Notice("aws", "terminate", 115)


def test_gcp_notice_counts_from_the_last_look_without_one():
    with served(GcpCloud(), Gcp) as (cloud, source, clock):
        cloud.body = "TRUE"
        assert source.look() == Notice("gcp", "preempted", 30)
        cloud.body = "FALSE"
        assert source.look() is None
        clock.now += 4
        cloud.body = "TRUE\n"
        assert source.look() == Notice("gcp", "preempted", 26)
        clock.now += 100
        assert source.look() == Notice("gcp", "preempted", 0)


@pytest.mark.parametrize(
    "listed, notice",
    [
        ([], None),
        ([event("Preempt", "workers_2", 40), event("Freeze", "workers_3", 900), event("Reboot", "workers_3", None)], None),
        ([event("Preempt", "workers_2", 20), event("Preempt", "workers_3", 40)], Notice("azure", "Preempt", 40)),
        ([event("Preempt", "workers_3", None)], Notice("azure", "Preempt", 0)),  # it has started
        ([event("Terminate", "workers_3", 300)], Notice("azure", "Terminate", 120)),
        ([event("Terminate", "workers_3", 300), event("Preempt", "workers_3", 35)], Notice("azure", "Preempt", 35)),
    ],
)
def test_azure_events_count_that_take_this_machine_away(listed, notice):
    with served(AzureCloud(), Azure) as (cloud, source, _):
        cloud.body = events(*listed)
        assert source.look() == notice
        source.look()
        assert sum("compute/name" in asked for asked in cloud.asked) == 1


GARBAGE = {
    "aws": ["", "<html>", "[]", "null", '{"time": "2017-09-18T08:22:00Z"}', '{"action": "dance"}', "[" * 100_000],
    "gcp": ["", "MAYBE", "<html>"],
    "azure": ["", "<html>", "{}", '{"Events": [null]}', '{"Events": 3}', '{"Events": [{"EventType": "Preempt"}]}'],
}
PAIRS = {"aws": (AwsCloud, Aws), "gcp": (GcpCloud, Gcp), "azure": (AzureCloud, Azure)}


@pytest.mark.parametrize("name, body", [(name, body) for name, bodies in GARBAGE.items() for body in bodies])
def test_garbage_is_no_answer(name, body):
    cloud, source = PAIRS[name]
    with served(cloud(), source) as (cloud, source, _):
        assert source.look() is None
        cloud.body = body
        with pytest.raises(NoAnswer, match=f"^The {name} metadata endpoint at {cloud.url} answers what cannot be read"):
            source.look()
        cloud.body, cloud.status = None, 503
        with pytest.raises(NoAnswer, match="status 503"):
            source.look()
        cloud.status = 200
        assert source.look() is None


def test_a_token_of_garbage_is_not_kept():
    with served(AwsCloud(), Aws) as (cloud, source, _):
        faithful = cloud.answer
        cloud.answer = lambda method, path, headers: (200, "<html>\n<body>")
        with pytest.raises(NoAnswer, match="a token that fits in no header"):
            source.look()
        cloud.answer = faithful
        assert source.look() is None


def test_a_machine_without_a_name_is_no_answer():
    """No event could name it, so none would ever count."""
    with served(AzureCloud(), Azure) as (cloud, source, _):
        faithful = cloud.answer
        cloud.answer = lambda method, path, headers: (200, "") if "name" in path else faithful(method, path, headers)
        with pytest.raises(NoAnswer, match="status 200, 0 characters"):
            source.look()


def test_another_machines_gcp_is_not_believed():
    """Without the flavour in its answer it is some other server."""
    with served(GcpCloud(), Gcp) as (cloud, source, _):
        cloud.headers, cloud.body = {}, "TRUE"
        with pytest.raises(NoAnswer):
            source.look()


def test_a_web_proxy_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with served(GcpCloud(), Gcp) as (_, source, _):
        assert source.look() is None


# Which cloud


@pytest.mark.parametrize("name", PAIRS)
def test_auto_finds_the_cloud_that_answers(name):
    cloud, source = PAIRS[name]
    with cloud() as cloud:
        assert type(find_source("auto", cloud.url)) is source


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
from massl_ray.on_ray.spot import Notice, RayNode, Undrainable

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
