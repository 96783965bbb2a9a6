"""What is evaluated: a backbone, from wherever it comes, with the view that it takes of an image."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from massl_ray.config import Config
from massl_ray.config.schema import IMAGENET
from massl_ray.errors import UserError
from massl_ray.evaluation.adapted import adapted_to_run
from massl_ray.evaluation.alterations import Alteration, described
from massl_ray.evaluation.configs import config_of_checkpoint, config_of_run
from massl_ray.evaluation.features import normalized
from massl_ray.evaluation.foreign import Pooled, as_timm_says, built, called, check_hub, of_timm
from massl_ray.evaluation.weights import SUFFIXES, fitted, native_size, nearest_sentence, read_weights
from massl_ray.method.network import build_encoder, check_name
from massl_ray.method.resampling import resized
from massl_ray.method.views import center_view
from massl_ray.storage import Folder, reason
from massl_ray.training.state import state_sha256

PIXELS, UNTRAINED, PYTHON = "pixels", "untrained:", "python:"
NOTE = "massl_ray"  # the entry of a safetensors file's metadata in which `massl-ray export` writes a JSON object of these:
NOTED = ("backbone", "size", "crop", "channels", "mean", "std", "precision")  # and any further facts
HELP = (
    "Give a run directory, a checkpoint, an exported folder or file, a weights file with --backbone NAME, a timm model name, "
    "untrained:NAME, untrained:RUN, python:MODULE:CALLABLE, or pixels"
)


@dataclass(frozen=True)
class Subject:
    name: str  # as people call it
    backbone: nn.Module  # in evaluation mode; normalized (n, C, H, W) -> (n, D)
    size: int  # side of the view, in pixels
    crop: float  # share of the shorter side that the centred view covers
    channels: int
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]
    precision: str  # 'fp32' or 'bf16'
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Where it is from; of a run also `run`, its directory; of an untrained one `adapted`: whether its running statistics are."""
    whole: bool = False  # the view is the whole image, squeezed into a square
    alteration: Alteration | None = None  # instead of that view, or on top of it

    def view(self, image: np.ndarray) -> np.ndarray:
        """(h, w, channels) uint8 -> (size, size, channels) uint8"""
        return self.alteration.view(image, self.size, self._centred) if self.alteration else self._centred(image)

    def _centred(self, image: np.ndarray) -> np.ndarray:
        return resized(image, self.size) if self.whole else center_view(image, self.size, self.crop)

    def normalized(self, views: Tensor) -> Tensor:
        """(n, H, W, C) uint8 -> (n, C, H, W) float32, on the device of `views`"""
        return normalized(views, self.mean, self.std)

    @torch.inference_mode()
    def embedded(self, views: Tensor) -> Tensor:
        """Features (n, D) float32 of views (n, H, W, C) uint8 on the backbone's device."""
        with torch.autocast(views.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.backbone(self.normalized(views)).float()

    def to(self, device: torch.device) -> "Subject":
        return replace(self, backbone=self.backbone.to(device))

    @cached_property
    def sha256(self) -> str:
        """Of the backbone's tensors."""
        return state_sha256({name: value.detach().cpu().contiguous() for name, value in self.backbone.state_dict().items()})

    @property
    def settings(self) -> dict[str, Any]:
        """What features depend on beside the backbone."""
        names = ("size", "crop", "channels", "mean", "std", "precision", "whole")
        return {name: getattr(self, name) for name in names} | (
            {"alteration": described(self.alteration)} if self.alteration else {}
        )


class Pixels(nn.Module):
    """The images themselves: what any backbone has to beat. Rows are flat (H, W, C)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).flatten(1)


def open_subject(
    what: str,
    *,
    backbone: str | None = None,
    size: int | None = None,
    crop: float | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    precision: str | None = None,
    config: Config | None = None,
) -> Subject:
    """Open what HELP lists. Runs give their teacher.

    Args:
        backbone: timm name, for weights files that do not say theirs.
        size, crop, mean, std, precision: instead of what it was made for.
        config: data.channels of what fits any number: pixels, models without weights.

    Raises:
        UserError: there is no such thing, it cannot be read, or does not fit.
    """
    channels = config.data.channels if config else 3
    subject = _open(what, backbone, channels)
    given = {"size": size, "crop": crop, "mean": tuple(mean), "std": tuple(std), "precision": precision}
    subject = replace(subject, **{key: value for key, value in given.items() if value})
    if len(subject.mean) != subject.channels or len(subject.std) != subject.channels:
        raise UserError(
            f"{subject.name} takes {subject.channels} channels, but data.mean and data.std have {len(subject.mean)} and "
            f"{len(subject.std)} values: give one for each channel."
        )
    subject.backbone.eval().requires_grad_(False)
    return replace(subject, facts={**subject.facts, "features": _try(subject)})


def _open(what: str, backbone: str | None, channels: int) -> Subject:
    if what == PIXELS:
        return Subject(PIXELS, Pixels(), 32, 1.0, channels, (0.0,) * channels, (1.0,) * channels, "fp32", whole=True)
    if what.startswith(PYTHON):
        return _foreign(what, channels)
    if what.startswith(UNTRAINED):
        inner = what.removeprefix(UNTRAINED)
        return _untrained_run(inner) if _kind(inner) == "folder" else _by_name(inner, what, channels, pretrained=False)
    kind = _kind(what)
    if kind == "file":
        return _file(what, backbone)
    if kind == "folder":
        return _folder(what, backbone)
    if "://" in what or what.endswith(SUFFIXES) or os.sep in what:
        raise UserError(f"There is no file or folder {what}. {HELP}.")
    return _by_name(what, what, channels, pretrained=True)


def _kind(what: str) -> str | None:
    try:
        return Folder(what).kind()
    except OSError as error:
        raise UserError(f"{what} cannot be read ({reason(error)}). Mend the address, its permissions or its credentials.") from None


def _folder(where: str, backbone: str | None) -> Subject:
    from massl_ray.training.checkpoint import Damaged, read_checkpoint  # late, as this is what takes a run

    folder = Folder(where)
    try:
        names = folder.entries()
        if "config.json" in names:
            return _exported(folder)
        checkpoint = _checkpoint(folder)
        tensors, manifest = read_checkpoint(checkpoint)
    except Damaged as error:
        raise UserError(f"The checkpoint is damaged: {error}. Give another one of the run.") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({reason(error)}). Mend its permissions or credentials.") from None
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    config = config_of_checkpoint(manifest, run)
    name = backbone or config.model.backbone
    channels, size = config.data.channels, config.views.global_size
    weights = {key: value for key, value in tensors.items() if key.startswith("teacher/backbone.")}
    model, _ = _loaded(name, weights, str(checkpoint), channels, size)
    facts = {"checkpoint": str(checkpoint), "run": str(run), "backbone": name, "step": manifest.get("step")}
    facts |= {key: manifest.get(key) for key in ("images_seen", "state_sha256")}
    view = (size, config.eval.crop, channels, config.data.mean, config.data.std, config.train.precision)
    return Subject(f"{run.name}/{checkpoint.name}", model, *view, facts)


def _checkpoint(folder: Folder) -> Folder:
    from massl_ray.inspect import find_checkpoint

    try:
        return find_checkpoint(str(folder))
    except UserError:
        raise UserError(f"{folder} holds no checkpoint and no exported backbone. {HELP}.") from None


def _untrained_run(where: str) -> Subject:
    """The backbone as it was before the first step, its running statistics adapted to the run's training views; where these
    images are gone the facts say why it is not, and `measuring` adapts it to what it is measured on."""
    folder = Folder(where)
    try:
        config = config_of_run(folder) or config_of_run(folder.parent.parent)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({reason(error)}).") from None
    if config is None:
        raise UserError(f"{folder} is no run directory: it has no config.toml.")
    model = build_encoder(config).backbone
    view = (config.views.global_size, config.eval.crop, config.data.channels, config.data.mean, config.data.std)
    model, known = adapted_to_run(model, config)
    facts = {"backbone": config.model.backbone, "seed": config.run.seed, "init": config.model.init} | known
    return Subject(f"untrained {config.model.backbone}", model, *view, config.train.precision, facts)


def _exported(folder: Folder) -> Subject:
    """A folder as timm's hub has them: config.json and model.safetensors."""
    try:
        described = json.loads(folder.read_text("config.json"))
        known = described["pretrained_cfg"]
        name, view = str(described["architecture"]), as_timm_says(known)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not that of an exported backbone ({type(error).__name__}: {error})."
        ) from None
    found = [file for file in folder.entries() if file.endswith(SUFFIXES)]
    if not found:
        raise UserError(f"{folder} has a config.json, but no weights file beside it.")
    best = "model.safetensors" if "model.safetensors" in found else found[0]
    weights, _ = read_weights((folder / best).uri)
    model, left = _loaded(name, weights, str(folder / best), view["channels"], view["size"], described.get("model_args") or {})
    noted = described.get(NOTE)
    facts = {"folder": str(folder), "backbone": name, "left_out": left} | (noted if isinstance(noted, dict) else {})
    return Subject(folder.name, model, **(view | {key: facts[key] for key in ("precision",) if key in facts}), facts=facts)


def _file(where: str, backbone: str | None) -> Subject:
    weights, metadata = read_weights(where)
    if not weights:
        raise UserError(f"{where} holds no tensors.")
    try:
        noted = json.loads(metadata.get(NOTE, "{}"))
    except ValueError:
        noted = {}
    name = backbone or noted.get("backbone")
    if not name:
        raise UserError(f"{where} does not say its architecture: give --backbone NAME. {nearest_sentence(weights)}")
    check_name(name)
    channels = int(noted.get("channels", 3))
    view: dict[str, Any] = of_timm(name, channels)
    view.update(IMAGENET if channels == 3 and "." not in name else {})  # what files without a tag are for
    view |= {key: tuple(value) if isinstance(value, list) else value for key, value in noted.items() if key in NOTED[1:]}
    model, left = _loaded(name, weights, where, channels, view["size"])
    facts = {"file": where, "backbone": name, "left_out": left} | {key: noted[key] for key in noted if key not in NOTED}
    return Subject(os.path.basename(Folder(where).name), model, **view, facts=facts)


def _loaded(
    name: str, weights: Mapping[str, Tensor], file: str, channels: int, size: int, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, list[str]]:
    """A backbone with the weights of a file. Where it has learned positions, it is made for the images that the file's are for."""
    model = built(name, channels, size, arguments)
    native = native_size(weights, model)
    if native and native != size:
        model = built(name, channels, native, arguments)
    state, left = fitted(weights, model, file, name)
    model.load_state_dict(state)
    return model, left


def _by_name(name: str, what: str, channels: int, *, pretrained: bool) -> Subject:
    try:
        check_name(name)
    except UserError as error:
        there_is = str(error).removeprefix("model.backbone ")
        raise UserError(f"{there_is} {HELP}.") from None
    view = of_timm(name, channels)
    if pretrained:
        check_hub(name)
    try:
        model = built(name, channels, view["size"], pretrained=pretrained)
    except UserError:
        raise
    except Exception as error:  # the hub's and timm's own
        raise UserError(
            f"The weights of {name} are neither on this machine nor to be had from the hub ({type(error).__name__}: "
            f"{reason(error)[:160]}). Give a weights file with --backbone {name}, or untrained:{name}."
        ) from None
    facts = {"backbone": name} | ({"init": "pretrained"} if pretrained else {"init": "random", "adapted": False})
    return Subject(what, model, **view, facts=facts)


def _foreign(what: str, channels: int) -> Subject:
    view = as_timm_says({"input_size": (channels, 224, 224)})
    return Subject(what.rpartition(":")[2], Pooled(called(what.removeprefix(PYTHON))), **view, facts={"python": what})


def _try(subject: Subject) -> int:
    """The features' length. Raises UserError where the backbone does not give one row an image."""
    views = torch.zeros(2, subject.size, subject.size, subject.channels, dtype=torch.uint8)
    try:
        found = subject.embedded(views)
    except Exception as error:  # of any backbone
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"{subject.name} does not take images of {subject.channels} channels and {subject.size} px: {why}."
        ) from None
    if found.ndim != 2 or len(found) != 2:
        raise UserError(f"{subject.name} gives {tuple(found.shape)} for two images; features have to be (2, D).")
    return found.shape[1]
