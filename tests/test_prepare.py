"""massl-ray prepare: the command on a real Ray, ended and run again, to a disk and to S3."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from massl_ray.data.preparing import begin
from massl_ray.data.sources import open_source
from massl_ray.on_ray.prepare import do_parts
from massl_ray.prepare import main
from massl_ray.storage import Folder
from massl_ray.training.lock import hold
from tests.helpers import names
from tests.sources import encoded_images, write_folder
from tests.storages import on_s3, s3_server
from tests.test_train import plain_environment

IMAGES = encoded_images(24, side=90)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = write_folder(tmp_path / "source", IMAGES)
    (folder / "cat" / "002.png").write_bytes(b"")
    return folder


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "massl_ray.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=plain_environment() | environment)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], "there is no folder or file"),
        (["source", "source"], "holds something else already"),
        (["source", "out", "--max-skipped", "0.01"], "1 of the 24 images tried"),
        (["source", "s3n://bucket/out"], "s3n://bucket/out cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(source, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(source.parent)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("flags", [["--shard-mb", "0"], ["--max-side", "-1"], ["--shard-mb", "many"]])
def test_values_out_of_range(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["source", "out", *flags])
    assert ended.value.code == 2 and "usage: massl-ray prepare" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_the_command(source, tmp_path):
    first = run(source, tmp_path / "out")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith(f"Images    24 in {source}") and f"          {source}/cat/002.png: " in first.stdout
    assert lines[-1] == f"Shards    1 in {tmp_path}/out; train on them with --data.source {tmp_path}/out"
    images = open_source(str(tmp_path / "out"))
    assert len(images) == 23 and "cat/002.png" not in names(images) and images.read(1) == IMAGES[4]
    again = run(source, tmp_path / "out")
    assert again.returncode == 0 and again.stdout == f"All images of {source} are in {tmp_path}/out already.\n"


def test_two_at_once(source, tmp_path, capsys):
    """The second one is refused before it does any work."""
    begin(open_source(str(source)), Folder(tmp_path / "out"), None, 64)
    with hold(tmp_path / "out"):
        assert main([str(source), str(tmp_path / "out")]) == 2
    words = f"massl-ray: {tmp_path}/out is in use by process {os.getpid()} on "
    assert capsys.readouterr().err.startswith(words) and not list((tmp_path / "out").glob("shard*"))


@pytest.mark.ray
@pytest.mark.slow
def test_ended_and_run_again(tmp_path):
    """Killed in the middle: what was done is kept, and the result is that of a run that was not."""
    source = write_folder(tmp_path / "source", encoded_images(2_000, side=90))
    assert run(source, tmp_path / "whole", "--shard-mb", 1).returncode == 0
    command = [sys.executable, "-m", "massl_ray.prepare", str(source), str(tmp_path / "out"), "--shard-mb", "1"]
    first = subprocess.Popen(command, env=plain_environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out" / ".work").glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130 and not (tmp_path / "out" / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.arrow") if _done(path)}
    assert kept
    assert run(source, tmp_path / "out", "--shard-mb", 1).returncode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert (tmp_path / "out" / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]) == 50


def _done(shard: Path) -> bool:
    return (shard.parent / ".work" / f"{shard.stem}.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_from_s3_to_s3(source, tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    with s3_server() as options:
        there = on_s3(options)
        for path in source.rglob("*.png"):
            there.upload(path, str(path.relative_to(source)))
        out = on_s3(options)
        done = run(there, out, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
        assert done.returncode == 0, done.stderr
        images = open_source(str(out))
        assert len(images) == 23 and images.read(1) == IMAGES[4]
        assert len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) == 1


@pytest.mark.ray
def test_what_a_task_raises_is_raised(ray_cluster, source, tmp_path):
    images, folder = open_source(str(source)), Folder(tmp_path / "out")
    plan = begin(images, folder, None, 1)
    assert plan
    (tmp_path / "out" / "shard-00000.arrow").mkdir()
    (tmp_path / "out" / "shard-00000.arrow" / "x").touch()
    parts = do_parts(images, folder, plan)
    assert next(parts) == 0
    with pytest.raises(OSError):
        next(parts)
    os.unlink(tmp_path / "out" / "shard-00000.arrow" / "x")
    (tmp_path / "out" / "shard-00000.arrow").rmdir()
    assert list(do_parts(images, folder, plan)) == [0, 24]
    assert list(do_parts(images, folder, plan)) == [24]
