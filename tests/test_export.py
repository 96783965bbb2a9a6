"""massl-ray export: what other programs load computes what the checkpoint's backbone does."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config

from massl_ray.config import keys, load, resolve
from massl_ray.data.decode import Decoding, Encoded
from massl_ray.data.sources import open_source
from massl_ray.evaluation.features import backbone_features
from massl_ray.evaluation.subjects import open_subject
from massl_ray.export import FORMATS, main
from massl_ray.exporting import formats
from massl_ray.training.checkpoint import MANIFEST, STATE, write_checkpoint
from massl_ray.training.collectives import Local
from massl_ray.training.state import build_state, to_tensors
from tests.images import TINY, write_images

CPU = torch.device("cpu")
NETS = {"vit": ["--views.global_size", "48"], "conv": ["--model.backbone", "test_byobnet"], "gray": ["--data.channels", "1"]}
GRAY = ["--data.mean", "[0.4]", "--data.std", "[0.3]"]
WITHOUT = {"timm": "folder", "huggingface": "hf", "safetensors": "file.safetensors", "onnx": "net.onnx"}


def make_run(folder: Path, *flags: str, step: int = 12):
    """A run directory with a checkpoint that was not trained: its student differs from its teacher. Returns its configuration and
    the two networks."""
    config = load([*TINY, "--model.drop_path", "0", "--eval.crop", "0.9", "--data.source", "s3://me:secret@there/x", *flags])
    state = build_state(config, resolve(config, 48), CPU, Local())
    with torch.no_grad():
        for parameter in state.student.parameters():
            parameter.mul_(1.1)
    state.step = step
    facts = {"images_seen": 96, "dataset_size": 48, "config": keys(config), "versions": {"torch": "2"}, "knn_top1": 0.625}
    write_checkpoint(folder / "checkpoints", to_tensors(state), facts, keep=1)
    (folder / "eval").mkdir()
    (folder / "eval" / "knn_pixels.json").write_text(json.dumps({"top1": 0.25}))
    (folder / "eval" / "broken.json").write_text("{")
    return config, state


@pytest.fixture(params=NETS)
def net(request, tmp_path):
    flags = [*NETS[request.param], *(GRAY if request.param == "gray" else [])]
    config, state = make_run(tmp_path / "run", *flags)
    images = open_source(str(write_images(tmp_path / "images", 6)))
    return tmp_path, config, images, backbone_features(state.teacher.backbone, images, config, CPU).rows


def normalized(images, config) -> torch.Tensor:
    """What the backbone sees, by the arithmetic of the model card and not by ours."""
    subject = open_subject("untrained:test_vit", size=config.views.global_size, crop=config.eval.crop, config=config)
    pixels = [Encoded(images.read(place), Decoding.of(config.data)).pixels()[0] for place in range(len(images))]
    views = torch.from_numpy(np.stack([subject.view(image) for image in pixels])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.data.mean, config.data.std))
    return (views - mean) / std


def features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1)


def test_safetensors(net, capsys):
    folder, config, images, expected = net
    assert main([str(folder / "run"), str(folder / "b.safetensors"), "--format", "safetensors"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("Load      ")
    close(features(eval(line, {"timm": timm}), normalized(images, config)), expected)  # the documented line itself
    with safe_open(folder / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["massl_ray"])["size"] == config.views.global_size
    assert stat.S_IMODE(os.stat(folder / "b.safetensors").st_mode) == stat.S_IMODE(os.stat(folder / "b.md").st_mode)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("form", ["timm", "huggingface"])
def test_folder(net, form):
    folder, config, images, expected = net
    assert main([str(folder / "run"), str(folder / "out"), "--format", form]) == 0
    model = timm.create_model(f"local-dir:{folder}/out", pretrained=True)
    close(features(model, normalized(images, config)), expected)
    seen = resolve_model_data_config(model)
    size, channels = config.views.global_size, config.data.channels
    assert tuple(seen["input_size"]) == (channels, size, size) and seen["crop_pct"] == 0.9 and seen["interpolation"] == "bicubic"
    assert tuple(seen["mean"]) == config.data.mean and tuple(seen["std"]) == config.data.std
    if channels == 3:
        assert create_transform(**seen)(_image(images)).shape == (3, size, size)


def _image(images):
    return Image.open(images.path(0)).convert("RGB")


def test_onnx(net):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, config, images, expected = net
    assert main([str(folder / "run"), str(folder / "net.onnx"), "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
    views = normalized(images, config).numpy()
    for some in (views, views[:1], views[:5]):  # any number at once
        (found,) = session.run(["features"], {"images": some})
        close(torch.from_numpy(found), expected[: len(some)])


@pytest.mark.parametrize("form", ["timm", "safetensors"])
def test_evaluate_opens_it_as_the_run(net, form):
    folder, config, images, expected = net
    dest = folder / WITHOUT[form]
    assert main([str(folder / "run"), str(dest), "--format", form, "--no-check"]) == 0
    subject, run = open_subject(str(dest)), open_subject(str(folder / "run"))
    assert subject.sha256 == run.sha256 and subject.settings == run.settings


def test_the_student(tmp_path):
    _, state = make_run(tmp_path / "run")
    assert main([str(tmp_path / "run"), str(tmp_path / "s"), "--format", "timm", "--branch", "student"]) == 0
    loaded = timm.create_model(f"local-dir:{tmp_path}/s", pretrained=True).state_dict()
    student, teacher = state.student.backbone.state_dict(), state.teacher.backbone.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in loaded.items())
    assert not all(torch.equal(value, teacher[name]) for name, value in loaded.items())


def test_the_card(tmp_path):
    make_run(tmp_path / "run")
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    rows = ["images in the data set | 48", "steps | 12", "images seen | 96", "k-NN top-1 (k = 20) | 62.5%", "raw pixels | 25.0%"]
    for row in rows:
        assert f"{row} |" in card
    assert "`loss.student_temp` | `0.1`" in card and 'AutoModel.from_pretrained("out")' in card and "## Licence" in card
    assert "s3://" not in card and "secret" not in card and str(tmp_path) not in card


@pytest.mark.parametrize("form", FORMATS)
def test_what_exists_is_kept(tmp_path, capsys, form):
    make_run(tmp_path / "run")
    dest = tmp_path / WITHOUT[form]
    dest.touch()
    assert main([str(tmp_path / "run"), str(dest), "--format", form]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"massl-ray: {dest} exists already. Remove it, or choose another DEST.\n") and not dest.read_bytes()


def cut(folder: Path) -> None:
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-9])


def unknown(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"]["model.backbone"] = "test_vitt"
    (folder / MANIFEST).write_text(json.dumps(manifest))


def another(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"]["model.backbone"] = "test_byobnet"
    (folder / MANIFEST).write_text(json.dumps(manifest))


def without_settings(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["config"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "The checkpoint is damaged"),
        (unknown, "close ones are test_vit"),
        (another, "is no test_byobnet of this timm"),
        (without_settings, "make no backbone"),
    ],
)
def test_what_is_no_backbone_is_refused(tmp_path, capsys, damage, words):
    make_run(tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step_12")
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "timm"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("dest", "form", "words"),
    [
        ("b.pth", "safetensors", "must end in .safetensors"),
        ("b", "onnx", "must end in .onnx"),
        ("s3://bucket/b", "timm", "must be on this machine's disk"),
        ("run/eval/broken.json/b", "timm", "cannot be written"),
    ],
)
def test_a_dest_that_does_not_do(tmp_path, monkeypatch, capsys, dest, form, words):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["run", dest, "--format", form]) == 2
    assert words in (err := capsys.readouterr().err) and err.count("\n") == 1 and os.listdir(tmp_path) == ["run"]


def test_an_unknown_format(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["run", "out", "--format", "tensorflow"])
    assert ended.value.code == 2 and "safetensors" in capsys.readouterr().err


def test_no_checkpoint(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out"), "--format", "timm"]) == 2
    assert "There is no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda rows: rows + 1e-3, lambda rows: rows * float("nan"), lambda rows: rows[:, 1:]])
def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch, capsys, change):
    make_run(tmp_path / "run")

    def load(exported, path):
        loaded = formats.load_folder(exported, path)
        return lambda images: change(loaded(images))

    monkeypatch.setitem(formats.LOADERS, "timm", load)
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--format", "timm"]) == 1
    assert "Nothing was written." in capsys.readouterr().err and os.listdir(tmp_path) == ["run"]


def test_without_onnx(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(tmp_path / "run"), str(tmp_path / "net.onnx"), "--format", "onnx"]) == 2
    assert "pip install 'massl-ray[export]'" in capsys.readouterr().err
