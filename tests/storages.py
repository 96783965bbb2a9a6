"""Places to store things in, as tests need them: this disk, fsspec's memory, and an S3 server of our own."""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from massl_ray.storage import Folder, _connect


def in_memory() -> Folder:
    """A folder of its own in fsspec's memory file system, which one process has once."""
    return Folder(f"memory://{uuid.uuid4().hex}/run")


def on_s3(options: str) -> Folder:
    """A folder of its own on the server of `s3_server`."""
    return Folder(f"s3://bucket/{uuid.uuid4().hex}/run?{options}")


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto server on a free port of loopback, as the options that an s3:// URI needs."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        assert server.stderr
        try:
            address = next(line.split("http://")[1].strip() for line in server.stderr if "Running on" in line)
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that it never waits for us to read
            options = f"endpoint_override={address}&scheme=http"
            _connect(f"s3://bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
            yield options
        finally:
            server.terminate()
            server.wait()
            server.stderr.close()
