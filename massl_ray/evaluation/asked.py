"""The settings of an evaluation: those of the first run, under the ones that were given."""

from collections.abc import Sequence
from typing import Any

from massl_ray.config import Config, load, read_flags, validate
from massl_ray.config.schema import merge
from massl_ray.evaluation.configs import config_of_run
from massl_ray.evaluation.subjects import UNTRAINED
from massl_ray.storage import Folder


def read_config(whats: Sequence[str], settings: list[str]) -> tuple[Config, dict[str, Any]]:
    """Settings over those of the first run among what is evaluated, and the ones that were given. Raises UserError."""
    flags = [part for part in settings if part.startswith("--")]
    named = {flag[2:].split("=", 1)[0] for flag in flags}
    if named & {"preset", "config"}:
        config = load(settings, "massl-ray evaluate")
        return config, {key: value for key, value in config.model_dump().items() if any(name.startswith(key) for name in named)}
    asked = read_flags(settings)
    base = run_settings(whats)
    if base is None:
        return load(settings, "massl-ray evaluate"), asked
    if "source" in asked.get("data", {}):
        base["data"] |= {"test_source": None}
    return validate(merge(base, asked)), asked


def run_settings(whats: Sequence[str]) -> dict[str, Any] | None:
    """Those of the first of these that is a run, or in one."""
    for what in whats:
        folder = Folder(what.removeprefix(UNTRAINED))
        try:
            if folder.kind() == "folder":
                config = config_of_run(folder) or config_of_run(folder.parent.parent)
                if config:
                    return config.model_dump()
        except OSError:  # it will be said when it is opened
            continue
    return None
