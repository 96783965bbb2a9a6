"""The forms that a backbone is written in. Each is written aside, checked, and only then given its name."""

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from massl_ray.errors import UserError
from massl_ray.evaluation.subjects import NOTE
from massl_ray.exporting.backbone import TOLERANCE, Exported, features_of, two_images
from massl_ray.exporting.card import model_card
from massl_ray.storage import reason, to_disk

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "timm": "", "huggingface": ""}
"""Of the file; '' for a folder."""
LARGEST = 2**31 - 2**26  # bytes of weights in one ONNX file


class Differs(Exception):
    """What was written does not compute what the checkpoint's backbone does: a sentence."""


def check_dest(dest: Path, form: str) -> None:
    """Raises UserError where nothing may be written."""
    suffix = SUFFIXES[form]
    if suffix and dest.suffix != suffix:
        raise UserError(f"DEST {dest} must end in {suffix}: other programs tell by that how to read it.")
    for path in (dest, card_path(dest, form)):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists already. Remove it, or choose another DEST.")


def card_path(dest: Path, form: str) -> Path:
    """README.md in a folder, NAME.md beside a file."""
    return dest.with_suffix(".md") if SUFFIXES[form] else dest / "README.md"


def write(exported: Exported, dest: Path, form: str, results: dict[str, str], check: bool = True) -> float | None:
    """Write the backbone and its card. Returns the largest difference that was found between features; None without `check`.

    Raises:
        Differs: it was written and computes something else; nothing stays.
        UserError: it cannot be written.
    """
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as aside:
            made = Path(aside) / dest.name
            WRITERS[form](exported, made)
            difference = _difference(exported, LOADERS[form](exported, made), form) if check else None
            how = SNIPPETS[form].format(line=loading(exported, dest.name, form))
            card = model_card(exported, results, how, front=form == "huggingface")
            card_path(made, form).write_text(card)
            for file in [made, *made.rglob("*")] if made.is_dir() else [made, card_path(made, form)]:
                if file.is_file():
                    file.chmod(card_path(made, form).stat().st_mode)  # safetensors lets nobody else read
                to_disk(file)
            check_dest(dest, form)  # nobody else has made it meanwhile
            if SUFFIXES[form]:
                os.replace(card_path(made, form), card_path(dest, form))
            os.replace(made, dest)
        to_disk(dest.parent)
    except OSError as error:
        raise UserError(f"{dest} cannot be written ({reason(error)}). Choose another DEST.") from None
    return difference


def loading(exported: Exported, where: str, form: str) -> str:
    """The line of Python that loads it."""
    if form == "safetensors":
        return exported.call(checkpoint_path=f'"{where}"')
    if form == "timm":
        return f'timm.create_model("local-dir:{where}", pretrained=True)'
    if form == "huggingface":
        return f'AutoModel.from_pretrained("{where}")'
    return f'onnxruntime.InferenceSession("{where}").run(["features"], {{"images": images}})'


SNIPPETS = {
    "safetensors": "import timm\n\nbackbone = {line}",
    "timm": "import timm\n\nbackbone = {line}",
    "huggingface": "from transformers import AutoModel  # with timm installed\n\nbackbone = {line}  # features: its pooler_output",
    "onnx": "import onnxruntime\n\n(features,) = {line}  # images: (n, C, H, W) float32, any n",
}
"""The lines around it, in the card."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_safetensors(exported: Exported, path: Path) -> None:
    """One file; what has to be known to use it is in its header."""
    header = {"format": "pt", NOTE: json.dumps(exported.note())}
    save_file(exported.weights(), path, header)


def write_folder(exported: Exported, folder: Path) -> None:
    """As timm reads it from a disk and from the hub, and transformers, too."""
    folder.mkdir()
    config = exported.config
    known = {key: value for key, value in exported.model.pretrained_cfg.items() if key in ("first_conv", "classifier")}  # type: ignore[union-attr,operator]
    inputs = {
        "input_size": exported.input_size,
        "fixed_input_size": "img_size" in exported.arguments and "dynamic_img_size" not in exported.arguments,
        "interpolation": "bicubic",
        "crop_pct": config.eval.crop,
        "crop_mode": "center",
        "mean": config.data.mean,
        "std": config.data.std,
        "num_classes": 0,
        "pool_size": None,
    }
    about = {
        "architecture": exported.name,
        "num_classes": 0,
        "num_features": exported.features,
        "model_args": {key: value for key, value in exported.arguments.items() if key != "num_classes"},
        "pretrained_cfg": inputs | known,
        NOTE: exported.note(),
    }
    pooling = getattr(exported.model, "global_pool", None)
    if isinstance(pooling, str) and pooling:
        about["global_pool"] = pooling
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    save_file(exported.weights(), folder / "model.safetensors", {"format": "pt"})


def write_onnx(exported: Exported, path: Path) -> None:
    """Input `images` (n, C, H, W) float32 normalized, of any n; output `features` (n, D)."""
    need("onnx", "onnxscript", "onnxruntime")
    size = sum(value.numel() * value.element_size() for value in exported.weights().values())
    if size > LARGEST:
        raise UserError(f"The weights take {size / 1e9:.1f} GB, more than one ONNX file may hold: export to safetensors.")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # what the exporter says about itself
        torch.onnx.export(
            exported.model,
            (two_images(exported),),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def need(*modules: str) -> None:
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'massl-ray[export]'.")


# ---- loading back, as others do --------------------------------------------------------------------------------------

Loaded = Callable[[Tensor], Tensor]
"""Features (n, D) of images (n, C, H, W)."""


def load_safetensors(exported: Exported, path: Path) -> Loaded:
    model = timm.create_model(exported.name, checkpoint_path=str(path), **exported.arguments)
    return lambda images: features_of(model, images)


def load_folder(exported: Exported, folder: Path) -> Loaded:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return lambda images: features_of(model, images)


def load_onnx(exported: Exported, path: Path) -> Loaded:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def _difference(exported: Exported, loaded: Loaded, form: str) -> float:
    """Of features, the largest, of two images together and of one alone; as a share of the largest feature where that is over 1."""
    images = two_images(exported)
    worst = 0.0
    for some in (images, images[:1]):
        expected, found = features_of(exported.model, some), loaded(some)
        if found.shape != expected.shape:
            raise Differs(f"The {form} export gives features of the shape {tuple(found.shape)}, not {tuple(expected.shape)}.")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise Differs(f"The {form} export computes other features: they differ by {difference:.2g}, more than {TOLERANCE:g}.")
        worst = max(worst, difference)
    return worst


WRITERS: dict[str, Callable[[Exported, Path], None]] = {
    "safetensors": write_safetensors,
    "timm": write_folder,
    "huggingface": write_folder,
    "onnx": write_onnx,
}
LOADERS: dict[str, Callable[[Exported, Path], Loaded]] = {
    "safetensors": load_safetensors,
    "timm": load_folder,
    "huggingface": load_folder,
    "onnx": load_onnx,
}
