"""The whole configuration: frozen models, presets, TOML files and flags. Imports neither torch nor ray.

`load(argv)` layers preset < file < flags and returns a `Config`; `resolve(config, dataset_size)` derives, purely, everything
that depends on the size of the data set. Nothing else in the package computes a setting.
"""

import argparse
import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from massl_ray.errors import UserError

Auto = Literal["auto"]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run lives."""

    dir: Annotated[str, Field(min_length=1)] = "runs/demo"
    """Run directory: configuration, metrics, checkpoints, report. Run the same command again to continue it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every draw: weights, memory, order, views, drop path, blocks."""


class DataSection(Section):
    """The images."""

    source: Annotated[str, Field(min_length=1)] = "demo"
    """A folder of images (any nesting), or 'demo' for the tiles that come with scikit-image."""
    test_source: str | None = None
    """A folder of test images for k-NN, with the class folders of data.source. None: a tenth of "
    "data.source is held out as queries."""
    max_skipped: Share = 0.05
    """Share of unreadable images, among those tried, above which the run stops."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means (red, green, blue, in 0..1) subtracted from every view."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Channel standard deviations (in 0..1) that every view is divided by."""


class ViewsSection(Section):
    """Multi-crop views and their augmentation, in the paper's order."""

    global_size: Annotated[int, Field(ge=8)] = 224
    """Side of the two global views, in pixels."""
    local_size: Annotated[int, Field(ge=8)] = 96
    """Side of the local views, in pixels."""
    num_local: Annotated[int, Field(ge=0)] = 10
    """Local views an image."""
    global_area: tuple[Share, Share] = (0.32, 1.0)
    """Smallest and largest share of the image's area that a global view covers."""
    local_area: tuple[Share, Share] = (0.05, 0.32)
    """Smallest and largest share of the image's area that a local view covers."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of colour jitter."""
    brightness: Probability = 0.4
    """Colour jitter: brightness factor drawn from 1 +- this."""
    contrast: Probability = 0.4
    """Colour jitter: contrast factor drawn from 1 +- this."""
    saturation: Probability = 0.2
    """Colour jitter: saturation factor drawn from 1 +- this."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Colour jitter: hue shift drawn from +- this, in turns of the colour wheel."""
    gray: Probability = 0.2
    """Probability of turning the view gray."""
    blur: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur on the first global, the second global and the local views."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: Probability = 0.2
    """Probability of solarizing the second global view."""


class ModelSection(Section):
    """The backbone."""

    backbone: str = "vit_small_patch16_224"
    """Any timm model name."""
    init: str = "random"
    """'random', 'pretrained' (timm's weights) or the path of a weights file (.safetensors, or .pth read without executing code)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the student's last block; the teacher has none."""


class HeadSection(Section):
    """The projection head: a multi-layer perceptron onto the unit sphere."""

    num_layers: Annotated[int, Field(ge=1)] = 3
    """Linear layers."""
    hidden_dim: Annotated[int, Field(ge=1)] = 2048
    """Width of the hidden layers."""
    dim: Annotated[int, Field(ge=2)] = 256
    """Width of the embedding, and of the memory's rows."""
    batch_norm: bool = False
    """Batch norm after each hidden layer. It helps convolutional backbones on small data sets."""


class MemorySection(Section):
    """The memory of past embeddings."""

    size: Annotated[int, Field(ge=2)] | Auto = "auto"
    """Slots K. auto: 8,192 up to 20 thousand images, rising to 131,072 from a million on."""
    num_blocks: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Random blocks the memory is read in; a block has size // num_blocks slots. auto: 8."""


class LossSection(Section):
    """The read-out loss."""

    student_temp: Positive = 0.1
    """Temperature of the student's similarities."""
    teacher_temp: Positive | Auto = "auto"
    """Temperature of the teacher's similarities after the rise. auto: 0.04 up to 20 thousand images, "
    "rising to 0.07 at a million."""
    teacher_temp_start: Positive | Auto = "auto"
    """Temperature of the teacher's similarities at the first step. auto: 0.04, or teacher_temp where that is lower."""
    teacher_temp_epochs: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Epochs over which the teacher's temperature rises. auto: 30, at most a tenth of the run."""
    koleo_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KoLeo spread term on the student's global embeddings. The paper's recipes use 0."""


class OptimSection(Section):
    """AdamW and its schedules, all cosine functions of images seen."""

    lr: Positive = 5e-4
    """Peak learning rate for a batch of 256; it is scaled by train.global_batch_size / 256."""
    lr_final: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end."""
    warmup_epochs: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Epochs of linear warm-up from 0. auto: 0 up from a million images (ViT-S recipe), else 10, at most a tenth of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Weight decay at the start; none on biases and one-dimensional parameters."""
    weight_decay_final: Annotated[float, Field(ge=0)] = 0.4
    """Weight decay at the end."""
    clip_norm: Positive = 3.0
    """Largest gradient norm of each parameter tensor."""
    teacher_momentum: Probability = 0.992
    """Momentum of the teacher's moving average at the start."""
    teacher_momentum_final: Probability = 1.0
    """Momentum of the teacher's moving average at the end."""


class TrainSection(Section):
    """The run's length, batch and arithmetic."""

    epochs: Positive = 800.0
    """Passes over the images. train.steps takes precedence."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps, instead of epochs."""
    global_batch_size: Annotated[int, Field(ge=2)] = 1024
    """Images a step, over all workers; it never changes with their number."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Images computed at once; it divides the batch, and workers share out whole micro-batches. auto: "
    "the largest divisor up to 64."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the backbone. Head, read-out and optimizer are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads a worker computes with."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between looks at the metrics: each look waits for the device and writes one line a step."""


class CheckpointSection(Section):
    """Which checkpoints stay."""

    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the latest checkpoints are kept."""


class EvalSection(Section):
    """k-NN on teacher features while training, where images have class folders."""

    knn_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between k-NN evaluations. 0: never while training."""
    knn_k: Annotated[int, Field(ge=1)] = 20
    """Neighbours that vote."""
    knn_temp: Positive = 0.07
    """Temperature of the votes' weights."""
    crop: Share = 0.875
    """Share of the shorter side that the centred evaluation view covers."""
    max_images: Annotated[int, Field(ge=2)] = 5000
    """At most this many images each side, evenly spaced through the listing."""


class MonitorSection(Section):
    """When a run counts as collapsed."""

    min_spread: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Embedding spread (1: evenly over the sphere, 0: one point) under which a step counts towards a collapse."""
    patience: Annotated[int, Field(ge=1)] = 50
    """Such steps in a row that stop the run."""


class ElasticSection(Section):
    """How many workers."""

    min_workers: Annotated[int, Field(ge=1)] = 1
    """Fewest workers to train with."""
    max_workers: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Most workers. auto: one a GPU; without GPUs one a node, leaving at least half of the CPUs to Ray Data."""
    max_failures: Annotated[int, Field(ge=0)] = 8
    """Worker failures (preemptions not counted) after which the run gives up."""


class Config(BaseSettings):
    """A whole run. Keys are written section.key; unknown keys are refused."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    views: ViewsSection = ViewsSection()
    model: ModelSection = ModelSection()
    head: HeadSection = HeadSection()
    memory: MemorySection = MemorySection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    monitor: MonitorSection = MonitorSection()
    elastic: ElasticSection = ElasticSection()

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings):
        return (init_settings,)  # no environment variables: a run is what its file and flags say

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for name in ("global_area", "local_area", "blur_sigma"):
            low, high = getattr(self.views, name)
            if low > high:
                raise ValueError(f"views.{name} must rise: its lower bound {low} is above its upper bound {high}")
        size, blocks = self.memory.size, self.memory.num_blocks
        if size != "auto" and blocks != "auto" and size < 2 * blocks:
            raise ValueError(
                f"memory.size {size} is too small for memory.num_blocks {blocks}: a block needs at least two slots; "
                f"raise memory.size to {2 * blocks} or more, or lower memory.num_blocks"
            )
        micro, batch = self.train.micro_batch_size, self.train.global_batch_size
        if micro != "auto" and batch % micro:
            raise ValueError(
                f"train.micro_batch_size {micro} must divide train.global_batch_size {batch}; the nearest that does "
                f"is {_nearest_divisor(batch, micro)}"
            )
        if self.elastic.max_workers != "auto" and self.elastic.max_workers < self.elastic.min_workers:
            raise ValueError(
                f"elastic.max_workers {self.elastic.max_workers} is below elastic.min_workers "
                f"{self.elastic.min_workers}; raise the one or lower the other"
            )
        return self


@dataclass(frozen=True)
class Resolved:
    """What follows from a configuration and the number of images. Lengths are in images seen, so no value depends on workers."""

    dataset_size: int
    memory_size: int
    num_blocks: int
    block_size: int
    teacher_temp: float
    teacher_temp_start: float
    teacher_temp_images: float
    warmup_images: float
    peak_lr: float
    batch_size: int
    micro_batch_size: int
    steps: int

    @property
    def total_images(self) -> int:
        return self.steps * self.batch_size

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size


SMALL, LARGE = 20_000, 1_000_000  # images: where the small-data defaults end and the paper's recipes begin


def resolve(config: Config, dataset_size: int) -> Resolved:
    """Derive everything that depends on the size of the data set (images). Pure.

    Source: the recipes hold at 1.28 M images; below, memory and teacher temperature follow the data set's size, linearly in
    its logarithm (docs/log.md has the measurements on small sets).
    """
    if dataset_size < 2:
        raise UserError(f"data.source has {dataset_size} image(s); training needs at least 2.")
    batch = config.train.global_batch_size
    steps = config.train.steps or max(1, round(config.train.epochs * dataset_size / batch))
    epochs = steps * batch / dataset_size
    rise = min(1.0, max(0.0, math.log(dataset_size / SMALL) / math.log(LARGE / SMALL)))

    memory_size = _or_auto(config.memory.size, 2 ** round(13 + 4 * rise))
    num_blocks = _or_auto(config.memory.num_blocks, min(8, memory_size // 2))
    if memory_size < 2 * num_blocks:
        raise UserError(
            f"memory.size {memory_size} is too small for {num_blocks} blocks: a block needs at least two slots; "
            f"raise memory.size to {2 * num_blocks} or more, or lower memory.num_blocks."
        )
    teacher_temp = _or_auto(config.loss.teacher_temp, round(0.04 + 0.03 * rise, 4))
    warmup_default = 0.0 if dataset_size >= LARGE else min(10.0, epochs / 10)
    return Resolved(
        dataset_size=dataset_size,
        memory_size=memory_size,
        num_blocks=num_blocks,
        block_size=memory_size // num_blocks,
        teacher_temp=teacher_temp,
        teacher_temp_start=_or_auto(config.loss.teacher_temp_start, min(0.04, teacher_temp)),
        teacher_temp_images=_or_auto(config.loss.teacher_temp_epochs, min(30.0, epochs / 10)) * dataset_size,
        warmup_images=_or_auto(config.optim.warmup_epochs, warmup_default) * dataset_size,
        peak_lr=config.optim.lr * batch / 256,
        batch_size=batch,
        micro_batch_size=_or_auto(config.train.micro_batch_size, _largest_divisor(batch, 64)),
        steps=steps,
    )


def fill(config: Config, resolved: Resolved) -> Config:
    """The configuration with every 'auto' that the data set decides written out: what config.toml in a run directory holds."""
    epochs = resolved.dataset_size
    return Config.model_validate(
        _merge(
            config.model_dump(),
            {
                "memory": {"size": resolved.memory_size, "num_blocks": resolved.num_blocks},
                "loss": {
                    "teacher_temp": resolved.teacher_temp,
                    "teacher_temp_start": resolved.teacher_temp_start,
                    "teacher_temp_epochs": resolved.teacher_temp_images / epochs,
                },
                "optim": {"warmup_epochs": resolved.warmup_images / epochs},
                "train": {"micro_batch_size": resolved.micro_batch_size, "steps": resolved.steps},
            },
        )
    )


# ---- loading ---------------------------------------------------------------------------------------------------------


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
    _check_flags(rest)
    values: dict[str, Any] = {}
    if layers.preset or not layers.config:
        values = read_preset(layers.preset or "demo")
    if layers.config:
        values = _merge(values, read_toml(Path(layers.config)))
    try:
        flags = CliSettingsSource(Config, cli_parse_args=rest, cli_exit_on_error=False, cli_parse_none_str="none")()
    except SettingsError as error:
        raise UserError(f"The flags could not be read: {str(error).removeprefix('error parsing CLI: ')}. See --help.") from None
    return validate(_merge(values, flags))


def validate(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested values, with errors rewritten as sentences."""
    try:
        return Config(**values)
    except ValidationError as error:
        raise UserError(" ".join(_sentence(item) for item in error.errors())) from None


def presets() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml") for entry in resources.files("massl_ray.presets").iterdir() if entry.name.endswith(".toml")
    )


def read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise UserError(f"There is no preset '{name}'{_close(name, presets())}. Presets: {', '.join(presets())}.")
    return tomllib.loads((resources.files("massl_ray.presets") / f"{name}.toml").read_text())


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def to_toml(config: Config) -> str:
    """Write a configuration as TOML that `load(['--config', FILE])` reads back to an equal one. None is "
    "left out: it is the default."""
    lines: list[str] = []
    for section, values in config.model_dump().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def keys(config: Config) -> dict[str, Any]:
    """Every setting as {'section.key': value}."""
    return {f"{section}.{key}": value for section, values in config.model_dump().items() for key, value in values.items()}


# ---- details ---------------------------------------------------------------------------------------------------------


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
    for section, model in Config.model_fields.items():
        annotation: type[Section] = model.annotation  # type: ignore[assignment]
        group = parser.add_argument_group(section, annotation.__doc__)
        for key, field in annotation.model_fields.items():
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
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
                raise UserError(f"There is no setting '{name}'{_close(name, [*known, 'preset', 'config'])}. See --help.")


def _refuse(message: str):
    raise UserError(f"The flags could not be read: {message}. See --help.")


def _close(name: str, candidates: Sequence[str]) -> str:
    """'; the nearest is ...', or nothing. 'train.batch_size' has two near keys: both are named."""
    matches = difflib.get_close_matches(name, candidates, n=2, cutoff=0.5)
    if len(matches) == 2 and name.split(".")[-1] not in matches[1]:
        matches = matches[:1]
    return f"; the nearest is {' or '.join(repr(match) for match in matches)}" if matches else ""


def _sentence(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path[:2])
    if item["type"] == "extra_forbidden":
        return f"There is no setting '{key}'{_close(key, [name for name, _ in _flags()])}."
    if item["type"] == "value_error":
        return f"{item['ctx']['error']}."
    if path[2:] and path[2].startswith(("constrained", "literal", "float", "int")) and path[2].startswith("literal"):
        return ""  # the other arm of 'number or auto' says it better
    return f"{key} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) else value
    return merged


def _or_auto(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((size for size in range(1, number + 1) if number % size == 0), key=lambda size: abs(size - wanted))


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_toml_character(c) for c in value) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\u{ord(character):04x}"
