"""Ray's own autoscaler on this machine, with a cloud whose machines are processes. For rehearsals and tests; Linux only."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from massl_ray.on_ray.cluster import environment, guard
from massl_ray.on_ray.knobs import HEAD

HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # what the provider calls the head
MARK = "MASSL_RAY_FAKE_CLOUD"  # in the environment of every process of ours, so that only those are ended
OBJECTS = 150 * 2**20  # bytes of each machine's object store
START_S = 60.0
GONE_S = 15.0  # for processes that were asked to end


class FakeCloud:
    """A head without CPUs, which holds the command and the dashboard, and machines of one CPU that its autoscaler starts and ends.

    Attributes:
        address: of Ray's head, HOST:PORT.
        dashboard: URL that `ray job` takes.
        environment: for commands that use this cluster.
    """

    def __init__(self, machines: int, *, max_machines: int, idle_s: float = 10.0):
        """`machines`: that the cloud has at first. `max_machines`: that the autoscaler may ask for."""
        self.mark = uuid.uuid4().hex
        self.scratch = TemporaryDirectory(prefix="mr-", ignore_cleanup_errors=True)  # short: Ray's sockets lie inside
        gcs, dashboard, agent, client = _free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.capacity = Path(self.scratch.name) / "capacity"
        self.allow(machines)
        config = Path(self.scratch.name) / "cluster.json"
        config.write_text(json.dumps(_launcher_file(self.address, self.capacity, max_machines, idle_s)))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # jobs say `python`
        self.guard = guard()
        guarded = {name: value for name, value in self.guard.items() if value is not None}
        self.environment = plain | guarded | {"RAY_API_SERVER_ADDRESS": self.dashboard, "PATH": path, MARK: self.mark}
        command = [
            *ray_command("start", "--head", "--block", "--num-cpus=0", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
            f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", f"--temp-dir={self.scratch.name}", f"--object-store-memory={OBJECTS}",
            f"--autoscaling-config={config}",
        ]  # fmt: skip
        self.log = Path(self.scratch.name) / "head.log"
        with self.log.open("wb") as log:
            self.head = subprocess.Popen(command, env=self.environment | self._of_head(), stdout=log, stderr=log)
        try:
            self._wait_for_head()
        except BaseException:
            self.close()
            raise

    def allow(self, machines: int) -> None:
        """How many machines the cloud has at most, from now on."""
        _write_aside(self.capacity, str(machines))

    def machines(self) -> list[str]:
        """Ids of the machines that live, without the head."""
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

        with environment(self.guard):
            nodes = GcsClient(address=self.address).get_all_node_info(timeout=10)
        return [node.node_id.hex() for node in nodes.values() if node.state == 0 and not node.is_head_node]

    def kill(self, machine: str) -> None:
        """All processes of that machine vanish, as with its power."""
        for pid in _processes({MARK: self.mark, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": machine}):
            _signal(pid, signal.SIGKILL)

    def ray(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A `ray` command on this cluster."""
        return subprocess.Popen(
            ray_command(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )

    @contextmanager
    def spot_watcher(self, machine: str) -> Iterator[threading.Event]:
        """`python -m massl_ray.on_ray.spot` for that machine, whose metadata endpoint gives notice once the event is set."""
        notice = threading.Event()
        with _metadata_endpoint(notice) as url:
            watcher = "massl_ray.on_ray.spot", "--cloud", "gcp", "--metadata-url", url, "--poll", "0.2"
            command = [sys.executable, "-m", *watcher, "--ray-address", self.address, "--node-id", machine]
            process = subprocess.Popen(command, env=self.environment)
            try:
                yield notice
            finally:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End what was started here, and nothing else."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.head.poll() is None:
                self.head.send_signal(number)
            deadline = time.monotonic() + GONE_S
            while (left := _processes({MARK: self.mark})) and time.monotonic() < deadline:
                for pid in left:
                    _signal(pid, number)
                time.sleep(0.2)
        self.head.wait()
        self.scratch.cleanup()

    def _of_head(self) -> dict[str, str]:
        knobs = {f"RAY_{name}": str(value) for name, value in (HEAD | {"worker_niceness": 0}).items()}
        return knobs | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_TMPDIR": self.scratch.name,  # where `ray start` writes down its address, over that of another Ray otherwise
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + START_S
        while "--block" not in self.log.read_text():  # the last thing it says once everything is up
            if self.head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`ray start --head` did not come up within {START_S:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.1)


def _launcher_file(address: str, capacity: Path, max_machines: int, idle_s: float) -> dict[str, Any]:
    """What stands in cluster/*.yaml, for machines of this computer."""
    machine = {"CPU": 1, "object_store_memory": OBJECTS}
    provider = {
        "type": "external",
        "module": "massl_ray.on_ray.fake_provider.SpotProvider",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "capacity_file": str(capacity),
    }
    return {
        "cluster_name": "rehearsal",
        "max_workers": max_machines,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 10.0,
        "provider": provider,
        "auth": {},
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "spot": {"resources": machine, "node_config": {}, "min_workers": 0, "max_workers": max_machines},
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
    } | {name: [] for name in _LISTS}


_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.replace(path)


def ray_command(*arguments: str) -> Sequence[str]:
    """Ray's command line of this Python."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


@contextmanager
def _metadata_endpoint(notice: threading.Event) -> Iterator[str]:
    """What Compute Engine's metadata server says of preemption."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"TRUE" if notice.is_set() else b"FALSE"
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _processes(environment: Mapping[str, str]) -> list[int]:
    """Ids of living processes, but this one, that have all of these in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            dead = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not dead and wanted <= set(folder.joinpath("environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:  # it ended, or is somebody else's
            continue
    return [pid for pid in found if pid != os.getpid()]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
