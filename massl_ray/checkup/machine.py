"""This machine: versions, memory that processes share, ports, and how Ray asks for tokens."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from massl_ray.config import Config
from massl_ray.planning.checks import OPEN, Finding
from massl_ray.planning.here import memory_bytes

SHM = Path("/dev/shm")
STORE_SHARE = 0.3  # of the memory that Ray wants for its object store (ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION)
STORE_MOST = 200e9  # bytes, DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES
DASHBOARD = 8265
PORTS = {6379: "Ray's head", DASHBOARD: "Ray's dashboard"}
LISTENING = "0A"  # state of a socket in /proc/net/tcp


def check_machine(config: Config, elsewhere: bool) -> list[Finding]:
    """`elsewhere`: the run is for a cluster, so what this machine lacks for training is no error."""
    return [
        check_python(),
        check_version("ray"),
        check_version("torch"),
        check_cuda(config, elsewhere),
        check_token(os.environ, Path.home()),
        *([] if elsewhere else [check_shared_memory()]),
        *check_ports(),
    ]


def check_python() -> Finding:
    version = sys.version_info
    if version < (3, 11):
        text = f"Python is {version[0]}.{version[1]}, massl-ray needs 3.11 or newer."
        return Finding("python", "error", text, "Make the environment anew with a newer Python.")
    return Finding("python", "ok", f"Python {version[0]}.{version[1]}.{version[2]}.")


def check_version(package: str) -> Finding:
    """Installed, and in the range that massl-ray was made for."""
    try:
        needs = [Requirement(each) for each in metadata.requires("massl-ray") or []]
    except metadata.PackageNotFoundError:  # a copy that was not installed
        needs = []
    wanted = next((need for need in needs if need.name == package and not need.marker), Requirement(package))
    mend = f"pip install '{wanted}'"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(package, "error", f"{package} is not installed.", f"{mend}.")
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(package, "error", f"{package} is {version}, massl-ray needs {wanted.specifier}.", f"{mend}.")
    return Finding(package, "ok", f"{package} {version}" + (f", as {wanted.specifier} asks." if wanted.specifier else "."))


def check_cuda(config: Config, elsewhere: bool) -> Finding:
    """Whether torch finds the GPUs that the configuration wants."""
    import torch  # late: it takes seconds to import

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
        return Finding(
            "cuda", "ok", f"torch finds {torch.cuda.device_count()} GPU: {', '.join(names)} (CUDA {torch.version.cuda})."
        )
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if config.train.device == "cuda" and not elsewhere:
        return Finding(
            "cuda",
            "error",
            f"train.device is cuda, but torch finds no GPU here ({built}).",
            "Mend the driver or install a torch with CUDA; or set train.device to auto.",
        )
    if Path("/dev/nvidia0").exists():
        return Finding(
            "cuda",
            "warning",
            f"There is an NVIDIA GPU, but torch cannot use it ({built}).",
            "Update the driver, or install a torch built for its CUDA version.",
        )
    return Finding("cuda", "note", f"There is no GPU here ({built})." + ("" if elsewhere else " Training would use CPUs."))


def check_token(environment: Mapping[str, str], home: Path) -> Finding:
    """How `ray start` and `ray job` would agree about tokens.

    Source: ray/_private/authentication/authentication_token_setup.py of Ray 2.60. Without RAY_AUTH_MODE `ray start` turns tokens on
    where it finds one (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token), `ray job` does not and is refused.
    """
    mode = environment.get("RAY_AUTH_MODE")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    token = "RAY_AUTH_TOKEN" if environment.get("RAY_AUTH_TOKEN") else str(path) if path.is_file() else None
    if mode is None and token:
        return Finding(
            "ray token",
            "warning",
            f"There is a token ({token}) but RAY_AUTH_MODE is not set: `ray start` asks for it, `ray job` does not send it and "
            "ends with AuthenticationError.",
            "export RAY_AUTH_MODE=token before both (or disabled, where nobody else reaches the machine).",
        )
    if mode is None:
        return Finding(
            "ray token", "ok", "Neither RAY_AUTH_MODE nor a token: `ray start` and `ray job` agree, without authentication."
        )
    if mode.lower() not in ("token", "disabled"):
        return Finding("ray token", "error", f"RAY_AUTH_MODE is '{mode}', which Ray does not know.", "Set it to token or disabled.")
    if mode.lower() == "token" and not token:
        return Finding(
            "ray token",
            "warning",
            f"RAY_AUTH_MODE is token, but there is none at {path}: `ray job` ends with AuthenticationError.",
            "ray get-auth-token --generate, and the same token on every machine.",
        )
    return Finding("ray token", "ok", f"RAY_AUTH_MODE is {mode}" + (f", with a token in {token}." if token else "."))


def check_shared_memory() -> Finding:
    """Ray's object store lies in /dev/shm; where that is too small it is slow."""
    if not SHM.is_dir():
        return Finding("shared memory", "note", f"There is no {SHM} here: Ray keeps its objects in files.")
    space = shutil.disk_usage(SHM)
    wanted = min(STORE_MOST, STORE_SHARE * memory_bytes())
    size = f"{SHM} has {space.free / 1e9:.1f} GB free of {space.total / 1e9:.1f}"
    if space.free < wanted:
        return Finding(
            "shared memory",
            "warning",
            f"{size}; Ray wants {wanted / 1e9:.1f} GB for images on their way to workers, and spills to disk beyond what there is.",
            f"Enlarge it: docker run --shm-size={wanted / 1e9:.0f}g, or a Memory emptyDir at /dev/shm in Kubernetes.",
        )
    return Finding("shared memory", "ok", f"{size}; Ray wants {wanted / 1e9:.1f} GB.")


def check_ports() -> Iterator[Finding]:
    """Whether the ports of `ray start --head` are free, or who has them; and that the dashboard is not open to the network."""
    for port, what in PORTS.items():
        if not _answers(port):
            yield Finding("ports", "ok", f"Port {port} ({what}) is free.")
            continue
        listeners = listening(port)
        owners = sorted({name for _, name in listeners if name}) or ["a process that cannot be seen"]
        if port == DASHBOARD and any(address in OPEN for address, _ in listeners):
            yield Finding(
                "ports",
                "error",
                f"Port {port} ({what}; {', '.join(owners)}) listens on every network: whoever reaches it can run anything here.",
                "Start the head without --dashboard-host (it is 127.0.0.1 then), and use an SSH tunnel.",
            )
        else:
            yield Finding(
                "ports",
                "note",
                f"Port {port} ({what}) is taken by {', '.join(owners)}.",
                "That is well if it is your Ray cluster (RAY_ADDRESS=auto uses it); otherwise choose others for `ray start`.",
            )


def listening(port: int) -> list[tuple[str, str | None]]:
    """(address, name of the process or None) of each socket that listens on a port of this machine. Linux; elsewhere nothing."""
    sockets: dict[str, str] = {}  # inode: address
    for table, width in (("/proc/net/tcp", 8), ("/proc/net/tcp6", 32)):
        lines = Path(table).read_text().splitlines()[1:] if Path(table).exists() else []
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if int(number, 16) == port and fields[3] == LISTENING:
                sockets[fields[9]] = _address(address) if width == len(address) else address
    names = _owners(set(sockets))
    return [(address, names.get(inode)) for inode, address in sockets.items()]


def _address(words: str) -> str:
    """Of /proc/net: words of 32 bits in the machine's order."""
    data = b"".join(bytes.fromhex(words[place : place + 8])[::-1] for place in range(0, len(words), 8))
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, data)


def _owners(inodes: set[str]) -> dict[str, str]:
    """Names of the processes that hold sockets; of other users' they cannot be seen."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
            inode = target.removeprefix("socket:[").rstrip("]")
            if target.startswith("socket:") and inode in inodes:
                found[inode] = (link.parents[1] / "comm").read_text().strip()
        except OSError:  # it ended, or is another user's
            continue
    return found


def _answers(port: int) -> bool:
    with socket.socket() as connection:
        connection.settimeout(0.5)
        return connection.connect_ex(("127.0.0.1", port)) == 0
