"""The whole configuration: frozen models, presets, TOML files and flags. Imports neither torch nor ray.

`load(argv)` layers preset < file < flags and returns a `Config`; `resolve(config, dataset_size)` derives, purely, everything
that depends on the size of the data set. Nothing else in the package computes a setting.
"""

from massl_ray.config.loading import (
    OwnFlags,
    decided_as,
    keys,
    load,
    parse_toml,
    presets,
    read_flags,
    read_toml,
    recorded,
    recorded_toml,
    secret_keys,
    to_toml,
    validate,
)
from massl_ray.config.resolve import Resolved, fill, resolve
from massl_ray.config.schema import IMAGENET_GRAY, Config, DataSection, HeadSection, ModelSection, MonitorSection, ViewsSection

__all__ = [
    "IMAGENET_GRAY",
    "Config",
    "DataSection",
    "HeadSection",
    "ModelSection",
    "OwnFlags",
    "MonitorSection",
    "Resolved",
    "ViewsSection",
    "decided_as",
    "fill",
    "keys",
    "load",
    "parse_toml",
    "presets",
    "read_flags",
    "read_toml",
    "recorded",
    "recorded_toml",
    "resolve",
    "secret_keys",
    "to_toml",
    "validate",
]
