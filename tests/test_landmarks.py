"""Revisited Oxford and Paris from files: coloured images with a known ranking, read as the benchmark lays them out."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from massl_ray.config import DataSection
from massl_ray.data.decode import PLAIN
from massl_ray.errors import UserError
from massl_ray.evaluation.landmarks import landmark_result, open_landmarks
from massl_ray.evaluation.results import Result
from massl_ray.evaluation.split_features import features_key, here, split_features
from massl_ray.evaluation.subjects import open_subject
from tests.helpers import decode, encoded, names
from tests.storages import in_memory

LEFT, RIGHT = [0, 0, 16, 24], [16.4, -0.4, 31.6, 24]  # the query's red half and its blue one
JUNK, EASY, HARD = 0, 1, 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))


def flat(turn: float) -> Image.Image:
    """Of one colour, between red at 0 and blue at 90 degrees."""
    colour = np.array([np.cos(np.radians(turn)), 0, np.sin(np.radians(turn))]) * 255
    return Image.fromarray(np.full((20, 30, 3), colour.round(), np.uint8))


def halves() -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(flat(turn).resize((16, 24))) for turn in (0, 90)], axis=1))


def content(box, **changes) -> dict:
    entry = {"bbx": box, "junk": [JUNK], "easy": [EASY], "hard": [HARD]} | changes
    return {"imlist": [f"g{place}" for place in range(6)], "qimlist": ["q"], "gnd": [entry]}


def write(folder: Path, truth: dict, images: str = "jpg") -> Path:
    """Six images from red to blue, the query, and the ground truth."""
    (folder / images).mkdir(parents=True)
    for place in range(6):
        flat(15 * place).save(folder / images / f"g{place}.png")
    halves().save(folder / images / "q.png")
    (folder / "gnd_made.json").write_text(json.dumps(truth))
    return folder


def result(folder: Path | str) -> Result:
    landmarks, compute = open_landmarks(str(folder)), here(torch.device("cpu"))
    subject, data = open_subject("pixels"), DataSection()
    gallery, queries = (split_features(subject, each, data, compute)[0] for each in (landmarks.gallery, landmarks.queries))
    return landmark_result(gallery, queries, landmarks, seed=0)


def values(found: Result) -> dict[str, float]:
    return {name: figure.value for name, figure in found.figures.items() if name.startswith("map")}


def test_ranking_by_hand_and_the_box_turns_it(tmp_path):
    red = result(write(tmp_path / "red", content(LEFT)))
    # 0 junk, 1 easy, 2, 3 hard, 4, 5
    assert values(red) == pytest.approx({"map_medium": (1 + (1 / 2 + 2 / 3) / 2) / 2, "map_hard": (0 + 1 / 2) / 2, "map_easy": 1})
    assert red.parameters["cropped_queries"] == 1 and red.parameters["unreadable_gallery_images"] == 0
    blue = values(result(write(tmp_path / "blue", content(RIGHT))))
    # 5, 4, 3 hard, 2, 1 easy, 0 junk
    assert blue == pytest.approx(
        {
            "map_medium": ((0 + 1 / 3) / 2 + (1 / 4 + 2 / 5) / 2) / 2,
            "map_hard": (0 + 1 / 3) / 2,
            "map_easy": (0 + 1 / 4) / 2,
        }
    )


def test_unreadable_images_of_the_gallery_leave_the_ranking(tmp_path):
    (write(tmp_path / "a", content(LEFT)) / "jpg/g2.png").write_bytes(b"no image")
    found = result(tmp_path / "a")
    assert values(found) == pytest.approx({"map_medium": 1, "map_hard": 1, "map_easy": 1})  # 0 junk, 1 easy, 3 hard, 4, 5
    assert (found.parameters["gallery_images"], found.parameters["unreadable_gallery_images"]) == (5, 1)
    (write(tmp_path / "b", content(RIGHT)) / "jpg/g1.png").write_bytes(b"no image")
    assert values(result(tmp_path / "b")) == pytest.approx({"map_medium": (0 + 1 / 3) / 2, "map_hard": (0 + 1 / 3) / 2})


def test_an_unreadable_query_is_refused(tmp_path):
    truth = content(LEFT) | {"qimlist": ["q", "p"], "gnd": content(LEFT)["gnd"] * 2}
    folder = write(tmp_path / "a", truth)
    (folder / "jpg/p.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"The query .*p\.png cannot be read \(UnidentifiedImageError"):
        open_landmarks(str(folder))
    (folder / "jpg/p.png").write_bytes(encoded(halves(), "BMP")[:-9])  # its header is whole
    with pytest.raises(UserError, match=r"1 of 2 queries cannot be read, and the protocol needs them all \(first: .*p\.png\)"):
        result(folder)


def test_queries_are_cropped_without_loss(tmp_path):
    folder = write(tmp_path / "a", content([3.5, -2, 40.2, 9.6]))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    noise.save(folder / "jpg/q.png")
    landmarks = pickle.loads(pickle.dumps(open_landmarks(str(folder))))
    assert (np.asarray(decode(landmarks.queries.read(0))) == np.asarray(noise)[0:10, 4:32]).all()
    assert names(landmarks.queries) == ["q.png#4,-2,40,10"] and landmarks.queries.path(0) == str(folder / "jpg/q.png")
    assert names(landmarks.gallery) == [f"g{place}.png" for place in range(6)]
    whole = open_landmarks(str(write(tmp_path / "b", content(None))))
    assert whole.queries.read(0) == (tmp_path / "b/jpg/q.png").read_bytes() and names(whole.queries) == ["q.png"]


def test_features_of_another_box_are_others(tmp_path):
    keys = []
    for box in (LEFT, RIGHT):
        (tmp_path / "a/gnd_made.json").unlink() if keys else write(tmp_path / "a", content(box))
        (tmp_path / "a/gnd_made.json").write_text(json.dumps(content(box)))
        keys.append(features_key(open_subject("pixels"), open_landmarks(str(tmp_path / "a")).queries, PLAIN))
    assert keys[0] != keys[1]


def test_layouts(tmp_path):
    plain = values(result(write(tmp_path / "plain", content(LEFT))))
    assert values(result(write(tmp_path / "loose", content(LEFT), "."))) == plain
    assert values(result(write(tmp_path / "deep", content(LEFT), "jpg/defense"))) == plain
    folder = write(tmp_path / "mixed", content(LEFT))
    (folder / "gnd_made.json").unlink()
    entry = {key: np.array(value) for key, value in content(LEFT)["gnd"][0].items()}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content(LEFT) | {"gnd": [entry]}))
    Image.open(folder / "jpg/g1.png").save(folder / "jpg/g1.bmp")
    (folder / "jpg/g1.png").unlink()
    (folder / "jpg/another.png").write_bytes(b"not asked for")
    assert values(result(folder)) == plain


def test_at_a_uri(tmp_path):
    local, there = write(tmp_path / "a", content(RIGHT)), in_memory()
    for file in sorted(local.rglob("*.*")):
        there.upload(file, str(file.relative_to(local)))
    assert values(result(there.uri)) == values(result(local))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_landmarks(str(folder))


def test_what_is_missing(tmp_path):
    refused(tmp_path / "none", r"There is no folder .*none: give that of roxford5k or rparis6k")
    folder = write(tmp_path / "a", content(LEFT))
    (folder / "jpg/g4.png").unlink()
    (folder / "jpg/q.png").rename(folder / "q.png")
    refused(folder, r"2 of the 7 images that gnd_made\.json names are not in .*jpg \(first: g4\)\. Unpack all")
    (folder / "gnd_other.pkl").write_bytes(b"")
    refused(folder, r"has 2 ground-truth files, gnd_made\.json, gnd_other\.pkl: keep one")
    for file in folder.glob("gnd*"):
        file.unlink()
    refused(folder, r"has no ground-truth file: put gnd_roxford5k\.pkl")


def test_what_is_wrong(tmp_path):
    folder = write(tmp_path / "a", content(LEFT))
    (folder / "jpg/g4.npy").write_bytes(b"")
    refused(folder, r"has g4 more than once: g4\.npy, g4\.png\. Keep the one that gnd_made\.json means")
    refused(
        write(tmp_path / "b", content([40, 0, 50, 9])), r"The box \(40, 0, 50, 9\) of the query .*q\.png has nothing of the image"
    )
    refused(write(tmp_path / "c", content([9, 9, 9.2, 20])), "has nothing of the image, which is 32 x 24 px")
    refused(write(tmp_path / "e", content([9, 20, 20, 9])), "has nothing of the image")
    refused(write(tmp_path / "d", content([1, 2, 3])), "a box has to be four numbers")


def test_features_that_are_no_numbers(tmp_path):
    landmarks, compute = open_landmarks(str(write(tmp_path / "a", content(LEFT)))), here(torch.device("cpu"))
    subject, data = open_subject("pixels"), DataSection()
    gallery, queries = (split_features(subject, each, data, compute)[0] for each in (landmarks.gallery, landmarks.queries))
    gallery.vectors[2] = np.nan
    with pytest.raises(UserError, match=r"1 of 6 gallery features are not finite, the first one of .*g2\.png"):
        landmark_result(gallery, queries, landmarks)
