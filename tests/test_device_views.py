"""Views on the training device, with torch on the CPU as the device: the same draws give the same pixels within the tolerances."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from massl_ray.config import ViewsSection
from massl_ray.method.colour import Jitter
from massl_ray.method.device_views import device_views, padded
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import ViewParameters, apply_view, draw_views
from tests.helpers import photograph

PLAIN = ViewParameters(side=64, box=(0, 0, 64, 64), flip=False, jitter=None, gray=False, blur_sigma=0.0, solarize=False)
STILL = Jitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(0, 1, 2, 3))
CPU = torch.device("cpu")
CONFIG = ViewsSection(global_size=64, local_size=48)


def pixels(width: int, height: int) -> np.ndarray:
    return np.asarray(photograph(width, height))


def on_device(image: np.ndarray, view: ViewParameters, shrunk: int = 1) -> np.ndarray:
    (made,) = device_views(padded([torch.from_numpy(image.copy())], CPU), [shrunk], [[view]])
    assert made.dtype == torch.uint8 and made.shape == (1, view.side, view.side, 3)
    return made[0].numpy()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (10, 5, 130, 105), (40, 30, 70, 70), (0, 0, 160, 120), (3, 0, 4, 2)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_and_flip(box, flip):
    view = replace(PLAIN, box=box, flip=flip)
    expected = apply_view(Pyramid(pixels(160, 120)), view)
    assert difference(on_device(pixels(160, 120), view), expected) < 1.5
    if box[2] > 4:
        assert difference(on_device(pixels(160, 120), replace(view, flip=not flip)), expected) > 2.5


def test_an_image_without_operations_stays():
    assert np.array_equal(on_device(pixels(64, 64), PLAIN), pixels(64, 64))
    assert np.array_equal(on_device(pixels(64, 64), replace(PLAIN, jitter=STILL)), pixels(64, 64))


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({"jitter": replace(STILL, brightness=1.4)}, 1.0),
        ({"jitter": replace(STILL, contrast=0.6)}, 1.0),
        ({"jitter": replace(STILL, saturation=1.8)}, 1.0),
        ({"jitter": replace(STILL, hue=0.1)}, 1.5),
        ({"jitter": replace(STILL, hue=-0.4)}, 1.5),
        ({"gray": True}, 0.1),
        ({"blur_sigma": 0.4}, 0.5),
        ({"blur_sigma": 2.0}, 0.5),
        ({"solarize": True}, 0.0),
    ],
)
def test_each_operation(change, most):
    view = replace(PLAIN, **change)
    expected = apply_view(Pyramid(pixels(64, 64)), view)
    assert difference(on_device(pixels(64, 64), view), expected) <= most
    assert difference(pixels(64, 64), expected) > max(2.5, most) or change == {"blur_sigma": 0.4}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_jitter_in_its_order(order):
    view = replace(PLAIN, jitter=Jitter(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1, order=order))
    expected = apply_view(Pyramid(pixels(64, 64)), view)
    assert difference(on_device(pixels(64, 64), view), expected) < 1.5
    other = replace(view, jitter=replace(view.jitter, order=order[::-1]))
    assert difference(on_device(pixels(64, 64), other), expected) > 1.5


def test_a_box_sees_nothing_beside_it():
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 30:50] = 255
    for box in ((0, 0, 30, 60), (50, 0, 80, 60), (0, 0, 80, 20), (0, 40, 80, 60)):
        assert not on_device(image, replace(PLAIN, box=box)).any()
    assert (on_device(image, replace(PLAIN, box=(30, 20, 50, 40))) == 255).all()


def test_blur_reflects_at_the_edges():
    rim = np.zeros((64, 64, 3), np.uint8)
    rim[:, 0] = rim[:, -1] = 255
    for image in (rim, rim.transpose(1, 0, 2).copy()):
        view = replace(PLAIN, blur_sigma=2.0)
        found, expected = on_device(image, view).astype(int), apply_view(Pyramid(image), view).astype(int)
        assert np.abs(found - expected).max() <= 1


def test_a_batch_of_images_of_many_sizes():
    """Every image gets its own views, whatever lies beside it, with all of the recipe's operations."""
    images = [pixels(200, 150), pixels(90, 160), pixels(130, 70)]
    drawn = [
        draw_views(CONFIG, image.shape[1], image.shape[0], seed=3, epoch=1, sample=place) for place, image in enumerate(images)
    ]
    batch = padded([torch.from_numpy(image.copy()) for image in images], CPU)
    for part in (slice(0, 2), slice(2, 12)):
        made = device_views(batch, [1, 1, 1], [views[part] for views in drawn])
        for image, views, found in zip(images, drawn, made, strict=True):
            for view, one in zip(views[part], found, strict=True):
                most = 4 if view.solarize else 2.5  # a level beside the threshold may fall on its other side
                assert difference(one.numpy(), apply_view(Pyramid(image), view)) < most


def test_an_image_that_was_decoded_smaller():
    small, view = pixels(160, 120), replace(PLAIN, box=(42, 22, 299, 211))
    expected = apply_view(Pyramid(small, 2), view)
    assert difference(on_device(small, view, shrunk=2), expected) < 1.5
    assert difference(on_device(small, replace(view, box=(48, 22, 305, 211)), shrunk=2), expected) > 1.5


@pytest.mark.parametrize("channels", [1, 4])
def test_other_than_three_channels(channels):
    bands = np.stack([pixels(160, 120)[..., n % 3] for n in range(channels)], axis=2)
    jitter = replace(STILL, brightness=1.2, contrast=0.8, saturation=1.9, hue=0.4)
    view = replace(PLAIN, box=(10, 5, 130, 105), flip=True, jitter=jitter, gray=True, blur_sigma=1.0, solarize=True)
    expected = apply_view(Pyramid(bands), view)
    (made,) = device_views(padded([torch.from_numpy(bands.copy())], CPU), [1], [[view]])
    assert made.shape == (1, 64, 64, channels) and difference(made[0].numpy(), expected) < 2.5
