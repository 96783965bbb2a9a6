"""A job on Ray's own autoscaler, from no machine to none: what `ray job` promises, and that nothing of ours is left behind."""

import json
import signal
import time
from collections.abc import Callable

import pytest

from massl_ray.on_ray.fake_cloud import MARK, FakeCloud, _processes
from massl_ray.training.checkpoint import list_checkpoints, read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def until(happened: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.25)


def test_a_job_from_no_machine_to_none(tmp_path):
    """A machine comes for the job; who watches may leave; `ray job stop` leaves a last checkpoint; the machine goes away."""
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    cloud = FakeCloud(1, max_machines=1, idle_s=3.0)
    try:
        assert cloud.machines() == []
        flags = ["--preset", "demo", "--run.dir", str(run_dir), "--train.steps", "5000", "--train.log_every", "1"]
        train = ["python", "-m", "massl_ray.train", *flags, "--eval.knn_every", "0"]
        watching = cloud.ray("job", "submit", "--submission-id", "one", "--", *train)
        until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
        watching.send_signal(signal.SIGINT)  # Ctrl-C of the client
        watching.communicate()
        seen = metrics.read_text().count("\n")
        until(lambda: metrics.read_text().count("\n") > seen + 3)

        stopped, _ = cloud.ray("job", "stop", "one").communicate(timeout=300)
        assert "was stopped" in stopped
        last = list_checkpoints(run_dir / "checkpoints")[-1]
        step = json.loads(metrics.read_text().splitlines()[-1])["step"]
        assert last.name == f"step_{step}" and read_manifest(last)["step"] == step
        logs, _ = cloud.ray("job", "logs", "one").communicate(timeout=300)
        assert "Stopped. Run the same command again" in logs and "\x1b[2K" not in logs
        until(lambda: cloud.machines() == [])
    finally:
        cloud.close()
    assert _processes({MARK: cloud.mark}) == []


def test_a_head_that_does_not_come_up_says_why(monkeypatch):
    monkeypatch.setattr("massl_ray.on_ray.fake_cloud.ray_command", lambda *_: ["sh", "-c", "echo no such head; exit 3"])
    with pytest.raises(RuntimeError, match="did not come up(.|\n)*no such head"):
        FakeCloud(1, max_machines=1)
