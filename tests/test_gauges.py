"""What those who look after a cluster see: Prometheus' figures, the dashboard's page of Train runs, and Grafana's of ours."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from massl_ray.on_ray import gauges as module
from massl_ray.on_ray import knobs
from massl_ray.on_ray.gauges import COUNTERS, GAUGES, OF_A_LINE, RunGauges
from tests.helpers import metrics_line, tiny_run
from tests.images import TINY, write_images
from tests.test_secrets import ENVIRONMENT, SECRET, where_it_stands
from tests.test_train import free_ports, plain_environment

T = TypeVar("T")
BOARD = Path(__file__).parents[1] / "cluster" / "grafana.json"

# ---- from events to figures ------------------------------------------------------------------------------------------


class Figure:
    """Instead of Ray's: what it was told, by tags."""

    def __init__(self, name: str, words: str, tags: tuple[str, ...]):
        self.tags, self.values, self.told = tags, {}, 0

    def _tell(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tags and all(isinstance(tag, str) for tag in tags.values())
        self.values[tuple(tags.values())] = value
        self.told += 1

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._tell(value, tags)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        if value <= 0:
            raise ValueError("value must be >0")  # as Ray does
        self._tell(self.values.get(tuple(tags.values()), 0) + value, tags)


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Callable[..., RunGauges]:
    monkeypatch.setattr(module, "Gauge", Figure)
    monkeypatch.setattr(module, "Counter", Figure)
    run = tiny_run(write_images(tmp_path / "images", 12), tmp_path / "runs" / "vit", "--train.steps", "30")
    return lambda clock: RunGauges(run, clock)


def transition(cause: str, repeated: int = 0, pause_s: float = 0.0) -> dict[str, Any]:
    return {"kind": "transition", "cause": cause, "steps_repeated": repeated, "pause_s": pause_s}


def test_events_become_figures(figures):
    figures = figures(lambda: 1e9)
    figures.follow({"kind": "started", "step": 4, "world_size": 2})
    figures.follow({"kind": "metrics", "lines": [metrics_line(5), metrics_line(6, world_size=3, data_wait=0.125)]})
    figures.follow({"kind": "knn", "features": "untrained", "top1": 0.75})
    figures.follow({"kind": "knn", "features": "pixels", "top1": 0.5})
    figures.follow({"kind": "checkpoint"})
    values = {name.removeprefix("massl_ray_"): gauge.values[("vit",)] for name, gauge in figures.gauges.items()}
    assert values == {
        "step": 6,
        "planned_steps": 30,
        "last_step_timestamp_seconds": 1e9,
        "images_per_second": 106.0,
        "data_wait_ratio": 0.125,
        "workers": 3,
        "loss_nats": 3.4,
        "embedding_spread_ratio": 0.8,
        "effective_rank_dimensions": 7.0,
        "alignment_square_distance": 0.5,
        "uniformity_nats": -2.5,
        "memory_evenness_ratio": 0.9,
        "knn_top1_ratio": 0.75,
    }


def test_what_is_counted(figures):
    figures = figures(time.time)
    for event in (transition("start"), transition("lost", 3, 1.5), transition("added"), transition("lost", 2, 0.5)):
        figures.follow(event)
    figures.follow({"kind": "failure", "text": "Worker 1: ..."})
    values = {name.removeprefix("massl_ray_"): counter.values for name, counter in figures.counters.items()}
    assert values == {
        "transitions_total": {("vit", "start"): 1, ("vit", "lost"): 2, ("vit", "added"): 1},
        "steps_repeated_total": {("vit",): 5},
        "pause_seconds_total": {("vit",): 2.0},
        "failures_total": {("vit",): 1},
    }


def test_figures_are_said_again_before_ray_forgets_them(figures):
    now = [0.0]
    figures = figures(lambda: now[0])
    figures.follow({"kind": "started", "step": 0, "world_size": 1})
    planned = figures.gauges["massl_ray_planned_steps"]
    for now[0], told in ((0.5, 1), (1.5, 2), (2.0, 2), (9.0, 3)):
        figures.refresh()
        assert planned.told == told and planned.values == {("vit",): 30}
    assert figures.gauges["massl_ray_knn_top1_ratio"].told == 0  # not known yet


def test_names_are_as_prometheus_wants_them():
    for name, words in (GAUGES | COUNTERS).items():
        assert re.fullmatch(r"massl_ray_[a-z0-9_]+[a-z0-9]", name) and words[-1] == "."
        assert name.endswith("_total") == (name in COUNTERS)
    assert set(OF_A_LINE) <= set(metrics_line(1)) and set(OF_A_LINE.values()) <= set(GAUGES)


@pytest.mark.parametrize(
    ("run_dir", "tag"),
    [
        ("s3://AKIAKEY:s3cr3t@bucket?scheme=http", "bucket"),
        ("s3://bucket/runs/vit?access_key=A&secret_key=s3cr3t", "vit"),
        ("runs/two\nlines \x1b[31m", r"two\nlines \x1b[31m"),
        ("runs/\udcff\u202e", r"\udcff\u202e"),
    ],
)
def test_a_runs_tag_has_no_secrets_and_nothing_hostile(tmp_path, monkeypatch, run_dir, tag):
    monkeypatch.setattr(module, "Gauge", Figure)
    monkeypatch.setattr(module, "Counter", Figure)
    run = tiny_run(write_images(tmp_path / "images", 12), tmp_path / "run")
    run = run.__class__(
        run.config.model_copy(update={"run": run.config.run.model_copy(update={"dir": run_dir})}), *list(vars(run).values())[1:]
    )
    assert RunGauges(run).tags == {"run": tag}


# ---- on a cluster ----------------------------------------------------------------------------------------------------


@contextmanager
def head(folder: Path) -> Iterator[dict[str, str]]:
    """A head node as `ray start --head` makes it on a machine that knows secrets, as the environment that commands need; ended by
    its process id."""
    ports = free_ports(5)
    environment = plain_environment() | ENVIRONMENT
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_metrics_report_interval_ms": "2000",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
        f"--ray-client-server-port={ports[3]}", f"--metrics-export-port={ports[4]}", f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "--block" in line:  # the last thing it says once everything is up
                break
        places = {"RAY_ADDRESS": ports[0], "DASHBOARD": ports[1], "METRICS": ports[4]}
        yield environment | {name: f"127.0.0.1:{port}" for name, port in places.items()}
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def page(address: str) -> str:
    """Empty while it cannot be had."""
    try:
        with urllib.request.urlopen(f"http://{address}", timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""


def until(look: Callable[[], T | None], what: str, seconds: float = 120, last: Callable[[], object] = lambda: "") -> T:
    """What `look` returns once it is something. `last`: what to say besides if it is not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s; {last()}")


def samples(text: str) -> dict[str, dict[str, float]]:
    """Of a page of Prometheus' text: ours by name, and by the tags that we gave them."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_massl_ray_"):
                tags = sample.labels["run"] + (f" {sample.labels['cause']}" if "cause" in sample.labels else "")
                found.setdefault(sample.name.removeprefix("ray_"), {})[tags] = sample.value
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_a_cluster_can_be_watched(tmp_path, tmp_path_factory):
    """Scraped while it trains, the figures are those of one line of metrics.jsonl; the dashboard says that it runs, and then
    that it is over. Nobody is told a secret of the environment."""
    name = 'vit "small" \\ \x1b[31m'
    shown = r'vit "small" \ \x1b[31m'
    run_dir = tmp_path / name
    images = write_images(tmp_path / "images", 48)
    flags = [*TINY, "--data.source", str(images), "--run.dir", str(run_dir), "--train.steps", "100000", "--train.log_every", "20"]
    folder = tmp_path_factory.mktemp("head")
    with head(folder) as environment:
        runs = f"{environment['DASHBOARD']}/api/train/v2/runs/v1"
        log = (tmp_path / "log").open("w+")
        command = [sys.executable, "-m", "massl_ray.train", *flags]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen: dict[str, dict[str, float]] = {}

            def agreeing() -> dict[str, dict[str, float]] | None:
                assert process.poll() is None, (tmp_path / "log").read_text()
                seen.clear()
                seen.update(samples(page(f"{environment['METRICS']}/metrics")))
                step = seen.get("massl_ray_step", {}).get(shown, 0)
                for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines() if step > 20 else []):
                    if all(seen.get(name, {}).get(shown) == pytest.approx(line[key]) for key, name in OF_A_LINE.items()):
                        return seen
                return None

            found = until(agreeing, "figures of one line", last=lambda: (seen, (tmp_path / "log").read_text()))
            assert found["massl_ray_planned_steps"] == {shown: 100000}  # set once, and long ago
            assert found["massl_ray_transitions_total"] == {f"{shown} start": 1}
            assert abs(time.time() - found["massl_ray_last_step_timestamp_seconds"][shown]) < 60
            until(lambda: '"status":"RUNNING"' in page(runs) or None, "the dashboard's RUNNING")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130, (tmp_path / "log").read_text()
            log.close()
        until(lambda: '"status":"FINISHED"' in page(runs) or None, "the dashboard's FINISHED", last=lambda: page(runs))
        counted = samples(page(f"{environment['METRICS']}/metrics"))
        assert counted["massl_ray_transitions_total"] == {f"{shown} start": 1}  # Ray keeps it
        assert "\x1b" not in (tmp_path / "log").read_text()
        jobs = page(f"{environment['DASHBOARD']}/api/jobs/")
        assert "massl_ray.train" in jobs and SECRET not in jobs + page(runs)
    assert where_it_stands(folder, tmp_path) == []


@pytest.mark.parametrize(("address", "tracked"), [("127.0.0.1:1", "1"), (None, "0")])
def test_only_a_cluster_with_a_dashboard_is_told_of_runs(monkeypatch, address, tracked):
    import ray

    from massl_ray.on_ray.cluster import cluster

    for name in knobs.QUIET | knobs.FAST | knobs.WATCHED | knobs.ALONE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster():
        assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == tracked
        assert os.environ.get("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION") == (None if address else "0")


# ---- Grafana's page --------------------------------------------------------------------------------------------------

FUNCTIONS = {"max", "sum", "by", "time", "run", "cause"}  # of PromQL, and labels that are grouped by


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_figure_on_the_page_is_exported(board):
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = {f"ray_{name}" for name in GAUGES | COUNTERS}
    rays = {f"ray_{name}" for name in METRICS_GAUGES}
    asked = set()
    for expression in expressions(board):
        words = re.findall(r"[a-zA-Z_][a-zA-Z0-9_]*", re.sub(r"\{[^}]*\}", "", expression))
        asked |= set(words) - FUNCTIONS
    assert asked <= ours | rays, asked - ours - rays
    assert ours <= asked, ours - asked  # and all of ours are shown
    for name in ("ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_cpu_utilization"):
        assert name in asked
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert re.fullmatch(r"label_values\((\w+), run\)", variable["query"]["query"])[1] in ours


def test_expressions_are_whole_and_of_the_chosen_run(board):
    for expression in expressions(board):
        open_ones: list[str] = []
        for character in re.sub(r'"[^"]*"', "", expression):
            if character in "({[":
                open_ones.append(character)
            elif character in ")}]":
                assert open_ones and open_ones.pop() + character in ("()", "{}", "[]"), expression
        assert not open_ones and expression.count('"') % 2 == 0, expression
        assert expression.count("ray_massl_ray_") == expression.count('{run=~"$run"}'), expression


def test_the_page_is_one_that_grafana_takes(board):
    assert board["title"] and board["uid"] and board["schemaVersion"] >= 36 and "id" not in board
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert set(re.findall(r"\$\{?(\w+)", BOARD.read_text().replace("$__all", ""))) == set(variables) == {"datasource", "run"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["title"] and panel["description"] and panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert cells and not cells & taken and x >= 0 and x + width <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
