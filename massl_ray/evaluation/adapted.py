"""The honest yardstick of what training gave: the untrained backbone, its running statistics adapted to images first.

A fresh batch norm takes every channel to have mean 0 and variance 1, which no image gives. Forward passes alone put that right,
and on the demo they are worth 13 points of k-NN accuracy: a gain over anything less would count statistics as learning.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from massl_ray.config import Config, resolve
from massl_ray.data.listing import Listing
from massl_ray.data.making import ViewMaker
from massl_ray.data.order import samples_at
from massl_ray.errors import UserError
from massl_ray.evaluation.features import normalized
from massl_ray.training.run import training_images

STEPS = 40  # whose batches are seen at most
IMAGES = 2_560  # seen at most: 40 batches of the demo
AT_ONCE = 4  # micro-batches that are made at the same time


def has_statistics(backbone: nn.Module) -> bool:
    """Whether the backbone has anything to adapt; vision transformers, for instance, have not."""
    return bool(_with_statistics(backbone))


@torch.no_grad()
def adapt_statistics(backbone: nn.Module, batches: Iterable[Tensor], precision: str = "fp32") -> nn.Module:
    """The backbone that sees images as it will after training, but has learned nothing.

    Every running mean and variance becomes the mean over `batches` of that of the batch, as training would have it with weights
    that stand still. Sums are kept in float64, so their order does not matter. Everything but the normalization layers is in
    evaluation mode: nothing is drawn at random.

    Args:
        backbone: is left as it is.
        batches: normalized images (n, C, H, W); of them not one is asked for where there is nothing to adapt.
        precision: 'fp32' or 'bf16', as in train.precision.

    Returns:
        A copy in evaluation mode on the same device; the backbone itself where there is nothing to adapt.

    Raises:
        ValueError: there are no batches.
    """
    if not has_statistics(backbone):
        return backbone
    adapted = deepcopy(backbone).eval()
    layers = _with_statistics(adapted)
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.training, layer.momentum = True, 1.0  # after a batch they hold that batch's
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    sums, seen = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in buffers], 0
    device = buffers[0].device
    for images in batches:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            adapted(images.to(device))
        torch._foreach_add_(sums, [buffer.double() for buffer in buffers])
        seen += 1
    if not seen:
        raise ValueError("there is not one batch of images to adapt running statistics to")
    for buffer, total in zip(buffers, sums, strict=True):
        buffer.copy_(total / seen)
    for layer, momentum in zip(layers, usual, strict=True):
        layer.training, layer.momentum = False, momentum
    return adapted


def training_views(images: Listing, config: Config) -> Iterator[Tensor]:
    """What a run's teacher sees in its first steps: normalized global views (2 b, C, H, W) of micro-batches of b images.

    They are those of the run's first STEPS batches, but of no more than IMAGES images. Order and draws are keyed by run.seed, so
    they are the same at any number of workers. They are made on the CPU also where `views.device` makes them on the GPU.

    Raises ValueError where none of the images can be read.
    """
    resolved = resolve(config, len(images))
    views = config.views.model_copy(update={"num_local": 0, "device": "cpu"})
    make = ViewMaker(images, config.model_copy(update={"views": views}), resolved.batch_size, 0, 0, resolved.batch_size)
    size = resolved.micro_batch_size
    number = max(1, min(STEPS * resolved.batch_size, IMAGES) // size)
    rows = [{"id": np.arange(first * size, (first + 1) * size)} for first in range(number)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, number, AT_ONCE):
            for made in pool.map(make, rows[first : first + AT_ONCE]):
                pixels = torch.from_numpy(made["global_views"]).transpose(0, 1).flatten(0, 1)
                yield normalized(pixels, config.data.mean, config.data.std)


def adapted_to_run(backbone: nn.Module, config: Config) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh backbone adapted to the training views of a run with this configuration, and the facts to tell about it: `adapted`
    and, if it is, `adapted_on`. Where the run's images are gone, the backbone as it is and `not_adapted_because`, a sentence."""
    if not has_statistics(backbone):
        return backbone, {"adapted": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads)  # as in training: the same sums, and no threads that wait for each other
    try:
        images = training_images(config)
        adapted = adapt_statistics(backbone, training_views(images, config), config.train.precision)
    except (UserError, OSError, ValueError) as error:
        return backbone, {"adapted": False, "not_adapted_because": str(error)}
    finally:
        torch.set_num_threads(threads)
    return adapted, {"adapted": True, "adapted_on": f"training views of {images.root}"}


def shuffled(images: Listing) -> Listing:
    """At most IMAGES of the images in an order without classes, always the same one: a batch of neighbours in a folder would be of
    one class, and vary less than the images do."""
    return images.take(samples_at(np.arange(min(len(images), IMAGES)), len(images), seed=0)[1])


def _with_statistics(backbone: nn.Module) -> list[_NormBase]:
    return [part for part in backbone.modules() if isinstance(part, _NormBase) and part.running_mean is not None]
