"""The clouds' endpoints: what is a notice, when it ends, and what is no answer."""

import socketserver
import threading
import time

import pytest

from massl_ray.on_ray.clouds import ANSWER_S, Aws, Azure, Gcp, NoAnswer, Notice, find_source
from tests.clouds import AwsCloud, AzureCloud, GcpCloud, action, event, events, served


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


def test_an_endpoint_that_drips_holds_nobody():
    """A byte every 50 ms, each within the time that a byte may take."""
    over = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(0.05):
                try:
                    self.request.sendall(b"x")
                except OSError:
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            started = time.monotonic()
            with pytest.raises(NoAnswer):
                Aws(f"http://127.0.0.1:{server.server_address[1]}").probe()
            assert time.monotonic() - started < ANSWER_S + 20
        finally:
            over.set()
            server.shutdown()
