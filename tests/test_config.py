"""The configuration: layers, errors as sentences, resolution by data set size, and no setting that nothing reads."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import massl_ray
from massl_ray.config import (
    Config,
    decided_as,
    fill,
    keys,
    load,
    parse_toml,
    presets,
    recorded,
    recorded_toml,
    resolve,
    to_toml,
    validate,
)
from massl_ray.errors import UserError

PACKAGE = Path(massl_ray.__file__).parent


def test_flags_over_file_over_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 0.125\n[train]\nsteps = 7\n")
    loaded = load(["--preset", "demo", "--config", str(file), "--train.steps", "9"])
    assert loaded.model.backbone == load([]).model.backbone  # from the preset, which is the demo where none is named
    assert (loaded.optim.lr, loaded.train.steps) == (0.125, 9)
    assert load(["--config", str(file)]).model.backbone == Config().model.backbone  # a file alone stands on the defaults


def test_flags_take_every_kind_of_value():
    loaded = load("--views.local_area 0.1,0.5 --head.batch_norm false --memory.size auto --data.test_source none".split())
    assert loaded.views.local_area == (0.1, 0.5)
    assert loaded.head.batch_norm is False
    assert (loaded.memory.size, loaded.data.test_source) == ("auto", None)
    assert load(["--run.seed=5"]).run.seed == 5


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_introduced(name):
    text = (PACKAGE / "presets" / f"{name}.toml").read_text()
    opening = "".join(line for line in text.splitlines(keepends=True)[:8] if line.startswith("#"))
    assert f"--preset {name}" in opening and "Hardware:" in opening and "Time:" in opening
    assert load(["--preset", name]).run.dir == f"runs/{name}"


def test_recipes_are_the_papers():
    """Every figure of the two recipes, resolved on ImageNet's 1.28 million images."""
    images = 1_281_167
    for name, epochs, temp_epochs, lr, lr_final, warmup, momentum in (
        ("vit_small", 800, 30, 5e-4, 1e-6, 0, 0.992),
        ("vit_base", 400, 50, 7.5e-4, 2e-6, 10, 0.996),
    ):
        recipe = load(["--preset", name])
        resolved = resolve(recipe, images)
        views, loss, optim = recipe.views, recipe.loss, recipe.optim
        assert (views.global_size, views.local_size, views.num_local) == (224, 96, 10)
        assert (views.global_area, views.local_area) == ((0.32, 1.0), (0.05, 0.32))
        assert (views.flip, views.jitter, views.brightness, views.contrast, views.saturation, views.hue) == (
            0.5,
            0.8,
            0.4,
            0.4,
            0.2,
            0.1,
        )
        assert (views.gray, views.blur, views.blur_sigma, views.solarize) == (0.2, (1.0, 0.1, 0.5), (0.1, 2.0), 0.2)
        assert (resolved.memory_size, resolved.block_size, recipe.head.dim) == (131072, 16384, 256)
        assert (recipe.head.num_layers, recipe.head.hidden_dim, recipe.head.batch_norm) == (3, 2048, False)
        assert (loss.student_temp, resolved.teacher_temp_start, resolved.teacher_temp) == (0.1, 0.04, 0.07)
        assert resolved.teacher_temp_images == temp_epochs * images
        assert recipe.train.epochs == epochs
        assert (optim.lr, optim.lr_final, resolved.warmup_images) == (lr, lr_final, warmup * images)
        assert (optim.weight_decay, optim.weight_decay_final, optim.clip_norm) == (0.04, 0.4, 3.0)
        assert (optim.teacher_momentum, optim.teacher_momentum_final, recipe.model.drop_path) == (momentum, 1.0, 0.1)
        assert (resolved.recipe, resolved.batch_slots, resolved.koleo_weight) == ("paper", False, 0)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--memory.slots 5", ["no setting 'memory.slots'", "the nearest is 'memory.size'"]),
        ("--train.batch_size 5", ["the nearest is 'train.micro_batch_size' or 'train.global_batch_size'"]),
        ("--optim.lr fast", ["optim.lr is 'fast'", "valid number"]),
        ("--optim.lr -1", ["optim.lr is '-1'", "greater than 0"]),
        ("--optim.lr", ["--optim.lr", "expected one argument"]),
        ("--train.precision fp8", ["train.precision is 'fp8'", "'bf16' or 'fp32'"]),
        ("--memory.size 1", ["memory.size is '1'", "greater than or equal to 2"]),
        (
            "--memory.size 16 --memory.num_blocks 16",
            ["memory.size 16 is too small for memory.num_blocks 16", "raise memory.size to 32"],
        ),
        ("--train.global_batch_size 96 --train.micro_batch_size 36", ["must divide", "96", "32"]),
        ("--views.local_area 0.5,0.1", ["views.local_area must rise"]),
        ("--elastic.timeout_seconds 9", ["elastic.timeout_seconds is '9'", "greater than or equal to 10"]),
        ("--elastic.max_lost_seconds 0", ["elastic.max_lost_seconds is '0'", "greater than 0"]),
        ("--elastic.min_workers 4 --elastic.max_workers 2", ["elastic.max_workers 2 is below elastic.min_workers 4"]),
        ("--preset dmeo", ["no preset 'dmeo'", "the nearest is 'demo'"]),
        ("--config nowhere.toml", ["nowhere.toml cannot be read"]),
        ("stray", ["unrecognized arguments: stray"]),
    ],
)
def test_mistakes_are_sentences(flags, parts):
    with pytest.raises(UserError) as error:
        load(flags.split())
    for part in parts:
        assert part in str(error.value)
    assert str(error.value).strip().endswith(".") and "\n" not in str(error.value)


def test_unknown_key_in_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[memory]\nsise = 3\n")
    with pytest.raises(UserError, match="no setting 'memory.sise'; the nearest is 'memory.size'"):
        load(["--config", str(file)])
    file.write_text("[memory\n")
    with pytest.raises(UserError, match="is not valid TOML"):
        load(["--config", str(file)])


def test_toml_round_trip(tmp_path):
    original = load(
        ["--data.source", 'a "folder"\\with\nodd names/ü', "--views.blur", "0.5,0.25,0.125", "--data.test_source", "none"]
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(original))
    assert load(["--config", str(file)]) == original


def test_resolve_follows_the_size_of_the_data_set():
    base = Config()
    small, middle, large = (resolve(base, size) for size in (2_000, 140_000, 1_281_167))
    assert [r.memory_size for r in (small, middle, large)] == [8192, 32768, 131072]
    assert [r.teacher_temp for r in (small, middle, large)] == [0.04, pytest.approx(0.055, abs=1e-3), 0.07]
    assert [r.num_blocks for r in (small, middle, large)] == [8, 8, 8]
    assert (small.warmup_images, large.warmup_images) == (10 * 2_000, 0)
    assert resolve(load(["--train.steps", "100"]), 5_000).steps == 100
    assert resolve(load(["--config", "/dev/null", "--train.epochs", "2", "--train.global_batch_size", "10"]), 55).steps == 11


def test_the_batch_joins_the_memory_on_small_data_sets_only():
    """The paper's recipe is one flag away, and each of the two settings stands alone."""
    for images, flags, expected in (
        (2_000, "", ("joined", True, 1.0)),
        (999_999, "", ("joined", True, 1.0)),
        (1_000_000, "", ("paper", False, 0.0)),
        (1_000_000, "--loss.recipe joined", ("joined", True, 1.0)),
        (2_000, "--loss.recipe paper", ("paper", False, 0.0)),
        (2_000, "--loss.koleo_weight 0.1", ("joined", True, 0.1)),
        (2_000, "--loss.batch_slots false", ("joined", False, 1.0)),
    ):
        resolved = resolve(load(["--preset", "vit_small", *flags.split()]), images)
        assert (resolved.recipe, resolved.batch_slots, resolved.koleo_weight) == expected, flags
    resolved = resolve(load("--memory.size 100 --memory.num_blocks 4 --train.global_batch_size 64".split()), 2_000)
    assert (resolved.block_size, resolved.read_size) == (25, 25 + 128)


def test_runs_of_before_compared_with_the_memory_alone():
    """config.toml and manifests of before `loss.recipe` do not say it; what they meant is not today's default."""
    written = keys(recorded({"loss": {"koleo_weight": 0.0}, "memory": {"size": 64}}))
    assert [written[f"loss.{key}"] for key in ("recipe", "batch_slots", "koleo_weight")] == ["paper", False, 0.0]
    assert written["memory.size"] == 64
    later = fill(load(["--preset", "demo"]), resolve(load(["--preset", "demo"]), 3_000))
    assert recorded_toml(to_toml(later), "config.toml") == later


def test_filled_configuration_resolves_to_itself():
    """config.toml of a run holds no open end: it gives the same run again."""
    original = load(["--config", "/dev/null", "--train.epochs", "3"])
    filled = fill(original, resolve(original, 30_000))
    assert "auto" not in (filled.memory.size, filled.memory.num_blocks, filled.loss.teacher_temp, filled.train.micro_batch_size)
    assert resolve(filled, 30_000) == resolve(original, 30_000)


def test_what_an_earlier_start_decided_stands_in_for_auto():
    """Values that are asked for stay, and so does what another cluster may decide anew."""
    earlier = fill(load(["--config", "/dev/null"]), resolve(Config(), 140_000))
    assert (earlier.memory.size, earlier.train.micro_batch_size) == (32768, 64)
    asked = load("--config /dev/null --memory.num_blocks 4 --optim.warmup_epochs 3 --optim.lr 1".split())
    decided = decided_as(earlier, asked)
    changed = {key: value for key, value in keys(decided).items() if value != keys(asked)[key]}
    assert changed == {
        "memory.size": 32768,
        "loss.recipe": "joined",
        "loss.batch_slots": True,
        "loss.koleo_weight": 1.0,
        "loss.teacher_temp": pytest.approx(0.055, abs=1e-3),
        "loss.teacher_temp_start": 0.04,
        "loss.teacher_temp_epochs": pytest.approx(earlier.loss.teacher_temp_epochs),
        "train.micro_batch_size": 64,
    }
    elsewhere = validate({"elastic": {"max_workers": 3}, "train": {"device": "cpu"}})
    decided = decided_as(elsewhere, Config())
    assert (decided.elastic.max_workers, decided.train.device) == ("auto", "cpu")


def test_what_was_decided_must_fit_what_is_asked_for():
    with pytest.raises(UserError, match="memory.size 64 is too small for memory.num_blocks 40"):
        decided_as(validate({"memory": {"size": 64}}), validate({"memory": {"num_blocks": 40}}))


def test_text_that_is_no_toml_is_named():
    assert parse_toml("[a]\nb = 1\n", "x.toml") == {"a": {"b": 1}}
    with pytest.raises(UserError, match=r"s3://bucket/run/config\.toml is not valid TOML: .+\."):
        parse_toml("[a\n", "s3://bucket/run/config.toml")


def test_configuration_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        load([]).run.seed = 3  # type: ignore[misc]


def test_importing_it_imports_neither_torch_nor_ray():
    code = "import sys, massl_ray.config; print(sorted({'torch', 'ray', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, value in keys(Config()).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        assert re.search(rf"--{re.escape(key)} [^\[]*\[{re.escape(str(shown))}\]", text), key


# ---- every field changes something ------------------------------------------------------------------------------------

READ_ELSEWHERE = {
    # key: the expression that reads it, in a file that has to contain it; the behaviour is tested in that file's own test
    "run.dir": ("training/run.py", "config.run.dir"),
    "data.source": ("training/run.py", "config.data.source"),
    "data.test_source": ("training/run.py", "config.data.test_source"),
    "data.cache_gb": ("training/run.py", "config.data.cache_gb"),
    "data.window": ("training/run.py", "config.data.window"),
    "data.max_skipped": ("training/loop.py", "config.data.max_skipped"),
    "views.device": ("data/making.py", "self.config.views.device"),
    "data.max_pixels": ("data/decode.py", "data.max_pixels, data.channels, data.white"),
    "data.channels": ("data/decode.py", "data.max_pixels, data.channels, data.white"),
    "data.white": ("data/decode.py", "data.max_pixels, data.channels, data.white"),
    "elastic.view_tasks": ("on_ray/layout.py", "config.elastic.view_tasks"),
    "train.device": ("on_ray/layout.py", "config.train.device"),
    "train.threads": ("on_ray/life.py", "config.train.threads"),
    "train.precision": ("training/state.py", "config.train.precision"),
    "train.checkpoint_every": ("training/loop.py", "config.train.checkpoint_every"),
    "train.log_every": ("training/loop.py", "config.train.log_every"),
    "train.compile": ("training/state.py", "config.train.compile"),
    "checkpoint.keep": ("on_ray/life.py", "config.checkpoint.keep"),
    "eval.knn_every": ("training/loop.py", "config.eval.knn_every"),
    "eval.knn_k": ("reporting/reporter.py", "config.knn_k"),
    "eval.knn_temp": ("reporting/reporter.py", "config.knn_temp"),
    "eval.crop": ("evaluation/features.py", "config.eval.crop"),
    "eval.max_images": ("training/run.py", "config.eval.max_images"),
    "monitor.min_spread": ("training/monitors.py", "self.config.min_spread"),
    "monitor.min_kl": ("training/monitors.py", "self.config.min_kl"),
    "monitor.patience": ("training/monitors.py", "self.config.patience"),
    "elastic.min_workers": ("on_ray/layout.py", "config.elastic.min_workers"),
    "elastic.max_workers": ("on_ray/layout.py", "config.elastic.max_workers"),
    "elastic.exact": ("on_ray/life.py", "config.elastic.exact"),
    "elastic.in_place": ("on_ray/launch.py", "config.elastic.in_place"),
    "elastic.max_lost_seconds": ("reporting/reporter.py", "config.elastic.max_lost_seconds"),
    "elastic.timeout_seconds": ("on_ray/life.py", "config.elastic.timeout_seconds"),
    "elastic.max_failures": ("on_ray/life.py", "config.elastic.max_failures"),
}

OTHER = {
    "run.seed": 1, "data.mean": (0.1, 0.2, 0.3), "data.std": (0.1, 0.2, 0.3), "views.global_size": 48, "views.local_size": 24,
    "views.num_local": 1, "views.global_area": (0.5, 0.6), "views.local_area": (0.2, 0.3), "views.flip": 0.0, "views.jitter": 0.0,
    "views.brightness": 0.9, "views.contrast": 0.9, "views.saturation": 0.9, "views.hue": 0.5, "views.gray": 1.0,
    "views.blur": (0.0, 0.0, 0.0), "views.blur_sigma": (3.0, 4.0), "views.solarize": 1.0, "model.backbone": "test_vit2",
    "model.drop_path": 0.5, "head.num_layers": 2, "head.hidden_dim": 17, "head.dim": 9, "head.batch_norm": True,
    "memory.size": 48, "memory.num_blocks": 2, "memory.dtype": "bfloat16", "loss.student_temp": 0.2, "loss.teacher_temp": 0.05,
    "loss.teacher_temp_start": 0.03,
    "loss.teacher_temp_epochs": 5.0, "loss.koleo_weight": 0.3, "loss.recipe": "paper", "loss.batch_slots": False,
    "optim.lr": 1.0, "optim.lr_final": 0.5, "optim.warmup_epochs": 5.0,
    "optim.weight_decay": 0.9, "optim.weight_decay_final": 0.9, "optim.clip_norm": 1e-3, "optim.teacher_momentum": 0.5,
    "optim.teacher_momentum_final": 0.6, "train.epochs": 9.0, "train.steps": 20, "train.stop_at": 4, "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
}  # fmt: skip


def fingerprint(config: Config) -> dict:
    """What a configuration makes: resolved values, schedules, views of an image, and the state after a step."""
    import torch

    from massl_ray.method.memory import block_permutation
    from massl_ray.method.network import drop_path_draws
    from massl_ray.method.schedules import schedule_at
    from massl_ray.method.step import Batch, MicroBatch, train_step
    from massl_ray.method.views import make_views
    from massl_ray.training.collectives import Local
    from massl_ray.training.state import build_state, state_sha256, step_settings, to_tensors

    resolved = resolve(config, 8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    made = [make_views(image, config.views, seed=config.run.seed, epoch=0, sample=sample) for sample in range(resolved.batch_size)]
    device = torch.device("cpu")
    state = build_state(config, resolved, device, Local())
    size = resolved.micro_batch_size
    micro_batches = []
    for index in range(resolved.num_micro_batches):
        part = made[index * size : (index + 1) * size]
        global_views, local_views = (torch.from_numpy(np.stack(views)) for views in zip(*part, strict=True))
        draws = drop_path_draws(state.student, config.run.seed, 0, index, size, 2 + config.views.num_local)
        micro_batches.append(MicroBatch(global_views, local_views, draws))
    permutation = block_permutation(config.run.seed, 0, resolved.memory_size, resolved.block_size)
    schedules = [dataclasses.astuple(schedule_at(step, config, resolved)) for step in range(0, 40, 3)]
    settings = step_settings(config, resolved, device)
    metrics = train_step(
        state, Batch(micro_batches, permutation, len(micro_batches)), schedule_at(5, config, resolved), settings, Local()
    )
    return {
        "resolved": resolved,
        "schedules": schedules,
        "views": b"".join(views.tobytes() for pair in made for views in pair),
        "metrics": metrics.tolist(),
        "state": state_sha256(to_tensors(state)),
    }


BASE = (
    "--config /dev/null --model.backbone test_vit --model.drop_path 0.2 --views.global_size 32 --views.local_size 16 "
    "--views.num_local 2 --head.hidden_dim 16 --head.dim 8 --memory.size 32 --memory.num_blocks 4 --train.global_batch_size 4 "
    "--train.micro_batch_size 4 --train.precision fp32 --train.epochs 20"
).split()


def test_every_field_changes_something(tmp_path):
    """A setting that nothing reads is a lie. Each key either changes what is computed, or is read where READ_ELSEWHERE says."""
    assert set(keys(Config())) == set(OTHER) | set(READ_ELSEWHERE) | {"model.init"}
    before = fingerprint(load(BASE))
    assert fingerprint(load(BASE)) == before  # the fingerprint itself is a pure function
    for key, value in OTHER.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert fingerprint(load([*BASE, f"--{key}", text])) != before, f"{key} changes nothing"
    for key, (file, expression) in READ_ELSEWHERE.items():
        assert expression in (PACKAGE / file).read_text(), f"{key} is not read in {file}"


def test_init_reads_a_weights_file(tmp_path):
    import torch

    from massl_ray.method.network import build_encoder

    weights = build_encoder(load([*BASE, "--run.seed", "9"])).backbone.state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    loaded = build_encoder(load([*BASE, "--model.init", str(tmp_path / "weights.pth")])).backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("data", [3, [], "demo"])
def test_a_section_that_is_none(data):
    with pytest.raises(UserError, match="data"):
        validate({"data": data})


def test_means_for_each_channel():
    assert Config().data.mean == (0.485, 0.456, 0.406) and load(["--preset", "vit_small", "--data.channels", "1"]).data.mean == ()
    assert load(["--preset", "vit_small", "--data.channels", "2", "--data.mean", "0.1,0.2", "--data.std", "1,2"]).data.std == (1, 2)
    with pytest.raises(UserError, match=r"data.std has 2 values .*, data.channels is 3: give one for each"):
        load(["--data.std", "1,2"])
