"""Weights files of anyone: read without executing code, their names understood, fitted to a backbone or refused in a sentence."""

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from massl_ray.errors import UserError
from massl_ray.storage import Folder, reason

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
COMMON = (
    "vit_tiny_patch16_224 vit_small_patch16_224 vit_small_patch8_224 vit_small_patch32_224 vit_base_patch16_224 "
    "vit_base_patch8_224 vit_base_patch32_224 vit_large_patch16_224 vit_small_patch14_dinov2 vit_base_patch14_dinov2 "
    "resnet18 resnet34 resnet50 resnet101 wide_resnet50_2 resnext50_32x4d convnext_atto convnext_tiny convnext_small "
    "convnext_base swin_tiny_patch4_window7_224 efficientnet_b0 efficientnet_lite0 mobilenetv3_small_100 mobilenetv3_large_100 "
    "regnety_016 densenet121 xcit_small_12_p16_224 test_vit test_byobnet test_resnet test_convnext test_efficientnet"
).split()
"""Backbones that a file of other shapes is compared with: what people train and publish."""


def read_weights(where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a file at a path or URI, by its name with those of the dictionaries around it, and the file's metadata
    (of safetensors). No code in it is executed. Raises UserError."""
    place = Folder(where)
    try:
        if place.is_local:
            return _read(place.path)
        with tempfile.TemporaryDirectory(prefix="massl-ray-") as folder:
            place.download("", Path(folder) / place.name)
            return _read(Path(folder) / place.name)
    except UnpicklingError:
        why = "it is damaged, or holds other things than tensors, which could run code. Save its state dict alone"
    except FileNotFoundError:
        why = "there is no such file"
    except Exception as error:  # torch and safetensors raise what they like
        why = f"it is damaged or no weights file ({type(error).__name__}: {reason(error)[:200]})"
    raise UserError(f"The weights file {place} cannot be read: {why}.")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dictionary
    plain = [argparse.Namespace, np.dtype, type(np.dtype("float64")), type(np.dtype("int64")), np.float64, _numpy_scalar()]
    with torch.serialization.safe_globals(plain):  # the settings that DINO and others save beside the tensors
        return dict(_flat(torch.load(path, map_location="cpu", weights_only=True))), {}


def _numpy_scalar() -> Any:
    return type(np.float64(0)).__reduce__(np.float64(0))[0]  # its module has moved between versions


def _flat(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else str(key))]
    return []


def fitted(weights: Mapping[str, Tensor], model: nn.Module, file: str, backbone: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state that `model` takes, whatever stands before its names in the file (`teacher.`, `module.backbone.`, ...): the
    prefix with which most names are found, the teacher's where there are several. Also parts of the file that are left out: heads.

    Raises UserError, with what is missing and the nearest backbone, where the file is of another architecture.
    """
    wanted = model.state_dict()
    prefix = find_prefix(list(weights), list(wanted))
    state = {name: weights[prefix + name] for name in wanted if prefix + name in weights}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state and name not in optional]
    other = [name for name in state if state[name].shape != wanted[name].shape]
    under = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    parts = {name.split(".")[0] for name in wanted}
    surplus = [name for name in under if name not in wanted and name.split(".")[0] in parts]
    if missing or other or surplus:
        raise UserError(
            f"{file} does not fit the backbone {backbone}: {_misfit(missing, other, surplus, state, wanted)}. "
            f"{nearest_sentence(weights)}"
        )
    state |= {name: wanted[name] for name in optional - set(state)}
    taken = {prefix + name for name in wanted}
    left = sorted({".".join(name.split(".")[:2]) for name in weights if name not in taken})
    return state, left


def find_prefix(names: Sequence[str], wanted: Sequence[str]) -> str:
    """What stands before most of the names that are wanted."""
    known, found = set(wanted), Counter[str]()
    for name in names:
        found.update(name[:at] for at in [0, *(at + 1 for at, c in enumerate(name) if c in "./")] if name[at:] in known)

    def rank(prefix: str) -> tuple[int, bool, bool, int]:
        return found[prefix], "teacher" in prefix or "ema" in prefix, "student" not in prefix, -len(prefix)

    return max(found, key=rank, default="")


def native_size(weights: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Side in pixels of the images that a file's position embedding is for; None where there is none, or it is not square."""
    embedding = getattr(model, "pos_embed", None)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    name = find_prefix(list(weights), list(model.state_dict())) + "pos_embed"
    if not isinstance(embedding, Tensor) or embedding.ndim != 3 or not patch or name not in weights or weights[name].ndim != 3:
        return None
    grid = weights[name].shape[1] - embedding.shape[1] + model.patch_embed.num_patches  # type: ignore[union-attr,operator]
    side = round(max(int(grid), 0) ** 0.5)
    return side * int(patch[0]) if side and side * side == grid else None


def nearest_sentence(weights: Mapping[str, Tensor]) -> str:
    """Which backbone the file looks like."""
    name, share = nearest_backbone(weights)
    if share == 1.0:
        return f"Its tensors have the names and shapes of {name}: try --backbone {name}."
    first = ", ".join(list(weights)[:3])
    if share < 0.2:
        return f"It looks like none of the common backbones of timm: its {len(weights)} tensors begin with {first}."
    return f"The nearest of the common backbones of timm is {name}: {share:.0%} of its tensors are there, in their shapes."


def nearest_backbone(weights: Mapping[str, Tensor], names: Sequence[str] = COMMON) -> tuple[str, float]:
    """Of these the one with the most tensors in the file, by name and shape, and the share of its tensors. Position embeddings
    may be of any length."""
    import timm

    best = ("", 0.0)
    for name in names:
        if name not in timm.list_models():
            continue
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in timm.create_model(name, num_classes=0).state_dict().items()}
        counted = [key for key in shapes if not key.endswith("num_batches_tracked")]
        prefix = find_prefix(list(weights), counted)
        alike = sum(prefix + key in weights and _alike(key, weights[prefix + key].shape, shapes[key]) for key in counted)
        inside = sum(key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in _parts(counted) for key in weights)
        share = alike / max(len(counted), inside - len(shapes) + len(counted))
        best = max(best, (name, share), key=lambda found: found[1])
    return best


def _parts(names: Sequence[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _alike(name: str, shape: torch.Size, other: torch.Size) -> bool:
    return len(shape) == len(other) and shape[-1] == other[-1] if name == "pos_embed" else shape == other


def _misfit(
    missing: Sequence[str],
    other: Sequence[str],
    surplus: Sequence[str],
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> str:
    said = []
    if other:
        name = other[0]
        shapes = f"{tuple(state[name].shape)} there and {tuple(wanted[name].shape)} here"
        said.append(f"{name} is {shapes}" + _more(len(other)))
    if missing:
        said.append(f"it lacks {missing[0]}" + _more(len(missing)))
    if surplus:
        said.append(f"it has {surplus[0]}" + _more(len(surplus)) + ", which the backbone has not")
    return "; ".join(said)


def _more(number: int) -> str:
    return f" and {number - 1} more" if number > 1 else ""
