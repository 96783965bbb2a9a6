"""The settings that a run or a checkpoint was made with."""

from collections.abc import Mapping
from typing import Any

from massl_ray.config import Config, recorded, recorded_toml
from massl_ray.config.schema import merge
from massl_ray.errors import UserError
from massl_ray.storage import Folder


def config_of_run(folder: Folder) -> Config | None:
    """What config.toml in a folder says; None where there is none. Raises UserError, OSError."""
    if not folder.kind("config.toml"):
        return None
    return recorded_toml(folder.read_text("config.toml"), str(folder / "config.toml"))


def config_of_checkpoint(manifest: Mapping[str, Any], run: Folder) -> Config:
    """Of a checkpoint: its manifest has every setting. Raises UserError."""
    values: dict[str, Any] = {}
    for key, value in (manifest.get("config") or {}).items():
        section, _, name = key.partition(".")
        values = merge(values, {section: {name: value}})
    config = recorded(values) if values else config_of_run(run)
    if config is None:
        raise UserError(f"The checkpoints of {run} do not say their settings, and there is no config.toml.")
    return config
