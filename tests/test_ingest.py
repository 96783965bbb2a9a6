"""Views streamed by Ray Data: the right samples, in order, whoever asks and from wherever."""

import numpy as np
import pytest
import ray
import torch

from massl_ray.config import load
from massl_ray.data.making import first_readable
from massl_ray.data.order import Windows, samples_at, step_positions
from massl_ray.method.views import make_views
from massl_ray.on_ray.feeder import start_feeder
from massl_ray.on_ray.ingest import stream_views
from massl_ray.on_ray.layout import DataTasks
from massl_ray.training.run import prepare_run
from tests.helpers import decode, read
from tests.images import TINY
from tests.sources import encoded_images, write_parquet

pytestmark = pytest.mark.ray
CPU = torch.device("cpu")
TASKS = DataTasks(2, 0.25)


@pytest.fixture
def feeder(ray_cluster):
    started = start_feeder()
    yield started
    ray.kill(started)


@pytest.fixture
def run(tiny_images, tmp_path):
    return prepare_run(load([*TINY, "--data.source", str(tiny_images), "--run.dir", str(tmp_path / "run"), "--train.steps", "8"]))


def expected_views(run, step: int):
    """The whole batch of a step, made here and now."""
    size = run.resolved.batch_size
    epochs, samples = samples_at(step_positions(step, size, 0, size), len(run.images), run.config.run.seed)
    made = [
        make_views(read(run.images.path(sample)), run.config.views, seed=run.config.run.seed, epoch=int(epoch), sample=int(sample))
        for epoch, sample in zip(epochs, samples, strict=True)
    ]
    return np.stack([views for views, _ in made]), np.stack([views for _, views in made])


def test_every_step_gets_its_samples_in_order(feeder, run):
    """Eight steps of 8 over 48 images cross an epoch's end."""
    streamed = list(stream_views(run, 0, 1, 0, TASKS, CPU, feeder))
    assert len(streamed) == 8
    for step, views in enumerate(streamed):
        global_views, local_views = expected_views(run, step)
        np.testing.assert_array_equal(views.global_views.numpy(), global_views)
        np.testing.assert_array_equal(views.local_views.numpy(), local_views)
        assert views.skipped == []


def test_restart_at_any_step_and_share(feeder, run):
    """From step 5 on, three workers together get what one would have got."""
    streams = [list(stream_views(run, rank, 3, 5, TASKS, CPU, feeder)) for rank in range(3)]
    for step, parts in enumerate(zip(*streams, strict=True), start=5):
        global_views, _ = expected_views(run, step)
        np.testing.assert_array_equal(np.concatenate([part.global_views.numpy() for part in parts]), global_views)


def test_views_made_by_the_worker(feeder, tiny_images, tmp_path):
    """Same samples, and the same bits whoever has a micro-batch; within tolerance those that tasks make."""
    flags = ["--data.source", str(tiny_images), "--run.dir", str(tmp_path / "run"), "--train.steps", "8", "--views.device", "cuda"]
    run = prepare_run(load([*TINY, *flags]))
    whole = list(stream_views(run, 0, 1, 5, TASKS, CPU, feeder))
    assert len(whole) == 3
    for step, views in enumerate(whole, start=5):
        for found, expected in zip((views.global_views, views.local_views), expected_views(run, step), strict=True):
            assert found.shape == expected.shape
            assert np.abs(found.numpy().astype(float) - expected).mean() < 2.5
    parts = zip(*(list(stream_views(run, rank, 3, 5, TASKS, CPU, feeder)) for rank in range(3)), strict=True)
    for views, shares in zip(whole, parts, strict=True):
        assert torch.equal(views.global_views, torch.cat([share.global_views for share in shares]))
        assert torch.equal(views.local_views, torch.cat([share.local_views for share in shares]))


def test_windows_of_shards(feeder, tmp_path):
    """Each image comes at the place of an order that stays within two row groups at a time."""
    images = encoded_images(48)
    source = write_parquet(tmp_path / "images.parquet", images, row_group=8)
    flags = ["--data.source", str(source), "--run.dir", str(tmp_path / "run"), "--train.steps", "6", "--data.window", "2"]
    run = prepare_run(load([*TINY, *flags]))
    epochs, samples = samples_at(np.arange(48), 48, 0, Windows(np.arange(0, 49, 8), 2))
    assert [len(set(samples[first : first + 16] // 8)) for first in (0, 16, 32)] == [2, 2, 2]
    streamed = np.concatenate([views.global_views.numpy() for views in stream_views(run, 0, 1, 0, TASKS, CPU, feeder)])
    for place, sample in enumerate(samples):
        made, _ = make_views(decode(images[sample]), run.config.views, seed=0, epoch=0, sample=int(sample))
        np.testing.assert_array_equal(streamed[place], made)


def test_unreadable_images_are_passed_over_by_rule(feeder, run):
    broken = run.images.path(10)
    with open(broken, "wb") as file:
        file.write(b"not an image")
    image, skipped = first_readable(run.images, 10, decode)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(read(run.images.path(11))))
    assert len(skipped) == 1 and skipped[0].startswith(f"{broken}: UnidentifiedImageError")
    streamed = [line for views in stream_views(run, 0, 1, 0, TASKS, CPU, feeder) for line in views.skipped]
    epochs, samples = samples_at(np.arange(64), 48, 0)
    assert len(streamed) == np.sum(samples == 10) and set(streamed) == set(skipped)


def test_no_readable_image_left(run, tmp_path):
    images = run.images.take(np.array([0, 1]))
    for sample in range(2):
        open(images.path(sample), "wb").close()
    with pytest.raises(ValueError, match="none of the 2 images"):
        first_readable(images, 1, decode)
