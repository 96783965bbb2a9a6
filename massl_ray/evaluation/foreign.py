"""Models of others: timm's, with and without its weights, and those that a user's own code makes."""

import importlib
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from massl_ray.config import IMAGENET_GRAY, ModelSection
from massl_ray.config.schema import IMAGENET
from massl_ray.errors import UserError
from massl_ray.method.network import build_backbone
from massl_ray.storage import reason


class Pooled(nn.Module):
    """A foreign model: maps (n, D, H, W) and tokens (n, T, D) are averaged."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        found = self.inner(images)
        return found.mean((2, 3)) if found.ndim == 4 else found.mean(1) if found.ndim == 3 else found


def built(name: str, channels: int, size: int, arguments: Mapping[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """A timm backbone; without weights always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        init = "pretrained" if pretrained else "random"
        return build_backbone(ModelSection(backbone=name, init=init), size, channels=channels, more=arguments)


def check_hub(name: str) -> None:
    """Its client would try for a minute before it gives up."""
    from huggingface_hub import constants, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UserError(f"timm has no weights of {name}. Give untrained:{name}, or a weights file with --backbone {name}.")
    files = ("model.safetensors", "pytorch_model.bin")
    cached = known.hf_hub_id and any(isinstance(try_to_load_from_cache(known.hf_hub_id, file), str) for file in files)
    if cached or not known.hf_hub_id or urllib.request.getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"The weights of {name} are not on this machine, and {address.hostname} cannot be reached ({reason(error)}). Give a "
            f"weights file with --backbone {name}, or untrained:{name}."
        ) from None


def of_timm(name: str, channels: int) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    view = as_timm_says(known.to_dict() if known else {})
    if channels == view["channels"]:
        return view
    gray = {"mean": (sum(view["mean"]) / len(view["mean"]),) * channels, "std": (sum(view["std"]) / len(view["std"]),) * channels}
    return view | {"channels": channels} | gray


def as_timm_says(known: Mapping[str, Any]) -> dict[str, Any]:
    channels, size, _ = known.get("input_size") or (3, 224, 224)
    usual = IMAGENET if channels == 3 else {key: value * channels for key, value in IMAGENET_GRAY.items()}
    mean, std = (tuple(known.get(key) or usual[key]) for key in ("mean", "std"))
    crop = known.get("crop_pct") or 0.875
    return {"size": int(size), "crop": float(crop), "channels": int(channels), "mean": mean, "std": std, "precision": "fp32"}


def called(what: str) -> nn.Module:
    """What MODULE:CALLABLE returns. The user's own code, which is run; the current folder is looked in first."""
    module, _, name = what.partition(":")
    if not module or not name:
        raise UserError(f"python:{what} is not python:MODULE:CALLABLE.")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:  # anything can be in it
        raise UserError(f"python:{what} cannot be had ({type(error).__name__}: {reason(error)}).") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise UserError(f"python:{what} returned {type(model).__name__}, not a torch.nn.Module.")
    return model
