"""What is evaluated, from wherever it comes: the same backbone, the same features; and what does not fit is said."""

import argparse
import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from massl_ray.config import keys, load, to_toml, validate
from massl_ray.config.schema import merge
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.evaluation.adapted import adapt_statistics, training_views
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.evaluation.split_features import here, split_features
from massl_ray.evaluation.subjects import open_subject
from massl_ray.evaluation.weights import find_prefix, native_size
from massl_ray.method.network import build_encoder
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.run import write_atomically
from tests.images import TINY, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    return load([*TINY, "--model.backbone", "test_resnet", "--eval.crop", "0.8", "--model.drop_path", "0"])


@pytest.fixture(scope="module")
def teacher(config):
    """A backbone that is not the untrained one."""
    encoder = build_encoder(config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})}))
    return encoder.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory, config, teacher):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    student = build_encoder(config)
    tensors = {f"student/{name}": value for name, value in student.state_dict().items()}
    tensors |= {f"teacher/{name}": value for name, value in teacher.state_dict().items()} | {"step": torch.tensor(7)}
    write_checkpoint(folder / "checkpoints", tensors, {"images_seen": 56, "config": keys(config)}, keep=2)
    write_atomically(folder / "config.toml", to_toml(config))
    return folder


def same(subject, backbone: nn.Module) -> bool:
    ours, theirs = subject.backbone.state_dict(), backbone.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_of_a_run_the_teacher_with_its_view(run, config, teacher):
    for what in (run, run / "checkpoints" / "step_7"):
        subject = open_subject(str(what))
        assert same(subject, teacher.backbone) and not subject.backbone.training
        assert (subject.name, subject.size, subject.crop, subject.precision) == ("mine/step_7", 32, 0.8, "fp32")
        assert (subject.mean, subject.std) == (config.data.mean, config.data.std)
        assert subject.facts["step"] == 7 and subject.facts["images_seen"] == 56 and subject.facts["run"] == str(run)
    asked = open_subject(str(run), size=48, crop=1.0)
    assert (asked.size, asked.crop, asked.mean) == (48, 1.0, config.data.mean)


def test_of_a_run_before_its_first_step(run, config, tmp_path):
    """Its statistics adapted to the run's images; as they were where these are gone."""
    backbone, images = build_encoder(config).backbone, open_source("demo")
    subject = open_subject(f"untrained:{run}")
    assert same(subject, adapt_statistics(backbone, training_views(images, config))) and not same(subject, backbone)
    assert subject.facts["adapted"] is True and subject.facts["adapted_on"] == f"training views of {images.root}"
    gone = validate(merge(config.model_dump(), {"data": {"source": str(tmp_path / "gone")}}))
    write_atomically(tmp_path / "config.toml", to_toml(gone))
    subject = open_subject(f"untrained:{tmp_path}")
    assert same(subject, backbone) and subject.facts["adapted"] is False and "gone" in subject.facts["not_adapted_because"]


def test_features_are_those_of_training(run, config, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    listing = open_source(str(write_images(tmp_path / "images", 9)))
    split, bad = split_features(open_subject(str(run)), listing, config.data, here(CPU))
    expected = backbone_features(teacher.backbone, listing, config, CPU)
    assert np.allclose(split.vectors, expected.rows.numpy(), atol=1e-6) and not bad
    assert split.labels.tolist() == expected.labels.tolist() and split.paths[3] == listing.path(3)
    pixels, _ = split_features(open_subject("pixels"), listing, config.data, here(CPU))
    assert np.allclose(pixels.vectors * 255, pixel_features(listing, config.data).rows.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {
            "student": {f"module.backbone.{name}": value + 1 for name, value in state.items()},
            "teacher": {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.ones(3, 3)},
            "epoch": 3,
            "args": argparse.Namespace(arch="resnet"),
        },
        lambda state: {"model": {f"module.encoder.{name}": value for name, value in state.items()} | {"fc.bias": torch.ones(9)}},
        lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "lr": np.float64(0.1)}, "model": state},
    ],
    ids=["plain", "module", "teacher before student", "encoder and head", "optimizer beside it"],
)
def test_weights_under_any_prefix(wrap, teacher, tmp_path):
    state = {name: value.clone() for name, value in teacher.backbone.state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    subject = open_subject(str(tmp_path / "weights.pth"), backbone="test_resnet")
    assert same(subject, teacher.backbone)
    assert subject.mean == (0.485, 0.456, 0.406)  # timm's of the name alone would be others for some


def test_head_is_named_as_left_out(teacher, tmp_path):
    state = dict(teacher.backbone.state_dict()) | {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    save_file(state, tmp_path / "weights.safetensors")
    facts = open_subject(str(tmp_path / "weights.safetensors"), backbone="test_resnet").facts
    assert facts["left_out"] == ["fc.bias", "fc.weight"]


def test_positions_of_another_size_are_kept(tmp_path):
    """A transformer's file for 64 px, looked at with 32: its positions are resampled by the model, not refused or cut."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=64)
    nn.init.normal_(model.pos_embed)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    subject = open_subject(str(tmp_path / "vit.safetensors"), backbone="test_vit", size=64)
    images = torch.randn(2, 3, 64, 64)
    assert native_size(model.state_dict(), subject.backbone) == 64
    assert torch.allclose(subject.backbone(images), model.eval()(images), atol=1e-5)
    assert open_subject(str(tmp_path / "vit.safetensors"), backbone="test_vit", size=32).facts["features"] == 64


def test_an_exported_folder_and_file(tmp_path, teacher):
    state = dict(teacher.backbone.state_dict())
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    known = {"input_size": [3, 40, 40], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": known}))
    note = {"backbone": "test_resnet", "size": 40, "crop": 0.9, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "step": 4}
    save_file(state, tmp_path / "one.safetensors", {"massl_ray": json.dumps(note)})
    for what in (folder, tmp_path / "one.safetensors"):
        subject = open_subject(str(what))
        assert same(subject, teacher.backbone)
        assert (subject.size, subject.crop, subject.mean) == (40, 0.9, (0.1, 0.2, 0.3))
    assert subject.facts["step"] == 4


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    lines = ["from torch import nn", "model = lambda: nn.AvgPool2d(2)", "wrong = lambda: 3", "flat = lambda: nn.Flatten(0)"]
    (tmp_path / "theirs.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    subject = open_subject("python:theirs:model", size=8)
    views = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).view(2, 8, 8, 3)
    assert torch.allclose(subject.embedded(views), subject.normalized(views).mean((2, 3)), atol=1e-5)
    for name, words in (("wrong", "returned int, not"), ("flat", r"have to be \(2, D\)"), ("gone", "AttributeError")):
        with pytest.raises(UserError, match=words):
            open_subject(f"python:theirs:{name}", size=8)


def test_another_architecture_is_named_with_the_nearest(tmp_path, teacher):
    save_file(dict(teacher.backbone.state_dict()), tmp_path / "weights.safetensors")
    where = str(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit the backbone resnet18: .*conv1.*try --backbone test_resnet"):
        open_subject(where, backbone="resnet18")
    with pytest.raises(UserError, match="does not say its architecture: give --backbone NAME.*test_resnet"):
        open_subject(where)


def test_a_deeper_network_is_not_cut_to_fit(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(dict(state) | {"blocks.9.norm1.weight": torch.ones(64)}, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="it has blocks.9.norm1.weight, which the backbone has not"):
        open_subject(str(tmp_path / "deep.safetensors"), backbone="test_vit")


class Planted:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "text.pth", "code.pth", "gone.pth"])
def test_unreadable_weights(name, teacher, tmp_path):
    path, state = tmp_path / name, dict(teacher.backbone.state_dict())
    if name == "text.pth":
        path.write_text("no weights")
    elif name == "code.pth":
        torch.save({"model": state, "more": Planted()}, path)
    elif name != "gone.pth":
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError) as raised:
        open_subject(str(path), backbone="test_resnet")
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_what_there_is_not(tmp_path):
    with pytest.raises(UserError, match="'resnet188' is no timm model; close ones are resnet18"):
        open_subject("untrained:resnet188")
    with pytest.raises(UserError, match="holds no checkpoint and no exported backbone"):
        open_subject(str(tmp_path))
    with pytest.raises(UserError, match="give one for each channel"):
        open_subject("untrained:test_resnet", mean=(0.5,))


def test_weights_of_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("massl_ray.evaluation.foreign.urllib.request.getproxies", dict)

    def refused(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("massl_ray.evaluation.foreign.socket.create_connection", refused)
    with pytest.raises(UserError, match="cannot be reached .no route to host.*untrained:test_vit2"):
        open_subject("test_vit2")


def test_prefixes():
    assert find_prefix(["a.x", "a.y", "b.teacher.x", "b.teacher.y"], ["x", "y"]) == "b.teacher."
    assert find_prefix(["student/x", "teacher/x", "x"], ["x"]) == "teacher/"
    assert find_prefix(["q.x", "k.x", "k.y"], ["x", "y"]) == "k."
    assert find_prefix(["other"], ["x"]) == ""


def test_channels():
    gray = validate({"data": {"channels": 1, "mean": [0.5], "std": [0.2]}})
    assert open_subject("pixels", config=gray).channels == 1
    subject = open_subject("untrained:test_resnet", config=gray)
    assert subject.channels == 1 and len(subject.mean) == 1
