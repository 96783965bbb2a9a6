"""Frozen features: which pixels the backbone sees, in which order, and that it is left as it was."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from massl_ray.config import Config, DataSection, validate
from massl_ray.data.listing import Listing
from massl_ray.data.sources import open_source
from massl_ray.evaluation import features as module
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.method.views import center_view
from tests.helpers import read

CPU = torch.device("cpu")


class Spy(nn.Module):
    """A backbone whose features are the means of three channels and the pixel at the upper left."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels)
        self.modes.append(torch.is_inference_mode_enabled() and not self.training)
        return self.drop(torch.cat([pixels.mean((2, 3)), pixels[:, :, 0, 0]], dim=1))


def settings(**sections) -> Config:
    values = {"views": {"global_size": 16}, "train": {"precision": "fp32"}, "eval": {"crop": 0.5}}
    return validate(values | sections)


@pytest.fixture
def images(tmp_path) -> Listing:
    """Seven labelled images, no two alike and none square."""
    random = np.random.default_rng(5)
    for index in range(7):
        folder = tmp_path / "images" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20, 30 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return open_source(str(tmp_path / "images"))


def test_the_backbone_sees_normalised_centre_views(images):
    config = settings(data={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)})
    spy = Spy()
    found = backbone_features(spy, images, config, CPU)
    seen = torch.cat(spy.seen)
    assert seen.shape == (7, 3, 16, 16)
    for sample in range(7):
        view = center_view(read(images.path(sample)), 16, 0.5) / 255.0
        expected = (view - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.2]
        assert np.allclose(seen[sample].permute(1, 2, 0).numpy(), expected, atol=1e-5)
        rows = np.concatenate([expected.mean((0, 1)), expected[0, 0]])
        assert np.allclose(found.rows[sample].numpy(), rows, atol=1e-5)
    assert found.samples.tolist() == list(range(7)) and found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.rows.dtype == torch.float32 and all(spy.modes)


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_is_afterwards_as_it_was(images, training):
    spy = Spy().train(training)
    backbone_features(spy, images, settings(), CPU)
    assert spy.training is training and spy.drop.training is training


def test_also_where_it_fails(images):
    class Failing(Spy):
        def forward(self, pixels):
            raise RuntimeError("out of memory")

    spy = Failing().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone_features(spy, images, settings(), CPU)
    assert spy.training and spy.drop.training


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision(images, precision, dtype):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, pixels):
            out = self.inner(pixels.mean((2, 3)))
            self.dtype = out.dtype
            return out

    backbone = Linear()
    assert backbone_features(backbone, images, settings(train={"precision": precision}), CPU).rows.dtype == torch.float32
    assert backbone.dtype == dtype


def test_chunks_change_nothing(images, monkeypatch):
    whole = backbone_features(Spy(), images, settings(), CPU)
    monkeypatch.setattr(module, "CHUNK", 3)
    spy = Spy()
    parts = backbone_features(spy, images, settings(), CPU)
    assert [len(pixels) for pixels in spy.seen] == [3, 3, 1]
    assert torch.allclose(parts.rows, whole.rows, atol=1e-6)
    assert parts.samples.tolist() == whole.samples.tolist() and parts.labels.tolist() == whole.labels.tolist()


def test_unreadable_images_are_left_out(images, monkeypatch):
    whole = pixel_features(images, DataSection())
    for sample in (0, 3, 4, 5):  # with chunks of three: one of the first, all of the second
        with open(images.path(sample), "wb") as file:
            file.write(b"no image")
    monkeypatch.setattr(module, "CHUNK", 3)
    for found in (pixel_features(images, DataSection()), backbone_features(Spy(), images, settings(), CPU)):
        assert found.samples.tolist() == [1, 2, 6]
        assert found.labels.tolist() == [0, 0, 1]
    assert torch.equal(pixel_features(images, DataSection()).rows, whole.rows[[1, 2, 6]])


def test_none_can_be_read(images):
    for sample in range(7):
        open(images.path(sample), "wb").close()
    for found in (pixel_features(images, DataSection()), backbone_features(Spy(), images, settings(), CPU)):
        assert len(found.rows) == len(found.samples) == len(found.labels) == 0


def test_without_labels(images):
    bare = Listing(images.store)
    assert pixel_features(bare, DataSection()).labels is None
    assert torch.equal(pixel_features(bare, DataSection()).rows, pixel_features(images, DataSection()).rows)


def test_pixels_are_the_whole_image_shrunk(images):
    found = pixel_features(images, DataSection(), side=8)
    assert found.rows.shape == (7, 8 * 8 * 3) and found.rows.dtype == torch.float32
    for sample in range(7):
        expected = Image.open(images.path(sample)).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(found.rows[sample].reshape(8, 8, 3).numpy(), np.asarray(expected))
    assert pixel_features(images, DataSection()).rows.shape[1] == 32 * 32 * 3
