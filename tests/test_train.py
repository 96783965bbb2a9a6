"""The command as a user meets it: bad input is one sentence and exit code 2; a run, interrupted, continues; a Ray job works."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from massl_ray.train import main
from tests.images import TINY, write_images


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the command in this process; it must end with code 2 and one sentence, and Ray must not have started."""

    def refused(*flags: str) -> str:
        import ray

        started = ray.is_initialized()
        code = main([*TINY, "--run.dir", str(tmp_path / "run"), *flags])
        captured = capsys.readouterr()
        assert code == 2 and ray.is_initialized() == started
        assert captured.out == "" and captured.err.startswith("massl-ray: ") and captured.err.count("\n") == 1
        return captured.err

    return refused


def test_missing_folder(refused, tmp_path):
    assert f"there is no folder or file {tmp_path / 'nowhere'}" in refused("--data.source", str(tmp_path / "nowhere"))


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert f"no image files in {tmp_path / 'empty'}" in refused("--data.source", str(tmp_path / "empty"))


def test_folder_without_a_readable_image(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    for number in range(3):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"nothing to see")
    assert "none of the 3 images tried" in refused("--data.source", str(tmp_path / "broken"))


def test_unknown_key(refused):
    assert "the nearest is 'memory.num_blocks'" in refused("--memory.blocks", "3")


def test_value_out_of_range(refused):
    assert "optim.lr is '-1'" in refused("--optim.lr", "-1")


def test_memory_smaller_than_its_blocks(refused, tiny_images):
    message = refused("--data.source", str(tiny_images), "--memory.size", "8", "--memory.num_blocks", "8")
    assert "memory.size 8 is too small" in message and "raise memory.size to 16" in message


def test_unknown_timm_name(refused, tiny_images):
    message = refused("--data.source", str(tiny_images), "--model.backbone", "vit_smal_patch16_224")
    assert "'vit_smal_patch16_224' is no timm model" in message and "vit_small_patch16_224" in message


def test_run_directory_of_another_configuration(refused, tiny_images, tmp_path):
    from massl_ray.config import load
    from massl_ray.training.run import claim_directory, prepare_run

    flags = ["--data.source", str(tiny_images)]
    claim_directory(prepare_run(load([*TINY, "--run.dir", str(tmp_path / "run"), *flags])))
    message = refused(*flags, "--optim.lr", "0.25")
    assert "optim.lr is 0.0005 there and 0.25 now" in message
    assert "Choose another --run.dir, or continue that run with --config" in message


def test_more_workers_than_micro_batches(refused, tiny_images):
    assert "only 4 micro-batches" in refused(
        "--data.source", str(tiny_images), "--elastic.min_workers", "5", "--elastic.max_workers", "5"
    )


# ---- whole runs, each a process of its own -----------------------------------------------------------------------------


def plain_environment() -> dict[str, str]:
    """The environment without what this test session told its own Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def massl_ray(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "massl_ray.train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain_environment())


@pytest.mark.ray
@pytest.mark.slow
def test_interrupted_and_run_again(tmp_path):
    """A folder of images, Ctrl-C in the middle, the same command again: it continues at its checkpoint and finishes."""
    folder = write_images(tmp_path / "images", 48)
    (folder / "ramps" / "broken.png").write_bytes(b"no image")
    flags = [*TINY, "--data.source", str(folder), "--run.dir", str(tmp_path / "run"), "--train.steps", "200"]

    first = massl_ray(*flags)
    assert first.stdout is not None
    printed = []
    for line in first.stdout:
        printed.append(line)
        if line.startswith("step "):
            first.send_signal(signal.SIGINT)
            break
    printed += first.stdout.readlines()
    assert first.wait() == 130, "".join(printed)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert "Run the same command again" in printed[-1]
    saved = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert 0 < saved < 200

    second = massl_ray(*flags)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert f"Continuing after step {saved}" in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 200 and summary["images_seen"] == 1600
    assert summary["knn_final"] is not None and summary["knn_untrained"] is not None
    assert "broken.png" in (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "Skipped   1 unreadable image" in output
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000


@pytest.fixture
def ray_head(tmp_path_factory):
    """A head node on loopback as `ray start --head` makes it, ended by its process id."""
    folder = tmp_path_factory.mktemp("head")
    ports = free_ports(4)
    environment = plain_environment() | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
        f"--ray-client-server-port={ports[3]}", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    head = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert head.stdout is not None
    for line in head.stdout:
        if "--block" in line:  # the last thing it says once everything is up
            break
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    head.terminate()
    head.wait()


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.mark.ray
@pytest.mark.slow
def test_ray_job(ray_head, tmp_path):
    """`ray job submit` trains and exits 0 with plain lines; a run that fails exits with another code."""
    repository = Path(__file__).parents[1]
    submit = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--working-dir",
        ".",
        "--",
        sys.executable,
        "-m",
        "massl_ray.train",
    ]
    run_dir = tmp_path / "job"
    flags = ["--preset", "demo", "--train.steps", "4", "--train.log_every", "2", "--run.dir", str(run_dir)]
    done = subprocess.run([*submit, *flags], env=ray_head, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4" in done.stdout and "\x1b[2K" not in done.stdout
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4

    failed = subprocess.run([*submit, "--data.source", "nowhere"], env=ray_head, cwd=repository, capture_output=True, text=True)
    assert failed.returncode != 0 and "there is no folder or file" in failed.stdout
