"""One run at a time in a run directory; one `massl-ray prepare` in a folder of shards."""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from massl_ray.errors import UserError
from massl_ray.storage import Folder, Place, reason

LOCK = ".lock"
INTERVAL_S = 5.0  # between signs of life
JOIN_S = 10.0  # for a sign of life that is just being written: it must not come after the lock is gone
SILENT = 3  # intervals without a sign of life after which a holder is taken for dead


def _print(text: str) -> None:
    print(f"massl-ray: {text}", file=sys.stderr)


@contextmanager
def hold(folder: Place, interval_s: float = INTERVAL_S, note: Callable[[str], None] = _print) -> Iterator[threading.Event]:
    """Hold a folder for as long as this lasts. Gives an event that is set if another run took it over meanwhile, which
    can happen only away from local disks, to a run that showed no sign of life for SILENT intervals of `interval_s` seconds.

    On a local disk the kernel holds the lock and frees it when the process ends, however it ends. Elsewhere an object in the
    folder changes every interval; a newcomer watches whether it does, so no two clocks are compared.

    Raises UserError, naming the holder where it is known, if another run holds the folder.
    """
    folder = Folder(folder)
    file = _flock(folder) if folder.is_local else None
    if file is None:
        with _heartbeat(folder, interval_s, note) as lost:
            yield lost
        return
    try:
        yield threading.Event()
    finally:
        file.truncate(0)  # the file stays: a newcomer may have it open already
        file.close()


def _flock(folder: Folder):
    """The locked file, or None where the file system knows no such locks."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = open(folder.path / LOCK, "a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be locked ({reason(error)}). Choose another folder.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        held = file.read()
        file.close()
        raise _in_use(folder, held) from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(_content())
    file.flush()
    return file


@contextmanager
def _heartbeat(folder: Folder, interval_s: float, note: Callable[[str], None]) -> Iterator[threading.Event]:
    token, lost, done = uuid.uuid4().hex, threading.Event(), threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(interval_s):
            with suppress(OSError):  # storage fails for a while: the next one may get through
                if not _is_ours(folder, token):
                    lost.set()
                    note(f"Another run took over {folder}, which showed no sign of life from this one. Stop one of them.")
                    return
                count += 1
                folder.write_text(LOCK, _content(token=token, count=count))

    try:
        _await_silence(folder, interval_s, note)
        folder.write_text(LOCK, _content(token=token, count=0))
        if not _is_ours(folder, token):  # another newcomer at the same moment; if it writes later still, the first beat tells
            raise _in_use(folder, _read(folder) or "")
    except OSError as error:
        raise UserError(f"{folder} cannot be locked ({reason(error)}). Choose another folder.") from None
    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield lost
    finally:
        done.set()
        thread.join(max(interval_s, JOIN_S))
        with suppress(OSError):
            if not lost.is_set() and _is_ours(folder, token):
                folder.delete(LOCK)


def _await_silence(folder: Folder, interval_s: float, note: Callable[[str], None]) -> None:
    """Return once nobody holds the lock. Raises UserError as soon as a holder shows that it lives."""
    found = _read(folder)
    if found is not None:
        note(f"{folder} was locked by {_holder(found)}. Watching for {SILENT * interval_s:.0f} s whether it still runs.")
    for _ in range(SILENT):
        if found is None:
            return
        time.sleep(interval_s)
        now = _read(folder)
        if now not in (found, None):
            raise _in_use(folder, now or "")
        found = now


def _content(**more: object) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **more})


def _read(folder: Folder) -> str | None:
    try:
        return folder.read_text(LOCK) or None
    except FileNotFoundError:
        return None


def _is_ours(folder: Folder, token: str) -> bool:
    """Whether the lock carries our token; also where it is missing, so that the next beat puts it back."""
    found = _read(folder)
    return found is None or token in found


def _holder(content: str) -> str:
    try:
        held = json.loads(content)
        return f"process {held['pid']} on {held['host']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _in_use(folder: Folder, content: str) -> UserError:
    return UserError(f"{folder} is in use by {_holder(content)}. Wait until it has ended, stop it, or choose another folder.")
