"""massl-ray evaluate: one command, a table of figures with intervals, records, and a sentence for every mistake."""

import json

import pytest
import torch

from massl_ray import evaluate
from massl_ray.config import keys, load, to_toml
from massl_ray.data.listing import Listing
from massl_ray.data.sources import hold_out, open_source
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.evaluation.knn import knn_accuracy
from massl_ray.method.network import build_encoder
from massl_ray.training.checkpoint import write_checkpoint
from massl_ray.training.run import write_atomically
from tests.images import CLASSES, TINY, write_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def images(tmp_path):
    """Every fourth lies in a wrong folder, so that nothing is right every time."""
    folder = write_images(tmp_path / "images", 90)
    for path in sorted(folder.rglob("*.png"))[::4]:
        path.rename(folder / CLASSES[int(path.stem) % 2] / f"moved_{path.name}")
    return folder


@pytest.fixture
def run(tmp_path, images):
    folder = tmp_path / "runs" / "mine"
    config = load([*TINY, "--data.source", str(images), "--model.backbone", "test_resnet", "--train.steps", "7"])
    encoder = build_encoder(config)
    tensors = {f"teacher/{name}": value for name, value in encoder.state_dict().items()} | {"step": torch.tensor(7)}
    write_checkpoint(folder / "checkpoints", tensors, {"images_seen": 56, "config": keys(config)}, keep=2)
    write_atomically(folder / "config.toml", to_toml(config))
    return folder


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = evaluate.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_beside_others_in_one_table(run, images, capsys, monkeypatch):
    code, out, err = call(capsys, run, f"untrained:{run}", "pixels", "--ks", "3,20", "--protocols", "knn")
    assert code == 0, err
    head, *lines = [line for line in out.splitlines() if line.startswith(("protocol", "knn", " "))]
    assert "mine/step_7" in head and "untrained test_resnet" in head and "pixels" in head
    assert [line.split()[:2] for line in lines] == [["knn", "top1_k20"], ["top1_k3", lines[1].split()[1]]]
    records = {path.name: json.loads(path.read_text()) for path in (run / "eval").glob("evaluation_*.json")}
    names = ("mine_step_7", "untrained_test_resnet", "pixels")
    assert set(records) == {f"evaluation_{name}_images.json" for name in names}
    trained, untrained, pixels = (records[f"evaluation_{name}_images.json"] for name in names)
    figure = trained["protocols"]["knn"]["figures"]["top1_k3"]
    assert figure["low"] <= figure["value"] <= figure["high"] and f"{figure['value']:.3f} [" in lines[1]
    assert trained["protocols"] == untrained["protocols"]  # this run never took a step
    bank, queries = hold_out(open_source(str(images)))
    config, cpu = load(["--config", str(run / "config.toml")]), torch.device("cpu")
    backbone = build_encoder(config).backbone
    for record, sides in (
        (trained, [backbone_features(backbone, side, config, cpu) for side in (bank, queries)]),
        (pixels, [pixel_features(side, config.data) for side in (bank, queries)]),
    ):
        one, other = sides
        expected = knn_accuracy(one.rows, one.labels, other.rows, other.labels, k=3, temperature=0.07)
        assert record["protocols"]["knn"]["figures"]["top1_k3"]["value"] == pytest.approx(expected, abs=1e-6)
        assert 0.3 < expected < 1
    assert trained["protocols"]["knn"]["parameters"]["ks"] == [20, 3] and trained["view"]["size"] == 32
    assert trained["data"]["train_images"] + trained["data"]["test_images"] == 90 and trained["data"]["classes"] == 3
    report = (run / "report.html").read_text()
    assert "<h2>Evaluation</h2>" in report and f"{figure['value']:.3f} [" in report


def test_features_are_computed_once(run, capsys, monkeypatch):
    first = call(capsys, run, "--ks", "3")[1]

    def forbidden(*_):
        raise AssertionError("an image was read")

    with monkeypatch.context() as patched:
        patched.setattr(Listing, "read", forbidden)
        assert call(capsys, run, "--ks", "3")[1] == first
        with pytest.raises(AssertionError, match="an image was read"):
            call(capsys, run, "--ks", "3", "--fresh")
        with pytest.raises(AssertionError, match="an image was read"):
            call(capsys, run, "--ks", "3", "--eval.crop", "0.5")
    image = next((run.parents[1] / "images").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    monkeypatch.setattr(Listing, "read", forbidden)
    with pytest.raises(AssertionError, match="an image was read"):
        call(capsys, run, "--ks", "3")


def test_json_out_and_protocols_that_come_later(run, tmp_path, capsys):
    code, out, _ = call(capsys, run, "pixels", "--ks", "3", "--out", tmp_path / "out", "--json")
    assert code == 0 and [record["subject"] for record in json.loads(out)["records"]] == ["mine/step_7", "pixels"]
    assert not list((run / "eval").glob("evaluation_*")) and not (run / "report.html").exists()
    call(capsys, run, "--protocols", "retrieval", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "evaluation_mine_step_7_images.json").read_text())
    assert list(record["protocols"]) == ["knn", "retrieval"]


def test_transfer_and_test_source(run, tmp_path, capsys):
    other = write_images(tmp_path / "other", 60, side=20)
    code, out, err = call(capsys, run, "--ks", "3", "--transfer", tmp_path / "images", other)
    assert code == 0, err
    assert {path.name for path in (run / "eval").glob("evaluation_*")} == {
        "evaluation_mine_step_7_images.json",
        "evaluation_mine_step_7_other.json",
    }
    assert "images" in out and "other" in out
    code, out, _ = call(capsys, run, "--ks", "3", "--test", other, "--json")
    data = json.loads(out)["records"][0]["data"]
    assert (data["train_images"], data["test_images"], data["test_root"]) == (90, 60, str(other))


def test_broken_images_are_named(run, images, capsys):
    broken = sorted(images.rglob("*.png"))[5]
    broken.write_bytes(b"no image")
    code, out, err = call(capsys, run, "--ks", "3", "--json")
    assert code == 0 and json.loads(out)["records"][0]["data"]["unreadable_first"] == [str(broken)] and str(broken) in err
    code, _, err = call(capsys, run, "--ks", "3", "--data.max_skipped", "0.001")
    assert code == 2 and "more than data.max_skipped" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocols", "knnn"], "There is no protocol 'knnn'; the nearest is 'knn'"),
        (["--data.sauce", "x"], "There is no setting 'data.sauce'; the nearest is 'data.source'"),
        (["--nonsense"], "There is no setting 'nonsense'"),
        (["--ks", "0"], "The flags could not be read"),
        (["--ks", "500"], "500 neighbours are asked for"),
        (["--data.source", "IMAGES/spots"], "needs labels, and"),
        (["--data.source", "IMAGES/spots", "--test", "IMAGES"], "needs labels, and"),
        (["--test", "IMAGES/gone"], "data.test_source: there is no folder or file"),
        (["no_model", "--ks", "3"], "is no timm model"),
    ],
)
def test_mistakes(run, images, arguments, words, capsys):
    code, out, err = call(capsys, run, *(argument.replace("IMAGES", str(images)) for argument in arguments))
    assert code == 2 and not out and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1 and err.endswith(".\n")


def test_nothing_to_evaluate(capsys):
    code, _, err = call(capsys, "--ks", "3")
    assert code == 2 and err.startswith("massl-ray: There is nothing to evaluate")
    assert call(capsys, "--help")[0] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_over_a_cluster_the_same_features_in_the_same_order(run, images, ray_cluster):
    from functools import partial

    import numpy as np

    from massl_ray.config import DataSection
    from massl_ray.data.sources import open_source
    from massl_ray.evaluation.split_features import here, split_features
    from massl_ray.evaluation.subjects import open_subject
    from massl_ray.on_ray.features import over_cluster

    sorted(images.rglob("*.png"))[5].write_bytes(b"no image")
    listing, subject = open_source(str(images)), open_subject(str(run))
    expected, bad = split_features(subject, listing, DataSection(), here(torch.device("cpu")))
    found, also_bad = split_features(subject, listing, DataSection(), partial(over_cluster, batch=16), fresh=True)
    assert np.allclose(found.vectors, expected.vectors, atol=1e-5) and found.paths == expected.paths and bad == also_bad
