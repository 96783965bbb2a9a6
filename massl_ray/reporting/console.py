"""What a person sees while it runs: one line that moves on a terminal, plain lines elsewhere."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from massl_ray.reporting.skipped import SkippedImages
from massl_ray.reporting.yardstick import NAMES, gain, sentences, untrained_name
from massl_ray.shown import in_a_line, redacted
from massl_ray.training.run import Run

PLAIN_S = 10.0  # between progress lines where there is no terminal


class Console:
    """Turns events into lines."""

    def __init__(self, run: Run, skipped: SkippedImages):
        self.run = run
        self.skipped = skipped
        self.rich = RichConsole(soft_wrap=True, highlight=False, emoji=False)
        self.knn: dict[str, float] = {}
        self.progress: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0

    def say(self, text: str) -> None:
        text = "\n".join(map(in_a_line, redacted(text).split("\n")))  # names of files and folders may be anything
        printable = text.encode(self.rich.encoding, "backslashreplace").decode(self.rich.encoding)
        self.rich.print(printable, markup=False)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        self.say(f"Note      {text}")

    def plan(self) -> None:
        """Printed before anything starts."""
        run, resolved, config = self.run, self.run.resolved, self.run.config
        classes = f", {len(run.images.classes)} classes for k-NN" if run.images.classes else ", no labels, so no k-NN"
        self.say(f"Images    {len(run.images):,} in {run.images.root}{classes}")
        stop = f", of which up to {resolved.end:,} now" if resolved.end < resolved.steps else ""
        self.say(
            f"Steps     {resolved.steps:,}{stop} of {resolved.batch_size} images "
            f"({resolved.total_images / resolved.dataset_size:.1f} epochs), "
            f"2 views of {config.views.global_size} px and {config.views.num_local} of {config.views.local_size} px"
        )
        self.say(
            f"Memory    {resolved.memory_size:,} slots, read in {resolved.num_blocks} random blocks of {resolved.block_size:,}"
        )
        self.say(f"Run       {run.dir}")

    def follow(self, event: dict[str, Any]) -> None:
        """One event of `on_ray.telemetry`."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _on_started(self, event: dict[str, Any]) -> None:
        config, left = self.run.config, self.run.resolved.end - event["step"]
        plural = "" if event["world_size"] == 1 else "s"
        self.say(
            f"Workers   {event['world_size']} on {event['device']}{plural if event['device'] == 'cpu' else ''}; "
            f"{config.model.backbone}, {event['parameters'] / 1e6:.1f} M parameters, {config.train.precision}"
        )
        again = f"Continuing after step {event['step']:,}. " if event["step"] else ""
        if event["step_s"] is not None:  # measured once
            self.say(f"Time      {again}About {duration(left * event['step_s'])} for {left:,} steps, evaluation not counted")
        if self.rich.is_terminal and self.progress is None:
            self.progress = Progress(
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self.rich,
            )
            self.task = self.progress.add_task("", total=self.run.resolved.end, completed=event["step"], figures="")
            self.progress.start()

    def _on_metrics(self, event: dict[str, Any]) -> None:
        line = event["lines"][-1]
        figures = f"epoch {line['epoch']:.1f}  loss {line['loss']:.3f}  {line['images_per_s']:.0f} images/s"
        figures += f"  data wait {line['data_wait']:.0%}"
        if self.knn:
            figures += f"  k-NN {list(self.knn.values())[-1]:.1%}"
        if self.progress:
            self.progress.update(self.task, completed=line["step"], figures=figures)
        elif time.monotonic() - self.last_line > PLAIN_S or line["step"] == self.run.resolved.end:
            self.last_line = time.monotonic()
            left = (self.run.resolved.end - line["step"]) * line["step_s"]
            self.say(f"step {line['step']}/{self.run.resolved.end}  {figures}  {duration(left)} left")

    def _on_knn(self, event: dict[str, Any]) -> None:
        self.knn[event["features"]] = event["top1"]
        names = {"pixels": NAMES["pixels"], "untrained": untrained_name(event.get("adapted"))}
        beside = {"k = 1": event.get("top1_k1"), "mean per class": event.get("mean_per_class")}
        known = ", ".join(f"{name} {value:.1%}" for name, value in beside.items() if value is not None)
        name = names.get(event["features"], f"step {event['step']}")
        self.say(f"k-NN      {event['top1']:.1%}  {name}" + (f" ({known})" if known else ""))

    def _on_skipped(self, event: dict[str, Any]) -> None:
        for image in self.skipped.add(event["images"])[:3]:
            self.say(f"Skipped   {in_a_line(image)}")

    def _on_note(self, event: dict[str, Any]) -> None:
        self.note(event["text"])

    def _on_failure(self, event: dict[str, Any]) -> None:
        self.say(event["text"])

    def _on_transition(self, event: dict[str, Any]) -> None:
        if event["cause"] != "start":
            self.say(
                f"Workers   {event['from']} -> {event['to']} ({event['cause']}) after step {event['step']:,}; "
                f"{event['seconds']:.1f} s until the next step, {event['steps_repeated']} steps repeated"
            )

    def _on_stopping(self, event: dict[str, Any]) -> None:
        self.say("Stopping: the current step is finished and saved first. Once more ends at once.")

    def finished(self, summary: dict[str, Any], report: Path) -> None:
        """Printed last: what was reached and where to look."""
        self.say(
            f"Done      {summary['steps']:,} steps in {duration(summary['wall_s'])}, loss "
            f"{summary['loss_final']:.3f}, {summary['images_per_s']:.0f} images/s"
        )
        self._say_knn(summary)
        if summary["verdict"]:
            self.say(f"Verdict   {summary['verdict']}. {summary['verdict_text']}")
        if len(self.skipped):
            self.say(f"Skipped   {len(self.skipped):,} unreadable images, listed in {self.skipped.path}")
        self.say(f"Report    {report}")

    def _say_knn(self, summary: dict[str, Any]) -> None:
        names = NAMES | {"untrained": untrained_name(summary.get("knn_adapted"))}
        for prefix, title in (("knn", "k-NN"), ("knn1", "k = 1")):
            shares = {name: summary.get(f"{prefix}_{key}") for key, name in names.items()}
            known = [f"{share:.1%} {name}" for name, share in shares.items() if share is not None]
            points = gain(summary) if prefix == "knn" else None
            if known:
                self.say(f"{title:<10}" + "; ".join(known) + ("" if points is None else f": {points:+.1f} points by training"))
        for sentence in sentences(summary, self.run.config.eval.knn_k):
            self.say(f"Note      {sentence}")


def duration(seconds: float) -> str:
    """Seconds in words: '45 s', '12 min', '3.4 h', '2.1 days'."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3600 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"
