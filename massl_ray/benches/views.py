"""`bench views`: from a JPEG's bytes to the recipe's 12 augmented crops, ours beside torchvision's transforms, on one core."""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import cv2
import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2

from massl_ray.benches.measure import alternate, machine, median_ratio
from massl_ray.benches.photographs import HEIGHT, QUALITY, WIDTH, photographs
from massl_ray.config import ViewsSection
from massl_ray.data.decode import Encoded
from massl_ray.data.making import views_of

NUMBER = 32  # photographs a round
BLUR_TAPS = 9  # of torchvision's blur, as recipes with this range of sigma have it; ours has up to 11


def run(device: torch.device, rounds: int = 7, photos: str | None = None) -> dict[str, Any]:
    """CPU seconds of each side in turn; what comes out is uint8 for all of them, the normalization being the device's work."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images, config = photographs(NUMBER, photos), ViewsSection()
    sides = {name: _over(images, make) for name, make in makers(config).items()}
    seconds = alternate(sides, torch.device("cpu"), rounds, time.process_time)
    milliseconds = {name: statistics.median(values) / NUMBER * 1000 for name, values in seconds.items()}
    ratio_pil, ratio_v2 = (median_ratio(seconds[side], seconds["ours"]) for side in ("torchvision_pil", "torchvision_v2"))
    return {
        "name": "views",
        "work": f"{NUMBER} JPEGs of {WIDTH} x {HEIGHT} px, quality {QUALITY}: decode, 2 x {config.global_size} px and "
        f"{config.num_local} x {config.local_size} px with all augmentations, to uint8; CPU time of one thread",
        **machine(torch.device("cpu")),
        "bits_per_pixel": statistics.mean(len(image) * 8 / WIDTH / HEIGHT for image in images),
        "reference_ms_per_image": {side: value for side, value in milliseconds.items() if side != "ours"},
        "ours_ms_per_image": milliseconds["ours"],
        "images_per_s_per_core": 1000 / milliseconds["ours"],
        "ratio": ratio_pil,
        "ratio_torchvision_pil": ratio_pil,
        "ratio_torchvision_v2": ratio_v2,
    }


def makers(config: ViewsSection) -> dict[str, Callable[[bytes], Any]]:
    """Each side as a function from a JPEG's bytes to its views."""
    pil, tensor = reference_views(transforms, config), reference_views(v2, config)
    to_tensor, numbers = transforms.PILToTensor(), count()

    def torchvision_pil(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [to_tensor(view(image)) for view in pil]

    def torchvision_v2(data: bytes) -> list[torch.Tensor]:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return [view(image) for view in tensor]

    def ours(data: bytes) -> Any:
        return views_of(Encoded(data), config, seed=0, epoch=0, sample=next(numbers))

    return {"torchvision_pil": torchvision_pil, "torchvision_v2": torchvision_v2, "ours": ours}


def reference_views(module: Any, config: ViewsSection) -> list[Callable[[Any], Any]]:
    """The recipe as its users write it: one chain of torchvision's transforms a view; `module` is one of its two versions."""

    def chain(kind: int) -> Callable[[Any], Any]:
        side, area = (config.local_size, config.local_area) if kind == 2 else (config.global_size, config.global_area)
        jitter = module.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        return module.Compose(
            [
                module.RandomResizedCrop(side, scale=area, interpolation=InterpolationMode.BICUBIC, antialias=True),
                module.RandomHorizontalFlip(config.flip),
                module.RandomApply([jitter], config.jitter),
                module.RandomGrayscale(config.gray),
                module.RandomApply([module.GaussianBlur(BLUR_TAPS, config.blur_sigma)], config.blur[kind]),
                module.RandomSolarize(128, config.solarize if kind == 1 else 0),
            ]
        )

    return [chain(0), chain(1), *[chain(2)] * config.num_local]


def _over(images: Sequence[bytes], make: Callable[[bytes], Any]) -> Callable[[], None]:
    def all_of_them() -> None:
        for image in images:
            make(image)

    return all_of_them
