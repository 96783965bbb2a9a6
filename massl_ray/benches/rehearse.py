"""`make rehearse`: an elastic run as a job on a cluster whose machines come and go, before any cloud is paid.

Ray's own autoscaler brings machines from none, more are allowed, one is given notice as a spot machine is, one vanishes, the run
ends, the autoscaler takes the idle machines back; and the run ends with the bits of one that nothing happened to. Machines are
processes of this computer. Prints a timeline, and writes it as JSON and as a picture.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from massl_ray.training.checkpoint import list_checkpoints, read_manifest

STEPS = 500  # enough that all happens while it trains, on two cores
LOOK_S = 0.25
NOTICE_S = 30.0  # what Google Cloud gives
PATIENCE_S = 240.0  # for any one thing to happen
FLAGS = {
    "train.micro_batch_size": 16,  # four to share out
    "train.log_every": 1,
    "train.checkpoint_every": 100,
    "eval.knn_every": 0,
    "elastic.max_lost_seconds": 10,
}


@dataclass
class Timeline:
    """What happened, in seconds since the job was submitted."""

    happenings: list[tuple[float, str]] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)
    machines: list[tuple[float, int]] = field(default_factory=list)
    workers: list[tuple[float, int]] = field(default_factory=list)
    transitions: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """Looks at the cluster and at the run directory, and keeps the timeline."""

    def __init__(self, cloud: Any, run_dir: Path, job: subprocess.Popen[str]):
        self.cloud, self.run_dir, self.job = cloud, run_dir, job
        self.timeline = Timeline()
        self.began = time.monotonic()
        self.alive: list[str] = []
        self.step = self.size = 0

    def say(self, what: str) -> None:
        now = time.monotonic() - self.began
        self.timeline.happenings.append((now, what))
        print(f"{now:6.1f} s  step {self.step:>4}  {what}", flush=True)

    def look(self) -> None:
        now = time.monotonic() - self.began
        before, self.alive = self.alive, self.cloud.machines()
        if len(self.alive) != len(before):
            self.timeline.machines.append((now, len(self.alive)))
            self.say(f"{len(before)} -> {len(self.alive)} machines")
        if line := _last_line(self.run_dir / "metrics.jsonl"):
            if line["step"] != self.step:
                self.step = line["step"]
                self.timeline.steps.append((now, self.step))
            if line["world_size"] != self.size:
                self.size = line["world_size"]
                self.timeline.workers.append((now, self.size))
        for one in _lines(self.run_dir / "elastic.jsonl")[len(self.timeline.transitions) :]:
            self.timeline.transitions.append(one)
            pause = f"{one['seconds']:.1f} s, {one['pause_s']:.1f} s without a step, {one['steps_repeated']} steps repeated"
            self.say(f"{one['from']} -> {one['to']} workers ({one['cause']}): {pause}")

    def until(self, what: str, happened: Callable[[], bool], *, over: bool = False) -> None:
        """Raises RuntimeError where it does not happen, or where the job ends first (unless it is `over` anyway)."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: it did not happen within {PATIENCE_S:.0f} s")
            if not over and self.job.poll() is not None:
                raise RuntimeError(f"{what}: the run ended first; give it more --steps if it went too fast")
            time.sleep(LOOK_S)
            self.look()

    def until_steps(self, number: int) -> None:
        goal = self.step + number
        self.until(f"{number} more steps", lambda: self.step >= goal)

    def until_transition(self, cause: str, workers: int) -> None:
        """After the ones that were seen up to now."""
        seen = len(self.timeline.transitions)
        self.until(
            f"{cause}, to {workers} workers",
            lambda: any(one["cause"] == cause and one["to"] == workers for one in self.timeline.transitions[seen:]),
        )


def rehearse(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Everything; returns the figures and the timeline.

    Raises:
        RuntimeError: something did not happen.
    """
    from massl_ray.on_ray.fake_cloud import FakeCloud

    run_dir = folder / "run"
    with closing(FakeCloud(1, max_machines=2)) as cloud:
        submit = ("job", "submit", "--submission-id", "rehearsal", "--", "python", "-m", "massl_ray.train")
        job = cloud.ray(*submit, *_flags(run_dir, steps, 2))
        log = _drain(job, folder / "job.log")
        watch = Watch(cloud, run_dir, job)
        watch.say("the job is submitted; there are no machines")
        try:
            _script(watch, cloud)
        finally:
            log.join(5)
        exit_code = job.wait(PATIENCE_S)
        watch.say(f"the job has ended with exit code {exit_code}")
        watch.until("idle machines go away", lambda: not watch.alive, over=True)
    undisturbed = _undisturbed(folder / "undisturbed", steps)
    hashes = {"rehearsed": _final_hash(run_dir, steps), "undisturbed": undisturbed}
    transitions = watch.timeline.transitions
    return {
        "name": "rehearse",
        "steps": steps,
        "exit_code": exit_code,
        "hashes": hashes,
        "equal": len(set(hashes.values())) == 1,
        "repeated_steps": {cause: sum(t["steps_repeated"] for t in transitions if t["cause"] == cause) for cause in _CAUSES},
        "timeline": asdict(watch.timeline),
    }


_CAUSES = ("added", "notice", "lost")


def _script(watch: Watch, cloud: Any) -> None:
    watch.until("the autoscaler brings a machine", lambda: len(watch.alive) == 1)
    watch.until_steps(20)
    cloud.allow(2)
    watch.say("the cloud has a second machine")
    watch.until_transition("added", 2)
    watch.until_steps(10)
    leaving = watch.alive[0]
    with cloud.spot_watcher(leaving) as notice:
        notice.set()
        watch.say(f"the cloud gives one machine {NOTICE_S:.0f} s notice")
        deadline = time.monotonic() + NOTICE_S
        watch.until_transition("notice", 1)
        watch.until("the end of the notice", lambda: time.monotonic() > deadline)
    cloud.kill(leaving)
    watch.say("the cloud takes the machine back")
    watch.until_transition("added", 2)
    watch.until_steps(10)
    cloud.kill(watch.alive[0])
    watch.say("one machine vanishes")
    watch.until_transition("lost", 1)
    watch.until_transition("added", 2)
    watch.until("the end of the run", lambda: watch.job.poll() is not None, over=True)


def _flags(run_dir: Path, steps: int, max_workers: int) -> list[str]:
    settings = FLAGS | {"run.dir": run_dir, "train.steps": steps, "elastic.max_workers": max_workers}
    return ["--preset", "demo", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]


def _undisturbed(run_dir: Path, steps: int) -> str:
    """The same run on this computer alone, by the same command."""
    print("          the same run, undisturbed", flush=True)
    command = [sys.executable, "-m", "massl_ray.train", *_flags(run_dir, steps, 1)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the undisturbed run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return _final_hash(run_dir, steps)


def _final_hash(run_dir: Path, steps: int) -> str:
    last = list_checkpoints(run_dir / "checkpoints")[-1]
    if last.name != f"step_{steps}":
        raise RuntimeError(f"the run in {run_dir} ended with {last.name}, not after {steps} steps")
    return read_manifest(last)["state_sha256"]


def _drain(job: subprocess.Popen[str], path: Path) -> threading.Thread:
    """What the job prints, into a file: a pipe that nobody reads would stop it."""

    def copy() -> None:
        with path.open("w") as log:
            for line in job.stdout or ():
                log.write(line)
                log.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one may be under way."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except FileNotFoundError:
        return []


def _last_line(path: Path) -> dict[str, Any] | None:
    lines = _lines(path)
    return lines[-1] if lines else None


def draw(timeline: Timeline) -> Any:
    """Machines and workers below, steps above, on one time axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    end = max(timeline.happenings[-1][0], timeline.steps[-1][0])
    above.plot(*zip(*timeline.steps, strict=True), color="#1f4e79", linewidth=1.2)
    above.set(
        ylabel="step", title="A rehearsal: one elastic run, Ray's autoscaler, machines that come, are given notice and vanish"
    )
    for series, colour, label, width in (
        (timeline.machines, "#9dc1e0", "machines", 5),
        (timeline.workers, "#1f4e79", "workers", 1.5),
    ):
        times, values = zip((0, 0), *series, (end, series[-1][1]), strict=True)
        below.step(times, values, where="post", color=colour, label=label, linewidth=width)
    below.set(xlabel="seconds since the job was submitted", ylabel="number", yticks=[0, 1, 2], xlim=(0, end))
    below.legend(loc="lower center", ncols=2, frameon=False)
    for number, (when, what) in enumerate((when, what) for when, what in timeline.happenings if "->" not in what):
        for axes in (above, below):
            axes.axvline(when, color="#b03a2e", linewidth=0.8)
        height, late = 0.97 - 0.07 * (number % 4), when > 0.8 * end  # neighbours' words would overlap
        place = {"transform": above.get_xaxis_transform(), "ha": "right" if late else "left", "va": "top"}
        above.text(when, height, f" {what} ", color="#b03a2e", fontsize=8, **place)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m massl_ray.benches.rehearse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/rehearsal"), help="where timeline.json and timeline.png go [runs/rehearsal]"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run [{STEPS}]")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = rehearse(Path(folder), arguments.steps)
        except RuntimeError as error:
            log = Path(folder) / "job.log"
            print(f"massl-ray: {error}\n{log.read_text()[-4000:] if log.exists() else ''}", file=sys.stderr)
            return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "timeline.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(Timeline(**result["timeline"])).savefig(arguments.out / "timeline.png", dpi=110)
    verdict = "the same bits as undisturbed" if result["equal"] else f"OTHER BITS than undisturbed: {result['hashes']}"
    print(f"          {result['hashes']['rehearsed'][:16]}...: {verdict}")
    print(f"          {arguments.out / 'timeline.png'}")
    return 0 if result["equal"] and result["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
