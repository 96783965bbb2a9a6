"""The run directory: events in, files out. Only the command that started the run writes here, so nobody else needs the disk."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from massl_ray.reporting.pictures import save_png
from massl_ray.training.run import Run, write_atomically, write_json


class RunRecorder:
    """Writes metrics.jsonl, TensorBoard events, evaluations and elastic.jsonl."""

    def __init__(self, run: Run):
        self.dir = run.dir
        self.metrics_path = run.dir / "metrics.jsonl"
        self.board = SummaryWriter(str(run.dir / "tensorboard"))

    def follow(self, event: dict[str, Any]) -> None:
        """One event of `on_ray.telemetry`."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def close(self) -> None:
        self.board.close()

    def _on_started(self, event: dict[str, Any]) -> None:
        """Metrics of later steps are of a life that was rolled back."""
        drop_lines_after(self.metrics_path, event["step"])
        self.board.close()
        self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=event["step"] + 1 if event["step"] else 0)

    def _on_metrics(self, event: dict[str, Any]) -> None:
        with self.metrics_path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in event["lines"])
        for line in event["lines"]:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def _on_views(self, event: dict[str, Any]) -> None:
        save_png(self.dir / "views.png", event["grid"])
        self.board.add_image("views", event["grid"], 0, dataformats="HWC")

    def _on_knn(self, event: dict[str, Any]) -> None:
        record = {key: value for key, value in event.items() if key != "kind"}
        write_json(self.dir / "eval" / f"knn_{event['features']}.json", record)
        self.board.add_scalar("knn_pixels" if event["features"] == "pixels" else "knn", event["top1"], event["step"])

    def _on_neighbours(self, event: dict[str, Any]) -> None:
        write_json(self.dir / "eval" / "neighbours.json", event["found"])

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.board.flush()

    def _on_transition(self, event: dict[str, Any]) -> None:
        with (self.dir / "elastic.jsonl").open("a") as file:
            file.write(json.dumps({key: value for key, value in event.items() if key != "kind"}) + "\n")
        self.board.add_scalar("world_size_after", event["to"], event["step"])


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
