"""massl-ray evaluate: one command, a table of figures with intervals, records, and a sentence for every mistake."""

import json
from dataclasses import replace
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray import evaluate
from massl_ray.config import keys, load, to_toml
from massl_ray.data.listing import Listing
from massl_ray.data.sources import hold_out, open_source
from massl_ray.evaluation.adapted import adapt_statistics, shuffled, training_views
from massl_ray.evaluation.corruptions import CORRUPTIONS
from massl_ray.evaluation.features import backbone_features, pixel_features
from massl_ray.evaluation.knn import knn_accuracy
from massl_ray.evaluation.protocols import PROTOCOLS
from massl_ray.evaluation.subjects import open_subject
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
    assert trained["backbone_sha256"] != untrained["backbone_sha256"]  # of a run that took no step: its statistics are adapted
    assert untrained["from"]["adapted"] is True and untrained["from"]["adapted_on"] == f"training views of {images}"
    bank, queries = hold_out(open_source(str(images)))
    config, cpu = load(["--config", str(run / "config.toml")]), torch.device("cpu")
    backbone = build_encoder(config).backbone
    adapted = adapt_statistics(backbone, training_views(open_source(str(images)), config))
    for record, sides in (
        (untrained, [backbone_features(adapted, side, config, cpu) for side in (bank, queries)]),
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


def test_what_has_no_run_is_adapted_to_the_train_images(images, capsys, tmp_path):
    """Centre views, in batches of 64; the figures and the hash are those of the adapted backbone."""
    flags = ["--data.source", images, "--ks", "3", "--views.global_size", "32", "--out", tmp_path / "out", "--json"]
    code, out, err = call(capsys, "untrained:test_resnet", "untrained:test_vit", *flags)
    assert code == 0 and "untrained:test_resnet: running statistics are adapted to centre views of" in err
    conv, vit = json.loads(out)["records"]
    assert conv["from"]["adapted"] is True and conv["from"]["adapted_on"] == f"centre views of {images}"
    assert vit["from"]["adapted"] is False and "untrained:test_vit: running" not in err
    subject = open_subject("untrained:test_resnet", size=32)
    bank, _ = hold_out(open_source(str(images)))
    order = shuffled(bank)
    views = [subject.view(cv2.imread(order.path(place))[:, :, ::-1]) for place in range(len(bank))]
    batches = subject.normalized(torch.from_numpy(np.stack(views))).split(64)
    assert len(batches) == 2
    expected = replace(subject, backbone=adapt_statistics(subject.backbone, batches))
    assert conv["backbone_sha256"] == expected.sha256 != subject.sha256


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


def test_transfer_with_a_test_source_each(run, images, tmp_path, capsys):
    first, second = write_images(tmp_path / "a" / "train", 60, side=20), write_images(tmp_path / "b" / "train", 90, side=20)
    test = write_images(tmp_path / "a" / "test", 12, side=20)
    code, out, err = call(capsys, run, "--ks", "3", "--transfer", first, second, "--test", test, "-", "--json")
    assert code == 0, err
    sides = [(record["data"]["name"], record["data"]["test_root"]) for record in json.loads(out)["records"]]
    assert sides == [("a/train", str(test)), ("b/train", str(second))]
    assert len(list((run / "eval").glob("evaluation_*"))) == 2
    code, _, err = call(capsys, run, "--ks", "3", "--transfer", first, second, "--test", test)
    assert code == 2 and "--test names 1 sources, and there are 2 of train images" in err


def test_names_of_sources():
    assert evaluate.names_of(["demo"]) == ["demo"]
    assert evaluate.names_of(["/data/birds/", "/data/cells"]) == ["birds", "cells"]
    assert evaluate.names_of(["s3://b/x/train", "s3://c/x/train"]) == ["b/x/train", "c/x/train"]
    assert evaluate.names_of(["same", "same"]) == ["same", "same"]


def test_all_protocols_in_one_table(run, capsys):
    """But for copies. Whatever needs other views of the images gets them."""
    code, out, err = call(capsys, run, "pixels", "--ks", "3", "--protocols", "all", "--augment", "2", "--json")
    assert code == 0, err
    records = json.loads(out)["records"]
    for record in records:
        found = record["protocols"]
        assert list(found) == [name for name in PROTOCOLS if name != "copies"]
        assert 0 < found["quality"]["figures"]["alignment"]["value"] < 2
        assert found["linear"]["parameters"]["augmentation"] == "2 random crops of each image"
        figures = {name: figure["value"] for name, figure in found["robustness"]["figures"].items()}
        kinds = [figures[name] for name in CORRUPTIONS]
        assert figures["corrupted"] == pytest.approx(sum(kinds) / len(kinds)) and len({*kinds}) > 1
        assert 0.3 < figures["corrupted"] <= figures["clean"] + 0.1
    assert "crop 2 of train images" in err and "fog of test images" in err


def test_copies(run, tmp_path, capsys):
    originals, altered = tmp_path / "originals", tmp_path / "altered"
    random = np.random.default_rng(0)
    for number in range(8):
        colours = cv2.resize(random.integers(0, 256, (3, 3, 3), dtype=np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        for folder, pixels in ((originals, colours), (altered, colours // 2 + 60)):
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    names = [str(number) for number in range(8)]
    for folder, labels in ((originals, names), (altered, ["another", *names[1:]])):
        lines = (f"{folder.name}/{number}.png\t{label}\n" for number, label in enumerate(labels))
        (tmp_path / f"{folder.name}.txt").write_text("".join(lines))
    sources = ["--data.source", tmp_path / "originals.txt", "--test", tmp_path / "altered.txt"]
    code, out, err = call(capsys, "pixels", "--protocols", "copies", *sources, "--json")
    assert code == 0, err
    result = json.loads(out)["records"][0]["protocols"]["copies"]
    assert result["figures"]["recall_at_1"]["value"] == 1 and result["parameters"]["queries_without_original"] == 1
    code, _, err = call(capsys, run, "--protocols", "copies")
    assert code == 2 and "each original and each distractor needs a class alone" in err


def test_landmarks_and_clips(run, tmp_path, capsys):
    """Each a table of its own, and no other protocol unless it is asked for."""
    random, landmarks, davis = np.random.default_rng(0), tmp_path / "roxford", tmp_path / "davis"
    (landmarks / "jpg").mkdir(parents=True)
    for name, level in (("q", 60), ("a", 70), ("b", 200), ("c", 90)):  # of brightness alone
        Image.fromarray(np.full((32, 48, 3), level, np.uint8) + np.arange(48, dtype=np.uint8)[:, None]).save(
            landmarks / f"jpg/{name}.png"
        )
    truth = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [{"bbx": [0, 0, 48, 32], "easy": [0], "hard": [], "junk": [1]}]}
    (landmarks / "gnd_made.json").write_text(json.dumps(truth))
    ground = np.array([0, 40, 200]) + random.integers(0, 40, (48, 64, 3))
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 16:40] = 1
    for frame in range(3):
        for part, pixels in (
            ("JPEGImages", np.where(mask[..., None], 255 - ground, ground).astype(np.uint8)),
            ("Annotations", mask),
        ):
            (davis / part / "still").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(davis / part / "still" / f"{frame:05d}.png")
    code, out, err = call(capsys, run, "pixels", "--landmarks", landmarks, "--clips", davis, "--json")
    assert code == 0, err
    records = json.loads(out)["records"]
    found = [(record["data"]["name"], record["subject"], *record["protocols"]) for record in records]
    subjects = ("mine/step_7", "pixels")
    names = ["revisited", "revisited", "segmentation", "segmentation"]
    assert found == [(*pair, name) for pair, name in zip(product(("roxford", "davis"), subjects), names, strict=True)]
    for record in records[:2]:
        figures = record["protocols"]["revisited"]["figures"]
        assert figures["map_easy"]["value"] == 1 and "map_hard" not in figures
    assert records[3]["protocols"]["segmentation"]["figures"]["j"]["value"] > 0.7
    assert len(list((run / "eval").glob("evaluation_*"))) == 4
    code, out, _ = call(capsys, run, "--clips", davis, "--protocols", "quality", "--views.global_size", "64", "--json")
    first, second = json.loads(out)["records"]
    assert list(first["protocols"]) == ["quality"] and second["protocols"]["segmentation"]["parameters"]["size_px"] == 64


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
        (["--augment", "-1"], "--augment is -1"),
        (["--landmarks", "IMAGES"], "has no ground-truth file"),
        (["--clips", "IMAGES"], "Annotations"),
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
