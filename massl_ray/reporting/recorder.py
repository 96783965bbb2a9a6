"""The run directory: events in, files out. Only the command that started the run writes here, so nobody else needs the disk."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from massl_ray.reporting.pictures import save_png
from massl_ray.training.run import Run, append_lines, write_atomically, write_json


class RunRecorder:
    """Writes metrics.jsonl, TensorBoard events, evaluations and elastic.jsonl."""

    def __init__(self, run: Run):
        self.dir = run.dir
        self.metrics_path = run.dir / "metrics.jsonl"
        self.board = Board(run.dir / "tensorboard")

    def follow(self, event: dict[str, Any]) -> None:
        """One event of `on_ray.telemetry`. Raises OSError, having written nothing, where the disk takes no more."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def close(self) -> None:
        self.board.close()

    def _on_started(self, event: dict[str, Any]) -> None:
        """Metrics of later steps are of a life that was rolled back."""
        drop_lines_after(self.metrics_path, event["step"])
        self.board.drop_after(event["step"])

    def _on_metrics(self, event: dict[str, Any]) -> None:
        append_lines(self.metrics_path, event["lines"])
        for line in event["lines"]:
            for name, value in line.items():
                if name != "step":
                    self.board.add("scalar", name, value, line["step"])

    def _on_views(self, event: dict[str, Any]) -> None:
        save_png(self.dir / "views.png", event["grid"])
        self.board.add("image", "views", event["grid"], 0, dataformats="HWC")

    def _on_knn(self, event: dict[str, Any]) -> None:
        record = {key: value for key, value in event.items() if key != "kind"}
        write_json(self.dir / "eval" / f"knn_{event['features']}.json", record)
        self.board.add("scalar", "knn_pixels" if event["features"] == "pixels" else "knn", event["top1"], event["step"])

    def _on_neighbours(self, event: dict[str, Any]) -> None:
        write_json(self.dir / "eval" / "neighbours.json", event["found"])

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.board.flush()

    def _on_transition(self, event: dict[str, Any]) -> None:
        append_lines(self.dir / "elastic.jsonl", [{key: value for key, value in event.items() if key != "kind"}])
        self.board.add("scalar", "world_size_after", event["to"], event["step"])


class Board:
    """TensorBoard's events. What a full disk does not take is missing from them: metrics.jsonl has it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: SummaryWriter | None = None
        self._open()

    def add(self, kind: str, *values: Any, **options: Any) -> None:
        """`kind`: of SummaryWriter's add_<kind>."""
        try:
            if self.writer:
                getattr(self.writer, f"add_{kind}")(*values, **options)
        except OSError:  # its thread has ended; the next flush opens another one
            self.writer = None

    def drop_after(self, step: int) -> None:
        self.close()
        with suppress(OSError):
            self._open(step + 1 if step else 0)

    def flush(self) -> None:
        try:
            (self.writer or self._open()).flush()
        except OSError:
            self.writer = None

    def close(self) -> None:
        with suppress(OSError):
            if self.writer:
                self.writer.close()
        self.writer = None

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        return self.writer


def drop_lines_after(path: Path, step: int) -> None:
    """Keep metrics of steps up to `step`: one line a step of the run as it counts."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line cut short by a crash
            break
    write_atomically(path, "".join(kept))
