"""Metadata endpoints on loopback that behave as the clouds' do."""

import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
