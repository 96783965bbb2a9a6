"""Presets, TOML files and flags become a `Config`; what does not is refused in a sentence."""

import argparse
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from massl_ray.config.schema import Config, Section, merge
from massl_ray.errors import UserError
from massl_ray.shown import redacted


def load(argv: Sequence[str], prog: str = "massl-ray train") -> Config:
    """Layer preset < TOML file < flags. Without --preset and --config the preset is `demo`.

    Raises UserError, naming the key and the nearest valid one, for anything unknown or out of range.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--preset")
    own.add_argument("--config")
    own.error = _refuse  # type: ignore[method-assign]
    layers, rest = own.parse_known_args(list(argv))

    if "-h" in rest or "--help" in rest:
        _help(prog).print_help()
        raise SystemExit(0)
    flags = read_flags(rest)
    values: dict[str, Any] = {}
    if layers.preset or not layers.config:
        values = read_preset(layers.preset or "demo")
    if layers.config:
        values = merge(values, read_toml(Path(layers.config)))
    return validate(merge(values, flags))


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Nested values of `--section.key value`. Raises UserError for an unknown key."""
    _check_flags(argv)
    try:
        return dict(CliSettingsSource(Config, cli_parse_args=list(argv), cli_exit_on_error=False, cli_parse_none_str="none")())
    except SettingsError as error:
        raise UserError(f"The flags could not be read: {str(error).removeprefix('error parsing CLI: ')}. See --help.") from None


def validate(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested values, with errors rewritten as sentences."""
    try:
        return Config(**values)
    except ValidationError as error:
        raise UserError(" ".join(filter(None, map(_sentence, error.errors())))) from None


def presets() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml") for entry in resources.files("massl_ray.presets").iterdir() if entry.name.endswith(".toml")
    )


def read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise UserError(f"There is no preset '{name}'{nearest(name, presets())}. Presets: {', '.join(presets())}.")
    return tomllib.loads((resources.files("massl_ray.presets") / f"{name}.toml").read_text())


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(), str(path))
    except OSError as error:
        raise UserError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """`name` says in messages where the text is from."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{name} is not valid TOML: {error}.") from None


def recorded(values: Mapping[str, Any]) -> Config:
    """The configuration that a run's config.toml or a checkpoint holds, as nested values. What settings that came later were then
    is filled in: runs of before `loss.recipe` compared with the memory alone. Raises UserError."""
    before = {"loss": {"recipe": "paper", "batch_slots": False}} if "recipe" not in values.get("loss", {}) else {}
    return validate(merge(before, values))


def recorded_toml(text: str, name: str) -> Config:
    """The same of a config.toml's text; `name` says in messages where it is from. Raises UserError."""
    return recorded(parse_toml(text, name))


def to_toml(config: Config) -> str:
    """Write a configuration as TOML that `load(['--config', FILE])` reads back to an equal one, but for the secrets of addresses.
    None is left out: it is the default."""
    lines: list[str] = []
    for section, values in config.model_dump().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def decided_as(earlier: Config, config: Config) -> Config:
    """`config` with every 'auto' as the earlier start of the same run decided it."""
    before = earlier.model_dump()
    decided = {
        section: {key: before[section][key] for key, value in values.items() if value == "auto" and section != "elastic"}
        for section, values in config.model_dump().items()
    }
    return validate(merge(config.model_dump(), decided))


def keys(config: Config) -> dict[str, Any]:
    """Every setting as {'section.key': value}, without the secrets of addresses: a run goes on with new ones."""
    return {key: redacted(value) if isinstance(value, str) else value for key, value in _settings(config)}


def secret_keys(config: Config) -> list[str]:
    """Settings that are addresses with secrets in them."""
    return [key for key, value in _settings(config) if isinstance(value, str) and redacted(value) != value]


def _settings(config: Config) -> Iterator[tuple[str, Any]]:
    return ((f"{section}.{key}", value) for section, values in config.model_dump().items() for key, value in values.items())


class OwnFlags(argparse.ArgumentParser):
    """Flags that a command has beside the settings of training. A mistake in them is a UserError, as one in the settings is."""

    def __init__(self, prog: str):
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own, and settings for `load`: flags with a section, and preset and config, with their values. Raises
        UserError."""
        own, settings, rest = [], [], list(arguments)
        while rest:
            argument = rest.pop(0)
            name = argument.split("=", 1)[0]
            if name.startswith("--") and ("." in name or name in ("--preset", "--config")):
                settings.append(argument)
                settings += [rest.pop(0)] if "=" not in argument and rest else []
            else:
                own.append(argument)
        given, unknown = self.parse_known_args(own)
        if unknown:
            name = unknown[0].lstrip("-").split("=", 1)[0]
            known = [flag.removeprefix("--") for action in self._actions for flag in action.option_strings]
            raise UserError(f"There is no setting '{name}'{nearest(name, known)}. See --help.")
        return given, settings

    def error(self, message: str) -> NoReturn:
        raise UserError(f"The flags could not be read: {message}. See --help.")


def _help(prog: str) -> argparse.ArgumentParser:
    """A parser that only prints: one group a section, with units and defaults from the fields' docstrings."""
    usage = f"{prog} [--preset NAME] [--config FILE.toml] [--section.key VALUE ...]"
    parser = argparse.ArgumentParser(
        usage=usage,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=120),
    )
    parser.description = "Pretrain a vision backbone on unlabelled images with MaSSL."
    parser.epilog = (
        f"Presets: {', '.join(presets())}. A flag overrides the file, the file overrides the preset. "
        "Without either, the preset is demo."
    )
    defaults = Config()
    for section, model in Config.model_fields.items():
        annotation: type[Section] = model.annotation  # type: ignore[assignment]
        group = parser.add_argument_group(section, annotation.__doc__)
        for key, field in annotation.model_fields.items():
            value = getattr(getattr(defaults, section), key)
            default = ",".join(map(str, value)) if isinstance(value, tuple) else value
            group.add_argument(f"--{section}.{key}", metavar="", help=f"{field.description} [{default}]".replace("%", "%%"))
    return parser


def _flags() -> Iterator[tuple[str, Any]]:
    for section, model in Config.model_fields.items():
        for key, field in model.annotation.model_fields.items():  # type: ignore[union-attr]
            yield f"{section}.{key}", field


def _check_flags(arguments: Sequence[str]) -> None:
    known = dict(_flags())
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=", 1)[0]
            if name not in known:
                raise UserError(f"There is no setting '{name}'{nearest(name, [*known, 'preset', 'config'])}. See --help.")


def _refuse(message: str):
    raise UserError(f"The flags could not be read: {message}. See --help.")


def nearest(name: str, candidates: Sequence[str]) -> str:
    """'; the nearest is ...', or nothing. 'train.batch_size' has two near keys: both are named."""
    matches = difflib.get_close_matches(name, candidates, n=2, cutoff=0.5)
    if len(matches) == 2 and name.split(".")[-1] not in matches[1]:
        matches = matches[:1]
    return f"; the nearest is {' or '.join(repr(match) for match in matches)}" if matches else ""


def _sentence(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path[:2])
    if item["type"] == "extra_forbidden":
        return f"There is no setting '{key}'{nearest(key, [name for name, _ in _flags()])}."
    if item["type"] == "value_error":
        return f"{item['ctx']['error']}."
    if path[2:] and path[2].startswith(("constrained", "literal", "float", "int")) and path[2].startswith("literal"):
        return ""  # the other arm of 'number or auto' says it better
    return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_toml_character(c) for c in redacted(value)) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\u{ord(character):04x}"
