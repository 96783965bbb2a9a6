"""Who connects to the cluster of a plain `massl-ray train` without its token can read, write and run nothing on it."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from massl_ray.on_ray import cluster

CALLS = (  # one of each service that a process of Ray's offers; an empty message is a valid one
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/HealthCheck",
)
PAGES = ("/", "/metrics", "/api/jobs/", "/get_or_create_runtime_env")
LISTEN = "0A"  # a state in /proc/net/tcp
SILENT = "no answer"


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A run of two workers on a cluster of its own, in the middle of its steps: its listeners and its token."""
    folder = tmp_path_factory.mktemp("private")
    command = [sys.executable, "-m", "massl_ray.train", "--preset", "demo", "--run.dir", str(folder / "run")]
    flags = {"train.steps": 5000, "train.micro_batch_size": 16, "eval.knn_every": 0, "elastic.max_workers": 2}
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    output = (folder / "output").open("w+")
    process = subprocess.Popen(command, env=plain, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for(folder / "run/metrics.jsonl", process, output)
        pids = _descendants(process.pid)
        environments = [_environment(pid) for pid in pids]
        tokens = {environment["RAY_AUTH_TOKEN"] for environment in environments if "RAY_AUTH_TOKEN" in environment}
        lines = [b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")).decode() for pid in pids]
        yield SimpleNamespace(listeners=_listeners(pids), tokens=tokens, command_lines=lines, folder=folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_strangers_get_nothing_from_any_listener(training):
    (token,) = training.tokens
    known, refused = set(), set()
    for address in training.listeners:
        for page in PAGES:
            assert _page(address, page) in (401, SILENT), (address, page)
        for call in CALLS if _call(address, CALLS[0], None) != SILENT else ():
            for stranger in (None, "0" * len(token)):
                said = _call(address, call, stranger)
                assert said in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED, SILENT), (address, call, said)
                if said == grpc.StatusCode.UNAUTHENTICATED:
                    refused.add(call)
            if _call(address, call, token) is grpc.StatusCode.OK:
                known.add(call)
    assert refused == set(CALLS)  # so each was asked of a process that has it
    assert {CALLS[0], CALLS[2], CALLS[5]} <= known  # which answers those who belong to it


def test_a_stranger_with_ray_itself_is_turned_away(training, tmp_path):
    """With Ray's own client, to the control store, with authentication off on that side."""
    (store,) = [address for address in training.listeners if _call(address, CALLS[0], *training.tokens) is grpc.StatusCode.OK]
    program = f"import ray; ray.init('{store[0]}:{store[1]}'); print(ray.get(ray.remote(lambda: 7).remote()))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = plain | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode and "7" not in done.stdout.split()


def test_its_token_is_in_no_command_line_and_no_file(training):
    (token,) = training.tokens
    assert len(token) == 64 and not any(token in line for line in training.command_lines)
    for path in training.folder.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


def test_every_cluster_has_another_token_and_the_users_stays_theirs(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/mine")
    tokens = []
    for _ in range(2):
        with cluster.private():
            assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
    assert tokens[0] != tokens[1] and os.environ["RAY_AUTH_MODE"] == "disabled"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == "/mine" and "RAY_AUTH_TOKEN" not in os.environ


def _wait_for(path: Path, process: subprocess.Popen, output) -> None:
    deadline = time.monotonic() + 240
    while not (path.exists() and path.stat().st_size):
        output.seek(0)
        assert process.poll() is None and time.monotonic() < deadline, output.read()
        time.sleep(0.2)


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for task in children.parents[1].iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(other for child in found for other in _descendants(child))]


def _environment(pid: int) -> dict[str, str]:
    parts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(part.decode(errors="replace").split("=", 1) for part in parts if b"=" in part)


def _listeners(pids: list[int]) -> list[tuple[str, int]]:
    """Addresses on which any of these processes takes connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN and f"socket:[{rest[5]}]" in sockets:
                host, port = local.split(":")
                packed = bytes.fromhex(host)[::-1] if name == "tcp" else b""
                own = packed and packed != bytes(4)
                found.append((socket.inet_ntoa(packed) if own else "127.0.0.1", int(port, 16)))
    return found


def _page(address: tuple[str, int], page: str) -> int | str:
    connection = http.client.HTTPConnection(*address, timeout=2)
    try:
        connection.request("GET", page)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return SILENT
    finally:
        connection.close()


def _call(address: tuple[str, int], call: str, token: str | None) -> grpc.StatusCode | str:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"{address[0]}:{address[1]}") as channel:
        try:
            channel.unary_unary(call)(b"", timeout=3, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            unavailable = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return SILENT if code in unavailable else code
    return grpc.StatusCode.OK
