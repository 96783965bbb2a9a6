"""This machine as the doctor sees it, whole and broken."""

import socket
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from massl_ray.checkup import machine
from massl_ray.checkup.machine import (
    check_cuda,
    check_ports,
    check_python,
    check_shared_memory,
    check_token,
    check_version,
    listening,
)
from massl_ray.config import load

Space = namedtuple("Space", "total used free")
Version = namedtuple("Version", "major minor micro")


def test_python(monkeypatch):
    assert check_python().severity == "ok"
    monkeypatch.setattr(sys, "version_info", Version(3, 10, 4))
    assert (check_python().severity, check_python().sentence) == ("error", "Python is 3.10, massl-ray needs 3.11 or newer.")


def test_versions(monkeypatch):
    assert check_version("ray").severity == "ok" and check_version("torch").severity == "ok"
    monkeypatch.setattr(metadata, "version", lambda package: "2.61.0")
    found = check_version("ray")
    assert found.severity == "error" and found.sentence.startswith("ray is 2.61.0, massl-ray needs ") and found.remedy

    def missing(package):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert (check_version("torch").severity, check_version("torch").sentence) == ("error", "torch is not installed.")
    monkeypatch.setattr(metadata, "requires", missing)  # a copy that was not installed
    assert check_version("ray").remedy == "pip install 'ray'."


def test_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_cuda(load(["--train.device", "cuda"]), elsewhere=False).severity == "error"
    assert check_cuda(load(["--train.device", "cuda"]), elsewhere=True).severity in ("note", "warning")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert "Training would use CPUs." in check_cuda(load([]), elsewhere=False).sentence
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    found = check_cuda(load([]), elsewhere=False)
    assert found.severity == "warning" and "torch cannot use it" in found.sentence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L4")
    assert check_cuda(load([]), elsewhere=False).sentence.startswith("torch finds 2 GPU: NVIDIA L4 (CUDA ")


@pytest.mark.parametrize(
    ("environment", "file", "severity", "words"),
    [
        ({}, False, "ok", "Neither RAY_AUTH_MODE nor a token"),
        ({}, True, "warning", "`ray job` does not send it and ends with AuthenticationError"),
        ({"RAY_AUTH_TOKEN": "secret"}, False, "warning", "There is a token (RAY_AUTH_TOKEN) but RAY_AUTH_MODE is not set"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "RAY_AUTH_MODE is token, with a token in"),
        ({"RAY_AUTH_MODE": "TOKEN"}, False, "warning", "RAY_AUTH_MODE is token, but there is none"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "ok", "RAY_AUTH_MODE is disabled"),
        ({"RAY_AUTH_MODE": "on"}, True, "error", "RAY_AUTH_MODE is 'on', which Ray does not know"),
    ],
)
def test_tokens(tmp_path, environment, file, severity, words):
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    found = check_token(environment, tmp_path)
    assert found.severity == severity and words in found.sentence and "secret" not in found.sentence


def test_a_token_at_another_path(tmp_path):
    (tmp_path / "mine").write_text("x")
    assert check_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "mine")}, tmp_path / "nobody").severity == "warning"


def test_shared_memory(monkeypatch, tmp_path):
    """Ray wants 30 % of the memory."""
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10e9)
    monkeypatch.setattr(machine, "SHM", tmp_path)
    for free, severity in ((3.1e9, "ok"), (2.9e9, "warning")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, free=free: Space(4e9, 4e9 - free, free))
        assert check_shared_memory().severity == severity
    assert "has 2.9 GB free of 4.0; Ray wants 3.0 GB" in check_shared_memory().sentence
    assert "--shm-size=3g" in check_shared_memory().remedy
    monkeypatch.setattr(machine, "SHM", tmp_path / "none")
    assert check_shared_memory().severity == "note"


@pytest.fixture
def listener():
    """A socket that listens, at an address of choice."""
    sockets = []

    def listen(address: str) -> int:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sockets.append(socket.socket(family))
        sockets[-1].bind((address, 0))
        sockets[-1].listen()
        return sockets[-1].getsockname()[1]

    yield listen
    for each in sockets:
        each.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_who_listens(listener, address):
    own = Path("/proc/self/comm").read_text().strip()
    assert listening(listener(address)) == [(address, own)]
    assert listening(1) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_ports(monkeypatch, listener):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(machine, "PORTS", {free.getsockname()[1]: "Ray's head"})
        (found,) = check_ports()
    assert found.severity == "ok"
    inside, outside = listener("127.0.0.1"), listener("0.0.0.0")
    monkeypatch.setattr(machine, "PORTS", {inside: "Ray's head", outside: "Ray's head"})
    assert [finding.severity for finding in check_ports()] == ["note", "note"]
    monkeypatch.setattr(machine, "DASHBOARD", outside)
    closed, open_ = check_ports()
    assert closed.severity == "note" and f"Port {inside} (Ray's head) is taken by " in closed.sentence
    assert open_.severity == "error" and "listens on every network" in open_.sentence
