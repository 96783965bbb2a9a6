"""What an evaluation found, as JSON: one file a subject and data set, eval/evaluation_SUBJECT_DATA.json in a run's directory."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from massl_ray import __version__
from massl_ray.data.listing import Listing
from massl_ray.evaluation.results import Figure, Result
from massl_ray.evaluation.subjects import Subject
from massl_ray.storage import Folder

PREFIX = "evaluation_"
SHOWN = 20  # paths of unreadable images that a record names


def data_facts(name: str, train: Listing, test: Listing, unreadable: Sequence[str]) -> dict[str, Any]:
    """What a subject was evaluated on."""
    sides = {"train": train, "test": test}
    facts: dict[str, Any] = {"name": name, "classes": len(train.classes)}
    for side, images in sides.items():
        facts |= {f"{side}_root": images.root, f"{side}_images": len(images)}
        facts[f"{side}_names_sha256"] = images.identity()["names_sha256"]
    return facts | {"unreadable": len(unreadable), "unreadable_first": list(unreadable[:SHOWN])}


def to_record(subject: Subject, data: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Every figure with its interval, and everything that it depends on."""
    return {
        "subject": subject.name,
        "backbone_sha256": subject.sha256,
        "from": dict(subject.facts),
        "view": subject.settings,
        "data": dict(data),
        "protocols": {
            result.protocol: {
                "figures": {name: asdict(figure) for name, figure in result.figures.items()},
                "parameters": dict(result.parameters),
            }
            for result in results
        },
        "versions": {"massl-ray": __version__, "torch": str(torch.__version__)},
    }


def record_name(record: Mapping[str, Any]) -> str:
    return f"{PREFIX}{_slug(record['subject'])}_{_slug(record['data']['name'])}.json"


def write_record(folder: Folder, record: Mapping[str, Any]) -> str:
    """Into a folder, aside and then renamed. Protocols that the same backbone was measured by before, on the same images and in
    the same view, are kept. Returns the name. Raises OSError."""
    name, earlier = record_name(record), None
    try:
        earlier = json.loads(folder.read_text(name))
    except (FileNotFoundError, ValueError, RecursionError):
        pass
    same = ("backbone_sha256", "view", "data", "versions")
    plain = json.loads(json.dumps(record))
    if isinstance(earlier, dict) and all(earlier.get(key) == plain[key] for key in same):
        plain["protocols"] = {**earlier.get("protocols", {}), **plain["protocols"]}
    folder.write_text(name, json.dumps(plain, indent=2) + "\n")
    return name


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Those in a folder. Raises ValueError for a file that is none."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{PREFIX}*.json"))]


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """Of each data set the lines of a table, the head first: a line a figure, a column a subject."""
    found: dict[str, list[list[str]]] = {}
    for name in dict.fromkeys(record["data"]["name"] for record in records):
        here = [record for record in records if record["data"]["name"] == name]
        figures = dict.fromkeys(
            (protocol, figure) for record in here for protocol, part in record["protocols"].items() for figure in part["figures"]
        )
        found[name] = [["protocol", "figure", *(record["subject"] for record in here)]]
        for protocol, figure in figures:
            cells = [record["protocols"].get(protocol, {}).get("figures", {}).get(figure) for record in here]
            found[name].append([protocol, figure, *(shown(Figure(**cell)) if cell else "" for cell in cells)])
    return found


def shown(figure: Figure) -> str:
    """'0.591 [0.570, 0.612]'"""
    interval = "" if figure.low is None or figure.high is None else f" [{_number(figure.low)}, {_number(figure.high)}]"
    return _number(figure.value) + interval


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.")[:80] or "unnamed"
