"""What the training loop has to tell, as events: lines of metrics, evaluations, states to keep. One worker speaks for all."""

import platform
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from massl_ray.config import keys
from massl_ray.data.listing import Listing
from massl_ray.evaluation.adapted import adapt_statistics, training_views
from massl_ray.evaluation.features import Features, backbone_features, pixel_features
from massl_ray.evaluation.knn import knn_figures
from massl_ray.evaluation.neighbours import nearest_neighbours
from massl_ray.method.resampling import resizer
from massl_ray.method.step import State
from massl_ray.reporting.pictures import add_pictures, view_grid
from massl_ray.training.checkpoint import CheckpointWriter
from massl_ray.training.loop import Views
from massl_ray.training.run import Run
from massl_ray.training.state import to_tensors
from massl_ray.training.wish import Wish


class Line(Protocol):
    """The way from a worker to the command that started the run. Nothing here waits."""

    def announce(self, event: dict[str, Any]) -> None: ...
    def progress(self, step: int) -> None: ...
    def keep(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...
    def wish(self) -> Wish: ...


class Silent:
    """The recorder of every worker but the first: it only names images that it could not read."""

    def __init__(self, line: Line):
        self.line = line

    def views(self, views: Views) -> None: ...
    def metrics(self, lines: list[dict[str, Any]]) -> None: ...
    def evaluate(self, state: State) -> None: ...
    def checkpoint(self, state: State) -> None: ...
    def snapshot(self, state: State) -> None: ...
    def step_done(self, state: State) -> None: ...

    def skipped(self, images: list[str]) -> None:
        if images:
            self.line.announce({"kind": "skipped", "images": images})

    def wish(self) -> Wish:
        return Wish.NONE


class Reporter(Silent):
    """The first worker's recorder.

    Args:
        run: the run.
        line: to the command that started the run.
        writer: of checkpoints.
    """

    def __init__(self, run: Run, line: Line, writer: CheckpointWriter):
        super().__init__(line)
        self.run, self.writer = run, writer
        self.kept_at = time.monotonic()
        self.top1: tuple[int, float] | None = None  # step and accuracy of the last evaluation

    def views(self, views: Views) -> None:
        grid = view_grid(views.global_views[:8].cpu().numpy(), views.local_views[:8].cpu().numpy())
        self.line.announce({"kind": "views", "grid": grid})

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        if lines:
            self.line.announce({"kind": "metrics", "lines": lines})

    def wish(self) -> Wish:
        """What others asked for; and a copy of the state to be kept when the last one is half of elastic.max_lost_seconds old,
        which leaves the other half for a step and the copy's way."""
        overdue = time.monotonic() - self.kept_at > self.run.config.elastic.max_lost_seconds / 2
        return max(self.line.wish(), Wish.SAVE if overdue else Wish.NONE)

    def step_done(self, state: State) -> None:
        self.line.progress(state.step)

    def snapshot(self, state: State) -> None:
        """Hand a copy of the state to a safer place than this machine."""
        self._keep(state)

    def checkpoint(self, state: State) -> None:
        """As a snapshot, and write it to storage while training goes on."""
        tensors, facts = self._keep(state)
        self.writer.save(tensors, facts)

    def _keep(self, state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config, images_seen = self.run.config, state.step * self.run.resolved.batch_size
        facts: dict[str, Any] = {
            "images_seen": images_seen,
            "next_position": images_seen,
            "dataset_size": self.run.resolved.dataset_size,
            "config": keys(config),
            # As a plain string: whoever unpickles torch's own type imports torch.
            "versions": {"torch": str(torch.__version__), "python": platform.python_version(), "resizer": resizer()},
            "hardware": torch.cuda.get_device_name() if state.memory.rows.is_cuda else torch.backends.cpu.get_cpu_capability(),
        }
        if self.top1 and self.top1[0] == state.step:
            facts["knn_top1"] = self.top1[1]
        tensors = to_tensors(state)
        self.line.keep(tensors, facts)
        self.kept_at = time.monotonic()
        return tensors, facts

    def evaluate(self, state: State) -> None:
        """k-NN of the teacher where there are labels; before the first step of a copy of it whose running statistics are adapted,
        and of raw pixels. After the last step also nearest neighbours of a few images."""
        step, run = state.step, self.run
        device = state.memory.rows.device
        bank: Features | None = None
        if run.bank is not None and run.queries is not None:
            if step == 0:
                self._yardsticks(state.teacher.backbone, run.bank, run.queries, device)
            else:
                sides = (run.bank, run.queries)
                bank, queries = (backbone_features(state.teacher.backbone, part, run.config, device) for part in sides)
                accuracy = self._knn(f"step_{step}", step, bank, queries)
                self.top1 = None if accuracy is None else (step, accuracy)
        if step == run.resolved.end:
            listing = run.bank if run.bank is not None else run.images.take(evenly(len(run.images), run.config.eval.max_images))
            found = bank or backbone_features(state.teacher.backbone, listing, run.config, device)
            near = nearest_neighbours(found, listing)
            add_pictures([entry for query in near for entry in (query, *query["neighbours"])], listing, run.config.data)
            self.line.announce({"kind": "neighbours", "found": near})

    def _yardsticks(self, backbone: nn.Module, bank: Listing, queries: Listing, device: torch.device) -> None:
        """What training has to beat: the images themselves, and the backbone as it is but for its running statistics."""
        config, sides = self.run.config, (bank, queries)
        self._knn("pixels", 0, *(pixel_features(part, config.data) for part in sides))
        adapted = adapt_statistics(backbone, training_views(self.run.images, config), config.train.precision)
        features = (backbone_features(adapted, part, config, device) for part in sides)
        self._knn("untrained", 0, *features, adapted=adapted is not backbone)

    def _knn(self, name: str, step: int, bank: Features, queries: Features, **facts: Any) -> float | None:
        config = self.run.config.eval
        assert bank.labels is not None and queries.labels is not None
        if not len(bank.rows) or not len(queries.rows):  # none of the few images of one side could be read
            return None
        figures = knn_figures(bank.rows, bank.labels, queries.rows, queries.labels, k=config.knn_k, temperature=config.knn_temp)
        record = {
            "features": name,
            "step": step,
            **figures,
            "k": config.knn_k,
            "temperature": config.knn_temp,
            "bank_images": len(bank.rows),
            "query_images": len(queries.rows),
        }
        self.line.announce({"kind": "knn", **record, **facts})
        return figures["top1"]


def evenly(size: int, at_most: int):
    """Places spread evenly through a listing."""
    return torch.linspace(0, size - 1, min(size, at_most)).long().numpy()
