"""The model card: what a backbone was trained on, how, what it is worth, and how it is loaded. It is made to be published, so it
names no paths and no addresses."""

import json
from collections.abc import Mapping
from typing import Any

from massl_ray.exporting.backbone import Exported
from massl_ray.storage import Folder

METHOD = "[MaSSL (Silva, Pedrini and Ramirez Rivera, ICML 2024)](https://arxiv.org/abs/2407.17486)"
PRIVATE = ("run.dir", "data.source", "data.test_source", "data.cache_gb", "model.init")
FRONT = """\
---
library_name: timm
tags:
- image-feature-extraction
- timm
- self-supervised
---
"""


def model_card(exported: Exported, evaluations: Mapping[str, Any], how: str, front: bool = False) -> str:
    """Markdown. `how`: Python that loads the backbone; `front`: with the lines that the Hugging Face hub reads."""
    config, manifest = exported.config, exported.manifest
    channels, height, width = exported.input_size
    parameters = sum(parameter.numel() for parameter in exported.model.parameters())
    facts = {
        "architecture": f"`{exported.name}` of timm, without a classifier",
        "parameters": f"{parameters:,}",
        "output": f"{exported.features} features an image, not normalized",
        "input": f"{channels} x {height} x {width}, the centred square over {config.eval.crop:g} of the shorter side, bicubic",
        "normalization": f"values in 0..1, less the mean {_several(config.data.mean)}, by {_several(config.data.std)}",
        "branch": f"{exported.branch}, without its projection head",
    }
    trained = {
        "images in the data set": _counted(manifest.get("dataset_size")),
        "steps": _counted(manifest.get("step")),
        "images seen": _counted(manifest.get("images_seen")),
        "weights at the start": "random" if config.model.init == "random" else "trained before",
        "state_sha256": f"`{manifest['state_sha256']}`",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    }
    settings = {f"`{key}`": f"`{value}`" for key, value in manifest["config"].items() if key not in PRIVATE}
    parts = [
        f"# {exported.name}, pretrained without labels",
        f"A vision backbone pretrained by massl-ray with {METHOD}.\n\n{_table(facts)}",
        f"## Load it\n\n```python\n{how}\n```",
        f"## Training\n\n{_table(trained)}",
        f"## Evaluation\n\n{_table(evaluations) if evaluations else 'None was made during training: the images have no labels.'}",
        "## Licence\n\nNone is given here. It is for those to say who trained it, and depends on that of the images"
        + (" and of the weights it began with." if config.model.init != "random" else "."),
        f"## Settings\n\n{_table(settings)}",
    ]
    return (FRONT if front else "") + "\n\n".join(parts) + "\n"


def evaluations(checkpoint: Folder, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a checkpoint: k-NN from its manifest, and every result of its step, or of the whole run, in eval/ beside it.
    What cannot be read is left out."""
    step, found = manifest.get("step"), {}
    if isinstance(manifest.get("knn_top1"), int | float):
        k = manifest["config"].get("eval.knn_k")
        found[f"k-NN top-1 (k = {k})"] = f"{manifest['knn_top1']:.1%}"
    folder = checkpoint.parent.parent / "eval"
    try:
        names = [name for name in folder.entries() if name.endswith(".json")]
    except OSError:
        return found
    for name in names:
        try:
            result = json.loads(folder.read_text(name))
        except (OSError, ValueError, RecursionError):
            continue
        if not isinstance(result, dict):
            continue
        if name == f"knn_step_{step}.json" and "query_images" in result:
            if isinstance(result.get("top1_k1"), float):
                found["k-NN top-1 (k = 1)"] = f"{result['top1_k1']:.1%}"
            found["k-NN images"] = f"{result['bank_images']:,} compared with, {result['query_images']:,} classified"
        elif name in ("knn_pixels.json", "knn_untrained.json") and isinstance(result.get("top1"), float):
            untrained = "the untrained backbone" + (", statistics adapted" if result.get("adapted") else "")
            found[f"k-NN top-1 of {'raw pixels' if 'pixels' in name else untrained}"] = f"{result['top1']:.1%}"
    return found


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in rows.items() if value not in ("", None)]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _counted(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _several(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
