"""What a run leaves behind: metrics, TensorBoard events, checkpoints, evaluations. One worker records for all."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from massl_ray.config import keys
from massl_ray.evaluation.features import Features, backbone_features, pixel_features
from massl_ray.evaluation.knn import knn_accuracy
from massl_ray.evaluation.neighbours import nearest_neighbours
from massl_ray.method.step import State
from massl_ray.reporting.pictures import save_png, view_grid
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.loop import Views
from massl_ray.training.run import Run, write_atomically, write_json
from massl_ray.training.state import to_tensors


class Silent:
    """The recorder of every worker but the first."""

    def views(self, views: Views) -> None: ...
    def metrics(self, lines: list[dict[str, Any]]) -> None: ...
    def checkpoint(self, state: State) -> None: ...
    def evaluate(self, state: State) -> None: ...

    def __init__(self, announce: Callable[[dict[str, Any]], None]):
        self.announce = announce

    def skipped(self, images: list[str]) -> None:
        if images:
            self.announce({"kind": "skipped", "images": images})

    def stop_requested(self) -> bool:
        return False


class RunRecorder(Silent):
    """Writes the run directory.

    Args:
        run: the run.
        announce: tells the console what happened, without waiting.
        stop_asked: whether someone asked the run to stop.
        start_step: step that training continues from; metrics of later steps, from a life that was rolled back, are dropped.
    """

    def __init__(self, run: Run, announce: Callable[[dict[str, Any]], None], stop_asked: Callable[[], bool], start_step: int):
        super().__init__(announce)
        self.run, self.stop_asked = run, stop_asked
        self.metrics_path = run.dir / "metrics.jsonl"
        drop_lines_after(self.metrics_path, start_step)
        self.board = SummaryWriter(str(run.dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def stop_requested(self) -> bool:
        return self.stop_asked()

    def views(self, views: Views) -> None:
        grid = view_grid(views.global_views[:8].numpy(), views.local_views[:8].numpy())
        save_png(self.run.dir / "views.png", grid)
        self.board.add_image("views", grid, 0, dataformats="HWC")

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        with self.metrics_path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])
        if lines:
            self.announce({"kind": "metrics", "line": lines[-1]})

    def checkpoint(self, state: State) -> None:
        config = self.run.config
        facts = {
            "images_seen": state.step * self.run.resolved.batch_size,
            "next_position": state.step * self.run.resolved.batch_size,
            "dataset_size": self.run.resolved.dataset_size,
            "config": keys(config),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        write_checkpoint(self.run.checkpoints, to_tensors(state), facts, config.checkpoint.keep)
        self.board.flush()
        self.announce({"kind": "checkpoint", "step": state.step})

    def evaluate(self, state: State) -> None:
        """k-NN of the teacher where there are labels; before the first step also of raw pixels. After the last step also
        nearest neighbours of a few images."""
        step, run = state.step, self.run
        device = state.memory.rows.device
        bank: Features | None = None
        if run.bank is not None and run.queries is not None:
            bank = backbone_features(state.teacher.backbone, run.bank, run.config, device)
            queries = backbone_features(state.teacher.backbone, run.queries, run.config, device)
            if step == 0:
                self._knn("pixels", step, pixel_features(run.bank), pixel_features(run.queries))
            self._knn("untrained" if step == 0 else f"step_{step}", step, bank, queries)
        if step == run.resolved.steps:
            listing = run.bank if run.bank is not None else run.images.take(evenly(len(run.images), run.config.eval.max_images))
            found = bank or backbone_features(state.teacher.backbone, listing, run.config, device)
            write_json(run.dir / "eval" / "neighbours.json", nearest_neighbours(found, listing))

    def _knn(self, name: str, step: int, bank: Features, queries: Features) -> None:
        config = self.run.config.eval
        assert bank.labels is not None and queries.labels is not None
        if not len(bank.rows) or not len(queries.rows):  # none of the few images of one side could be read
            return
        accuracy = knn_accuracy(bank.rows, bank.labels, queries.rows, queries.labels, k=config.knn_k, temperature=config.knn_temp)
        record = {
            "features": name,
            "step": step,
            "top1": accuracy,
            "k": config.knn_k,
            "temperature": config.knn_temp,
            "bank_images": len(bank.rows),
            "query_images": len(queries.rows),
        }
        write_json(self.run.dir / "eval" / f"knn_{name}.json", record)
        self.board.add_scalar("knn_pixels" if name == "pixels" else "knn", accuracy, step)
        self.announce({"kind": "knn", **record})

    def close(self) -> None:
        self.board.close()


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


def evenly(size: int, at_most: int):
    """Places spread evenly through a listing."""
    return torch.linspace(0, size - 1, min(size, at_most)).long().numpy()
