"""A run before it starts: what it fills in, what it refuses, and how it takes up a directory again."""

import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from massl_ray.config import Config, keys, load, read_toml, validate
from massl_ray.data import sources
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from massl_ray.training import run as module
from massl_ray.training.run import FREE_TO_CHANGE, claim_directory, differing_keys, prepare_run, write_atomically, write_json
from tests.helpers import names
from tests.sources import encoded_images, write_parquet
from tests.storages import in_memory


def write_images(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(number)
    for index in range(number):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_images(tmp_path / "plain", 10)


def write_classes(folder: Path, **numbers: int) -> Path:
    for name, number in numbers.items():
        write_images(folder / name, number)
    return folder


def config(source: Path, **sections) -> Config:
    values = {
        "run": {"dir": str(source.parent / "run")},
        "data": {"source": str(source)},
        "views": {"global_size": 32, "local_size": 16, "num_local": 1},
        "model": {"backbone": "test_resnet", "drop_path": 0.0},
        "train": {"epochs": 3.0, "global_batch_size": 4},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return validate(values)


def claimed(source: Path, **sections) -> module.Run:
    return claim_directory(prepare_run(config(source, **sections)))


# ---- what it fills in ------------------------------------------------------------------------------------------------


def test_every_auto_is_filled_in(plain):
    run = claimed(plain)
    written = keys(validate(read_toml(run.dir / "config.toml")))
    assert written == keys(run.config)
    expected = {
        "memory.size": 8192,
        "memory.num_blocks": 8,
        "loss.recipe": "joined",
        "loss.batch_slots": True,
        "loss.koleo_weight": 1.0,
        "loss.teacher_temp": 0.04,
        "loss.teacher_temp_start": 0.04,
        "train.micro_batch_size": 4,
        "train.steps": 8,  # 3 epochs of 10 images, 4 a step: 7.5
    }
    assert {key: written[key] for key in expected} == expected
    assert written["optim.warmup_epochs"] == pytest.approx(0.32)  # a tenth of 8 * 4 / 10 epochs
    assert written["loss.teacher_temp_epochs"] == pytest.approx(0.32)
    still = [key for key, value in written.items() if value == "auto"]
    assert still == ["train.device", "elastic.max_workers", "elastic.view_tasks"]
    assert (run.resolved.dataset_size, run.resolved.steps, run.resolved.batch_size) == (10, 8, 4)
    assert names(run.images) == [f"{index:03d}.png" for index in range(10)]


def test_directory_is_laid_out(plain):
    run = claimed(plain)
    assert run.dir == plain.parent / "run" and run.checkpoints == Folder(run.dir / "checkpoints")
    assert sorted(entry.name for entry in run.dir.iterdir()) == ["checkpoints", "config.toml", "eval", "images.json"]
    names = "".join(f"{index:03d}.png\0" for index in range(10))
    assert json.loads((run.dir / "images.json").read_text()) == {
        "count": 10,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def test_relative_directory_becomes_absolute(plain, monkeypatch):
    monkeypatch.chdir(plain.parent)
    assert prepare_run(config(plain, run={"dir": "here"})).dir == plain.parent / "here"


def test_nothing_is_written_before_the_directory_is_claimed(plain):
    assert not prepare_run(config(plain)).dir.exists()


def test_windows_are_shards(tmp_path, plain):
    source = write_parquet(tmp_path / "images.parquet", encoded_images(10), row_group=4)
    windows = prepare_run(config(source, data={"window": 2})).images.windows
    assert windows and windows.width == 2 and windows.starts.tolist() == [0, 4, 8, 10]
    assert prepare_run(config(source)).images.windows is None
    with pytest.raises(UserError, match="data.window is 2 shards, but every image in .*plain is a file: leave it out"):
        prepare_run(config(plain, data={"window": 2}))


# ---- the same directory again ----------------------------------------------------------------------------------------


def test_same_command_and_the_written_file_both_go_on(plain):
    run = claimed(plain)
    assert prepare_run(config(plain)).config == run.config
    again = prepare_run(load(["--config", str(run.dir / "config.toml")]))
    assert again.config == run.config and again.resolved == run.resolved


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"max_skipped": 0.5}),
        ("train", {"log_every": 3, "checkpoint_every": 7, "steps": 100}),
        ("checkpoint", {"keep": 9}),
        ("eval", {"knn_every": 5, "knn_k": 3, "knn_temp": 0.5, "crop": 0.5, "max_images": 7}),
        ("monitor", {"min_spread": 0.5, "patience": 3}),
        ("elastic", {"min_workers": 1, "max_workers": 4, "max_failures": 2, "max_lost_seconds": 5.0, "timeout_seconds": 60.0}),
    ],
)
def test_harmless_settings_may_change(plain, section, change):
    claimed(plain)
    run = claimed(plain, **{section: change})
    written = keys(validate(read_toml(run.dir / "config.toml")))
    assert all(written[f"{section}.{key}"] == value for key, value in change.items())


def test_moved_directory_goes_on(plain):
    claimed(plain).dir.rename(plain.parent / "moved")
    assert prepare_run(config(plain, run={"dir": str(plain.parent / "moved")})).config.run.dir.endswith("moved")


def test_differing_configuration_is_refused_with_both_ways_out(plain):
    run = claimed(plain)
    before = (run.dir / "config.toml").read_text()
    with pytest.raises(UserError) as refusal:
        prepare_run(config(plain, run={"seed": 5}, optim={"lr": 0.25}))
    assert str(refusal.value) == (
        f"run.dir: {run.dir} belongs to another configuration: run.seed is 0 there and 5 now, optim.lr is 0.0005 there and "
        f"0.25 now. Choose another --run.dir, or continue that run with --config {run.dir / 'config.toml'}."
    )
    assert (run.dir / "config.toml").read_text() == before


def test_many_differences_are_counted(plain):
    claimed(plain)
    names = ("flip", "jitter", "gray", "solarize", "hue", "contrast", "saturation")
    with pytest.raises(UserError, match="views.jitter is .* and 2 more. Choose"):
        prepare_run(config(plain, views=dict.fromkeys(names, 0.3)))


def test_a_longer_run_goes_on_with_what_was_decided_at_the_start(plain):
    """A tenth of 80 epochs would be another warm-up; schedules of the steps that were done must not change."""
    first = claimed(plain)
    longer = claimed(plain, train={"epochs": 80.0})
    assert (first.resolved.steps, longer.resolved.steps) == (8, 200)
    decided = ("optim.warmup_epochs", "loss.teacher_temp_epochs", "memory.size", "train.micro_batch_size")
    assert [keys(longer.config)[key] for key in decided] == [keys(first.config)[key] for key in decided]
    assert keys(longer.config)["optim.warmup_epochs"] == pytest.approx(0.32)
    other = {"run": {"dir": str(plain.parent / "fresh")}, "train": {"epochs": 80.0}}
    assert keys(claimed(plain, **other).config)["optim.warmup_epochs"] == pytest.approx(8.0)


def test_what_was_decided_does_not_win_over_what_is_asked_for(plain):
    claimed(plain)
    with pytest.raises(UserError, match="memory.size is 8192 there and 64 now"):
        prepare_run(config(plain, memory={"size": 64}))
    assert claimed(plain, memory={"size": 8192}).config.memory.size == 8192


def test_as_many_workers_as_there_are_this_time(plain):
    claimed(plain, elastic={"max_workers": 1})
    assert claimed(plain).config.elastic.max_workers == "auto"


def test_other_images_than_at_the_start_are_refused(plain):
    run = claimed(plain)
    (plain / "003.png").rename(plain / "0033.png")
    with pytest.raises(UserError) as refusal:
        prepare_run(config(plain))
    assert str(refusal.value) == (
        f"data.source: {plain} no longer holds the images that the run in {run.dir} began with: 10 then, the same number, but "
        "other names. Put them back, or choose another --run.dir."
    )
    write_images(plain / "more", 10)
    with pytest.raises(UserError, match=r"began with: 10 then, 20 of them now\. Put them back"):
        prepare_run(config(plain))
    (plain / "0033.png").rename(plain / "003.png")
    for path in (plain / "more").iterdir():
        path.unlink()
    assert prepare_run(config(plain)).config == run.config


def test_a_start_that_ended_before_it_wrote_down_its_images_goes_on(plain):
    run = claimed(plain)
    (run.dir / "images.json").unlink()
    (plain / "003.png").unlink()
    assert len(claimed(plain).images) == 9
    assert json.loads((run.dir / "images.json").read_text())["count"] == 9


def test_a_configuration_that_is_no_toml_is_refused(plain):
    run = claimed(plain)
    for content, message in ((b"[memory\n", "is not valid TOML"), (b"\xff\xfe", "is not valid TOML")):
        (run.dir / "config.toml").write_bytes(content)
        with pytest.raises(UserError, match=f"run/config.toml {message}"):
            prepare_run(config(plain))


def test_a_run_at_a_uri_keeps_its_small_files_here_and_there(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    there = in_memory()
    run = claimed(plain, run={"dir": str(there)})
    assert run.folder == there and run.checkpoints == there / "checkpoints"
    assert run.dir.parent == tmp_path / "cache" / "runs" and (run.dir / "eval").is_dir()
    assert there.files() == ["config.toml", "images.json"]
    there.write_text("metrics.jsonl", "{}\n")
    (run.dir / "stale.json").write_text("of another run in a bucket of the same name")
    again = claimed(plain, run={"dir": str(there)})
    assert again.dir == run.dir and sorted(path.name for path in run.dir.iterdir() if path.is_file()) == [
        "config.toml",
        "images.json",
        "metrics.jsonl",
    ]
    with pytest.raises(UserError, match="belongs to another configuration: run.seed is 0 there and 5 now"):
        prepare_run(config(plain, run={"dir": str(there), "seed": 5}))


def test_only_these_settings_are_free():
    """Everything else is part of the result; whoever adds a key here has thought about that."""
    free = [key for key in keys(validate({})) if key.startswith(FREE_TO_CHANGE)]
    assert free == [
        "run.dir",
        "data.cache_gb",
        "data.max_skipped",
        "train.epochs",
        "train.steps",
        "train.stop_at",
        "train.checkpoint_every",
        "train.log_every",
        "checkpoint.keep",
        "eval.knn_every",
        "eval.knn_k",
        "eval.knn_temp",
        "eval.crop",
        "eval.max_images",
        "monitor.min_spread",
        "monitor.min_kl",
        "monitor.patience",
        "elastic.min_workers",
        "elastic.max_workers",
        "elastic.view_tasks",
        "elastic.max_lost_seconds",
        "elastic.timeout_seconds",
        "elastic.max_failures",
    ]
    changed = validate({"run": {"dir": "other", "seed": 1}, "elastic": {"max_failures": 0}, "optim": {"lr": 1.0}})
    assert differing_keys(validate({}), changed) == ["run.seed", "optim.lr"]


# ---- directories that are not ours -----------------------------------------------------------------------------------


def test_foreign_directory_is_refused_and_left_alone(plain):
    with pytest.raises(UserError, match=r"plain exists and is not a run of massl-ray\. Choose another --run\.dir"):
        prepare_run(config(plain, run={"dir": str(plain)}))
    assert len(list(plain.iterdir())) == 10


def test_a_file_is_no_directory(plain):
    (plain.parent / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match=f"{plain.parent / path} .*Choose another"):
            claimed(plain, run={"dir": str(plain.parent / path)})


def test_empty_directory_and_hidden_files_are_welcome(plain):
    (plain.parent / "run").mkdir()
    (plain.parent / "run" / ".DS_Store").write_text("")
    assert (claimed(plain).dir / "config.toml").is_file()


# ---- what is refused before anything starts --------------------------------------------------------------------------


def test_backbone_that_cannot_take_the_views_is_refused(plain):
    with pytest.raises(UserError, match="test_vit_relpos does not take views.local_size 16"):
        prepare_run(config(plain, model={"backbone": "test_vit_relpos"}))


def test_unreadable_images_are_refused(plain):
    for index in range(2):
        (plain / f"00{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 of the 10 images tried .*000\.png"):
        prepare_run(config(plain))
    assert len(prepare_run(config(plain, data={"max_skipped": 0.2})).images) == 10


def test_more_workers_than_micro_batches_are_refused(plain):
    with pytest.raises(UserError, match="elastic.min_workers is 3, but a batch of 4 images has only 2 micro-batches"):
        prepare_run(config(plain, train={"micro_batch_size": 2}, elastic={"min_workers": 3}))
    prepare_run(config(plain, train={"micro_batch_size": 2}, elastic={"min_workers": 2}))


# ---- k-NN sides ------------------------------------------------------------------------------------------------------


def test_without_classes_there_are_no_sides(plain):
    run = prepare_run(config(plain))
    assert run.bank is None and run.queries is None
    with pytest.raises(UserError, match="data.test_source is given, but .*plain has no labels"):
        prepare_run(config(plain, data={"test_source": str(plain)}))


def test_a_tenth_is_held_out(tmp_path):
    run = prepare_run(config(write_classes(tmp_path / "images", cat=20, dog=20)))
    held_out = [23, 25, 36]  # of the first 40 draws of the keyed stream, those under a tenth
    assert names(run.queries) == [run.images.name(i) for i in held_out]
    assert run.queries.labels.tolist() == [1, 1, 1]
    assert names(run.bank) == [path for i, path in enumerate(names(run.images)) if i not in held_out]
    assert len(run.images) == 40  # training sees all


def test_too_few_images_to_hold_any_out_means_no_sides(tmp_path):
    run = prepare_run(config(write_classes(tmp_path / "images", cat=5, dog=5)))
    assert run.images.labels is not None and run.bank is None and run.queries is None


def test_test_source_is_numbered_by_the_training_classes(tmp_path):
    source = write_classes(tmp_path / "images", ant=2, cat=3, dog=2)
    test = write_classes(tmp_path / "test", cat=2, dog=3)
    run = prepare_run(config(source, data={"test_source": str(test)}))
    assert run.bank.labels.tolist() == [0, 0, 1, 1, 1, 2, 2] and len(run.bank) == 7
    assert run.queries.labels.tolist() == [1, 1, 2, 2, 2]
    assert run.queries.classes == run.bank.classes == ("ant", "cat", "dog")
    assert run.queries.path(0) == os.path.join(test, "cat", "000.png")


def test_unknown_class_in_test_source_is_refused(tmp_path):
    source = write_classes(tmp_path / "images", cat=3, dog=2)
    test = write_classes(tmp_path / "test", cat=2, zebra=3)
    with pytest.raises(UserError, match="test has the class 'zebra', which data.source lacks. Its classes must be named as"):
        prepare_run(config(source, data={"test_source": str(test)}))


def test_test_source_without_classes_is_refused(tmp_path, plain):
    source = write_classes(tmp_path / "images", cat=3, dog=2)
    with pytest.raises(UserError, match="data.test_source: .*plain has no labels"):
        prepare_run(config(source, data={"test_source": str(plain)}))


def test_large_sides_are_thinned_evenly(tmp_path):
    source = write_classes(tmp_path / "images", cat=4, dog=5)
    test = write_classes(tmp_path / "test", cat=2, dog=2)
    run = prepare_run(config(source, data={"test_source": str(test)}, eval={"max_images": 5}))
    assert names(run.bank) == [run.images.name(i) for i in (0, 2, 4, 6, 8)]
    assert run.bank.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(run.queries) == 4


def test_demo_is_tested_on_its_own_test_part(tmp_path):
    parts = {
        "train": write_classes(tmp_path / "train", cat=3, dog=3),
        "test": write_classes(tmp_path / "test", cat=2, dog=2),
    }
    with mock.patch.object(sources, "demo_folder", parts.get):
        run = prepare_run(config(tmp_path / "run", data={"source": "demo"}))
    assert (run.bank.root, run.queries.root) == (str(parts["train"]), str(parts["test"]))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_writing_replaces_whole_files_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"a": 1, "b": [None, 0.5]})
    assert json.loads(path.read_text()) == {"a": 1, "b": [None, 0.5]}
    with pytest.raises(TypeError):
        write_json(path, object())
    with mock.patch.object(Path, "write_bytes", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        write_atomically(path, "half of it")
    assert json.loads(path.read_text()) == {"a": 1, "b": [None, 0.5]}
    assert list(tmp_path.iterdir()) == [path]
