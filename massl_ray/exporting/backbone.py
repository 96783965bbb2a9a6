"""What is exported: the backbone of a checkpoint, how it is built elsewhere, and how images become its input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from massl_ray.config import Config, validate
from massl_ray.errors import UserError
from massl_ray.method.network import build_backbone, size_arguments
from massl_ray.shown import in_a_line
from massl_ray.storage import Folder
from massl_ray.training.checkpoint import Damaged, read_checkpoint

BRANCHES = ("teacher", "student")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A backbone in evaluation mode, and what has to be known to use it."""

    model: nn.Module  # (n, C, H, W) float32 normalized -> (n, D)
    arguments: Mapping[str, Any]  # of timm.create_model beside the name
    config: Config
    branch: str
    manifest: Mapping[str, Any]  # of the checkpoint

    @property
    def name(self) -> str:
        """timm's, without the tag of its pretrained weights."""
        return self.config.model.backbone.split(".")[0]

    @property
    def features(self) -> int:
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        side = self.config.views.global_size
        return self.config.data.channels, side, side

    def weights(self) -> dict[str, Tensor]:
        """By timm's names."""
        return {name: value.contiguous() for name, value in self.model.state_dict().items()}

    def note(self) -> dict[str, Any]:
        """What `massl-ray evaluate` reads of an exported file."""
        config = self.config
        return {
            "backbone": self.name,
            "size": config.views.global_size,
            "crop": config.eval.crop,
            "channels": config.data.channels,
            "mean": config.data.mean,
            "std": config.data.std,
            "precision": config.train.precision,
            "arguments": dict(self.arguments),
            "branch": self.branch,
            "step": self.manifest.get("step"),
            "images_seen": self.manifest.get("images_seen"),
            "state_sha256": self.manifest.get("state_sha256"),
        }

    def call(self, **more: str) -> str:
        """The line of Python that builds it elsewhere; `more` are arguments as they are written."""
        written = {key: repr(value) for key, value in self.arguments.items()}
        return f'timm.create_model("{self.name}", {", ".join(f"{key}={value}" for key, value in (more | written).items())})'


def read_backbone(checkpoint: Folder, branch: str = "teacher") -> Exported:
    """Raises UserError where the checkpoint is damaged, or its backbone is not one that this version builds."""
    try:
        tensors, manifest = read_checkpoint(checkpoint)
    except Damaged as error:
        raise UserError(in_a_line(f"The checkpoint is damaged: {error}.")) from None
    try:
        config = _config(manifest)
        plain = config.model.model_copy(update={"init": "random"})
        model = build_backbone(plain, config.views.global_size, channels=config.data.channels)
    except (UserError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(in_a_line(f"The settings in the manifest of {checkpoint} make no backbone: {error}")) from None
    prefix = f"{branch}/backbone."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        name = config.model.backbone
        raise UserError(f"The {branch} in {checkpoint} is no {name} of this timm ({timm.__version__}): {last}") from None
    return Exported(model.eval(), _arguments(config), config, branch, manifest)


def two_images(exported: Exported) -> Tensor:
    """(2, C, H, W) normalized: colour ramps with noise, the same each time."""
    channels, height, width = exported.input_size
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, width).expand(2, channels, height, width)
    pixels = 0.5 * ramp + 0.5 * torch.rand(2, channels, height, width, generator=generator)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (exported.config.data.mean, exported.config.data.std))
    return (pixels - mean) / std


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def _config(manifest: Mapping[str, Any]) -> Config:
    """What a manifest has by whole names, of the sections that say what the backbone is and sees."""
    nested: dict[str, dict[str, Any]] = {"data": {}, "views": {}, "model": {}, "train": {}, "eval": {}}
    for key, value in manifest["config"].items():
        section, _, name = key.partition(".")
        if section in nested:
            nested[section][name] = value
    return validate(nested)


def _arguments(config: Config) -> dict[str, Any]:
    """Those of timm.create_model that build_backbone found, on no memory."""
    arguments: dict[str, Any] = {"num_classes": 0}
    if config.data.channels != 3:
        arguments["in_chans"] = config.data.channels
    with torch.device("meta"):
        return arguments | size_arguments(config.model.backbone, config.views.global_size, arguments)
