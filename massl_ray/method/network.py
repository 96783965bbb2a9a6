"""The encoder: any timm backbone, a projection head, a unit vector. Student and teacher are two of these."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from massl_ray.config import Config, HeadSection, ModelSection
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator, seed_for

SIZES = ("img_size", "dynamic_img_size", "dynamic_img_pad")  # arguments that follow from the views


class KeyedDropPath(nn.Module):
    """Stochastic depth whose coin flips are handed in, so that they depend on the image's place in the
    batch and on nothing else."""

    def __init__(self, drop_probability: float):
        super().__init__()
        self.drop_probability = drop_probability
        self.uniform: Tensor | None = None  # (rows,) in [0, 1), set by Encoder.forward for the length of one call

    def forward(self, x: Tensor) -> Tensor:
        if self.uniform is None:
            return x
        keep = (self.uniform >= self.drop_probability).to(x.dtype) / (1.0 - self.drop_probability)
        return x * keep.view(-1, *[1] * (x.ndim - 1))


class Head(nn.Module):
    """Multi-layer perceptron onto the sphere. (rows, features) -> (rows, D)"""

    def __init__(self, features: int, config: HeadSection):
        super().__init__()
        widths = [features, *[config.hidden_dim] * (config.num_layers - 1), config.dim]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:-1], strict=False):
            layers.append(nn.Linear(fan_in, fan_out))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(fan_out))
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[-2], widths[-1]))
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.mlp(x), dim=1)


class Encoder(nn.Module):
    """Backbone and head. The backbone may run in bf16 (autocast by the caller); the head and its unit vector are full precision,
    because embeddings that collapse do so first where 16 bits round their differences away."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.drop_paths = [module for module in backbone.modules() if isinstance(module, KeyedDropPath)]

    def forward(self, views: Sequence[Tensor], drop_path: Tensor | None = None) -> Tensor:
        """Embed groups of views, one group a resolution.

        Args:
            views: tensors (n_i, C, H_i, W_i), normalized.
            drop_path: uniform draws (layers, sum of n_i), or None for no stochastic depth.
        Returns:
            (sum of n_i, D) unit rows, in the order of the groups.
        """
        features, first = [], 0
        for images in views:
            self._hand_out(None if drop_path is None else drop_path[:, first : first + len(images)])
            features.append(self.backbone(images))
            first += len(images)
        self._hand_out(None)
        with torch.autocast(views[0].device.type, enabled=False):
            return self.head(torch.cat(features).to(next(self.head.parameters()).dtype))

    def _hand_out(self, uniform: Tensor | None) -> None:
        for layer, module in enumerate(self.drop_paths):
            module.uniform = None if uniform is None else uniform[layer]


def build_encoder(config: Config, *, drop_path: float = 0.0) -> Encoder:
    """A fresh encoder, a pure function of (configuration, run.seed)."""
    with torch.random.fork_rng(devices=[]):  # timm initializes from the global generator: lend it ours and take it back
        torch.manual_seed(seed_for(Stream.WEIGHTS, config.run.seed))
        backbone = build_backbone(config.model, config.views.global_size, drop_path, config.data.channels)
        head = Head(backbone.num_features, config.head)  # type: ignore[arg-type]
    return Encoder(backbone, head)


def build_backbone(
    config: ModelSection, image_size: int, drop_path: float = 0.0, channels: int = 3, more: Mapping[str, Any] | None = None
) -> nn.Module:
    """Any timm model without its classifier; transformers are made for `image_size` and take any other. `more`: further arguments
    that timm's model takes.

    Raises:
        UserError: unknown name (with the nearest ones), unreadable weights, or stochastic depth where the model has none.
    """
    check_name(config.backbone)
    ours: dict[str, Any] = {"num_classes": 0, "pretrained": config.init == "pretrained", "in_chans": channels}
    arguments = {key: value for key, value in (more or {}).items() if key not in SIZES} | ours
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    model, _ = _create(config.backbone, arguments, image_size)
    if config.init not in ("random", "pretrained"):
        load_weights(model, Path(config.init))
    replaced = _replace_drop_path(model)
    if drop_path and not replaced:
        raise UserError(f"model.backbone {config.backbone} has no stochastic depth: set model.drop_path to 0.")
    return model


def size_arguments(name: str, image_size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What build_backbone gives timm.create_model beside `arguments`, so that a model is made for images of this size."""
    return _create(name, arguments, image_size)[1]


def _create(name: str, arguments: dict[str, Any], image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """timm's families take different arguments: a model by the first that this one takes, and these."""
    refused = ""
    any_size = {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    extras: list[dict[str, Any]] = [any_size, {"img_size": image_size}, {}]
    for extra in extras:
        try:
            return timm.create_model(name, **arguments, **extra), extra
        except TypeError as error:
            refused = str(error)
    if "'drop_path_rate'" in refused:
        refused = "it has no stochastic depth, so set model.drop_path to 0"
    raise UserError(f"model.backbone {name} cannot be built: {refused}.")


def check_backbone(config: Config) -> None:
    """Build the backbone without memory and send it one view of each size. Raises UserError for what would fail later."""
    check_name(config.model.backbone)
    plain = config.model.model_copy(update={"init": "random"})
    with torch.device("meta"), torch.no_grad():
        backbone = build_backbone(plain, config.views.global_size, config.model.drop_path, config.data.channels).eval()
        for key in ("global_size", "local_size")[: 2 if config.views.num_local else 1]:
            side = getattr(config.views, key)
            try:
                backbone(torch.empty(2, config.data.channels, side, side))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"model.backbone {config.model.backbone} does not take views.{key} {side}: {reason}") from None


def check_name(name: str) -> None:
    names = timm.list_models()
    if name.split(".")[0] not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; close ones are {', '.join(close)}" if close else ""
        raise UserError(f"model.backbone '{name}' is no timm model{hint}. timm.list_models() lists them all.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict without executing code. Raises UserError for a file that does not fit."""
    from safetensors.torch import load_file

    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"model.init: the weights file {path} cannot be read: it is damaged, or holds other things than tensors, which could "
            "run code. Save its state dict alone."
        ) from None
    except Exception as error:
        raise UserError(f"model.init: the weights file {path} cannot be read ({type(error).__name__}: {error}).") from None
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter two: no dictionary, keys that are no names
        raise UserError(f"model.init: {path} does not fit the backbone. {str(error).splitlines()[-1].strip()}") from None


def drop_path_draws(encoder: Encoder, seed: int, step: int, micro_batch: int, size: int, num_views: int) -> Tensor | None:
    """Uniform draws (layers, V*size), view-major, for one micro-batch: keyed by (seed, step, place in the batch)."""
    if not encoder.drop_paths:
        return None
    draws = generator(Stream.DROP_PATH, seed, step, micro_batch).random(
        (len(encoder.drop_paths), num_views * size), dtype="float32"
    )
    return torch.from_numpy(draws)


def _replace_drop_path(module: nn.Module) -> int:
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, DropPath):
            probability = float(child.drop_prob or 0.0)
            setattr(module, name, KeyedDropPath(probability) if probability else nn.Identity())
            replaced += probability > 0
        else:
            replaced += _replace_drop_path(child)
    return replaced
