"""Plain functions that several tests share."""

import io
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from massl_ray.config import load
from massl_ray.data.decode import PLAIN, Decoding, Encoded
from massl_ray.data.files import files
from massl_ray.data.listing import Listing
from massl_ray.storage import Folder
from massl_ray.training.run import Run, claim_directory, prepare_run
from tests.images import TINY


@cache
def _photograph() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def photograph(width: int = 160, height: int = 120) -> Image.Image:
    """A colourful photograph, RGB, of the given size."""
    return _photograph().resize((width, height), Image.Resampling.BICUBIC)


def decode(data: bytes, max_pixels: int = PLAIN.max_pixels) -> Image.Image:
    """An image at full size, in mode RGB."""
    return Image.fromarray(Encoded(data, Decoding(max_pixels)).pixels()[0])


def read(path: str) -> Image.Image:
    return decode(Path(path).read_bytes())


def smooth(width: int = 24, height: int = 16) -> np.ndarray:
    """Colour ramps that any lossy format keeps well, and that differ in every direction: (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_images(folder: Path, number: int) -> Path:
    """Write `number` small PNG files of random colours, 000.png, 001.png, ...; returns `folder`."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(number)
    for index in range(number):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def listed(root: str, names: Iterable[str], labels: np.ndarray | None = None, classes: tuple[str, ...] = ()) -> Listing:
    """Files that need not be there."""
    return Listing(files(Folder(root), names), labels, classes)


def names(images: Listing | None) -> list[str]:
    assert images is not None
    return [images.name(sample) for sample in range(len(images))]


def tiny_run(source: Path, run_dir: Path, *flags: str) -> Run:
    """A prepared run with its directory claimed."""
    return claim_directory(prepare_run(load([*TINY, "--data.source", str(source), "--run.dir", str(run_dir), *flags])))


def metrics_line(step: int, **changes) -> dict:
    """A line of metrics.jsonl with every key, invented."""
    line = {
        "step": step,
        "images_seen": step * 8,
        "epoch": step * 8 / 48,
        "lr": 1e-3,
        "weight_decay": 0.04,
        "teacher_momentum": 0.99,
        "teacher_temp": 0.04,
        "loss": 4.0 - step / 10,
        "teacher_entropy": 2.0,
        "student_entropy": 3.0,
        "agreement": 0.5,
        "koleo": 0.0,
        "alignment": 0.5,
        "embedding_std": 0.8,
        "effective_rank": 7.0,
        "uniformity": -2.5,
        "memory_usage": 0.9,
        "grad_norm": 1.0,
        "kl": 1.0,
        "world_size": 1,
        "images_per_s": 100.0 + step,
        "step_s": 0.5,
        "data_wait": 0.25,
    }
    return line | changes


def dead_lines(steps: int) -> list[dict]:
    """Lines of metrics.jsonl of a run that is dead from the start, with 32 slots a block."""
    figures = {"loss": 3.46, "teacher_entropy": 3.45, "kl": 0.01, "embedding_std": 0.1}
    return [metrics_line(step, **figures) for step in range(1, steps + 1)]


def older_line(step: int) -> dict:
    """Of a run begun before some metrics were made."""
    return {key: value for key, value in metrics_line(step).items() if key not in ("alignment", "uniformity", "memory_usage")}


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """The kernel itself refuses to let a file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
