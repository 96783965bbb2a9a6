"""The revisited Oxford/Paris protocol: by hand, and its ground-truth file read without running it."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from massl_ray.errors import UserError
from massl_ray.evaluation.revisited import GroundTruth, read_ground_truth, revisited


def places(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def one_query(easy, hard, junk, images: int) -> GroundTruth:
    known = {"easy": places(*easy), "hard": places(*hard), "junk": places(*junk)}
    return GroundTruth([f"g{place}" for place in range(images)], ["q"], [known])


def fan(images: int) -> tuple[np.ndarray, np.ndarray]:
    """A gallery that the query sees in its own order."""
    turned = np.radians(np.arange(images) * 5.0)
    return np.stack([np.cos(turned), np.sin(turned)], axis=1), np.array([[2.0, 0.0]])


def test_by_hand():
    # ranking: 0 junk, 1 easy, 2 nothing, 3 hard, 4 nothing, 5 easy
    gallery, query = fan(6)
    figures = revisited(gallery, query, one_query((1, 5), (3,), (0,), 6), ks=(1, 2)).figures
    found = {name: figure.value for name, figure in figures.items()}
    # without junk. Easy: + - - +; medium: + - + - +; hard: - + -
    assert found["map_easy"] == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2)
    assert found["map_medium"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + (2 / 4 + 3 / 5) / 2) / 3)
    assert found["map_hard"] == pytest.approx((0 + 1 / 2) / 2)
    assert (found["mp_at_1_easy"], found["mp_at_2_easy"], found["mp_at_2_hard"]) == (1, 1 / 2, 1 / 2)
    assert next(iter(found)) == "map_medium"


def test_a_query_without_relevant_images_counts_not():
    gallery, query = fan(4)
    truth = one_query((0,), (), (1,), 4)
    both = GroundTruth(truth.gallery, ["q", "p"], [*truth.relevance, {"easy": places(2), "hard": places(3), "junk": places()}])
    result = revisited(gallery, np.concatenate([query, query]), both)
    assert result.parameters["queries_of_setup"] == {"medium": 2, "hard": 1, "easy": 2}
    # of p: hard is - - (0, 1), then 3, with 2 as junk
    assert result.figures["map_hard"].value == pytest.approx((0 + 1 / 3) / 2)
    with pytest.raises(UserError, match="no query of the ground truth has a relevant image"):
        revisited(gallery, query, one_query((), (), (1,), 4))
    with pytest.raises(UserError, match="3 gallery vectors for the 4 gallery images"):
        revisited(gallery[:3], query, truth)


CONTENT = {
    "imlist": ["all_souls_1", "all_souls_2", "oxford_3"],
    "qimlist": ["q_1"],
    "gnd": [{"bbx": [1.5, 2.0, 30.0, 40.0], "easy": [1], "hard": [0], "junk": []}],
}


def arrays(kind: str) -> dict:
    entry = CONTENT["gnd"][0]
    return CONTENT | {"gnd": [entry | {key: np.array(entry[key], dtype=kind) for key in ("easy", "hard", "junk")}]}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["int64", ">i4", "uint16", "float64"])
def test_reads_the_pickle(tmp_path, protocol, kind):
    file = tmp_path / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(arrays(kind), protocol))
    truth = read_ground_truth(file)
    assert (truth.gallery, truth.queries, truth.boxes) == (CONTENT["imlist"], ["q_1"], [[1.5, 2.0, 30.0, 40.0]])
    assert {key: found.tolist() for key, found in truth.relevance[0].items()} == {"easy": [1], "hard": [0], "junk": []}


def test_reads_json_and_scalars(tmp_path):
    file = tmp_path / "gnd.json"
    file.write_text(json.dumps(CONTENT))
    known = read_ground_truth(file).relevance[0]
    assert [known[key].tolist() for key in ("easy", "hard", "junk")] == [[1], [0], []]
    entry = CONTENT["gnd"][0] | {"easy": [np.int64(2), np.float32(1)]}
    (tmp_path / "scalars").write_bytes(pickle.dumps(CONTENT | {"gnd": [entry]}))
    assert read_ground_truth(tmp_path / "scalars").relevance[0]["easy"].tolist() == [2, 1]


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_runs_nothing_of_a_pickle(tmp_path):
    mark = tmp_path / "mark"
    for number, evil in enumerate((Evil(Path.touch, mark), Evil(eval, f"open({str(mark)!r}, 'w')"), Evil(np.save, mark, [1]))):
        file = tmp_path / f"{number}.pkl"
        file.write_bytes(pickle.dumps(CONTENT | {"evil": evil}))
        with pytest.raises(UserError, match="it asks for"):
            read_ground_truth(file)
    assert not list(tmp_path.glob("mark*"))
    (tmp_path / "dotted.pkl").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.")
    with pytest.raises(UserError, match="it asks for numpy.dtype.__init__"):
        read_ground_truth(tmp_path / "dotted.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x80\x04",
        b"{" + b"[" * 100_000,
        pickle.dumps([1]),
        pickle.dumps({"imlist": []}),
        pickle.dumps(CONTENT | {"gnd": []}),
        pickle.dumps(CONTENT | {"gnd": [{"easy": [3], "hard": [], "junk": []}]}),
        pickle.dumps(CONTENT | {"gnd": [{"easy": [-1], "hard": [], "junk": []}]}),
        pickle.dumps(CONTENT | {"gnd": [{"easy": [0.5], "hard": [], "junk": []}]}),
        pickle.dumps(CONTENT | {"gnd": [CONTENT["gnd"][0] | {"bbx": [1, 2, 3]}]}),
        pickle.dumps(CONTENT | {"gnd": [CONTENT["gnd"][0] | {"bbx": [1, 2, 3, np.nan]}]}),
        pickle.dumps(arrays("int64"))[:-9],
        pickle.dumps(np.array([{}], dtype=object)),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "gnd").write_bytes(content)
    with pytest.raises(UserError, match="no ground truth of the revisited Oxford/Paris benchmark"):
        read_ground_truth(tmp_path / "gnd")


def test_no_file_or_a_huge_one(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        read_ground_truth(tmp_path / "none")
    (tmp_path / "gnd").write_text(json.dumps(CONTENT))
    monkeypatch.setattr("massl_ray.evaluation.revisited.LARGEST", 100)
    with pytest.raises(UserError, match="too much for a ground-truth file"):
        read_ground_truth(tmp_path / "gnd")
