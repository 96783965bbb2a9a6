"""TensorBoard's HParams tab: settings and figures of each trial, in tensorboard/."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from massl_ray.sweeping.trials import HIGHER, Row


def write_board(root: Path, rows: Sequence[Row]) -> None:
    """Anew, of every trial with a figure: a run of TensorBoard each."""
    aside = root / ".tensorboard"
    shutil.rmtree(aside, ignore_errors=True)
    for row in rows:
        figures = {name: row.metric(name) for name in HIGHER if not math.isnan(row.metric(name))}
        if figures:
            with SummaryWriter(str(aside / row.trial.name)) as writer:
                for summary in _session(row, figures):
                    writer._get_file_writer().add_summary(summary)  # add_hparams would open a folder of its own
                for name, value in figures.items():
                    writer.add_scalar(name, value, row.steps)
    shutil.rmtree(root / "tensorboard", ignore_errors=True)
    if aside.exists():
        aside.rename(root / "tensorboard")


def _session(row: Row, figures: dict[str, float]) -> tuple[Any, ...]:
    """As TensorBoard's summaries."""
    settings = row.trial.point | {"run.seed": row.trial.seed}
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()}
    return hparams(plain, figures)
