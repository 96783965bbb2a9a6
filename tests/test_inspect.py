"""massl-ray inspect: what a checkpoint holds, and whether it is whole."""

import json
import re

import pytest
import torch

from massl_ray import inspect
from massl_ray.storage import Folder
from massl_ray.training.checkpoint import MANIFEST, STATE, write_checkpoint
from massl_ray.training.state import state_sha256
from tests.storages import in_memory

FACTS = {
    "images_seen": 64_000,
    "knn_top1": 0.512,
    "config": {"run.seed": 0, "optim.weight_decay": 0.04},
    "versions": {"torch": "2.15.0", "python": "3.11.7"},
}


def tensors(step: int) -> dict[str, torch.Tensor]:
    weights = {name: torch.full((250, 1000), float(step)) for name in ("student/a", "student/b", "teacher/a")}
    return weights | {"memory/rows": torch.zeros(10, dtype=torch.bfloat16), "step": torch.tensor(step)}


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    """A run directory with checkpoints of steps 900 and 1000."""
    run = Folder(tmp_path / "run") if request.param == "local" else in_memory()
    for step in (900, 1000):
        write_checkpoint(run / "checkpoints", tensors(step), FACTS, keep=2)
    return run


def printed(run: Folder, step: int) -> str:
    return f"""\
{run}/checkpoints/step_{step}
  format        1
  step          {step:,}
  images seen   64,000
  knn top1      0.512
  state sha256  {state_sha256(tensors(step))}

config
  run.seed            0
  optim.weight_decay  0.04

versions
  torch   2.15.0
  python  3.11.7

tensors
  memory       1, 0.00 MB
  step         1, 0.00 MB
  student      2, 2.00 MB
  teacher      1, 1.00 MB
  all          5, 3.00 MB

The checkpoint is whole: its tensors have the state_sha256 of its manifest.
"""


@pytest.mark.parametrize(("below", "step"), [("checkpoints/step_900", 900), ("checkpoints", 1000), (".", 1000)])
def test_for_people(run, capsys, below, step):
    where = run if below == "." else run / below
    assert inspect.main([str(where)]) == 0
    assert capsys.readouterr() == (printed(run, step), "")


def test_for_programs(run, capsys):
    assert inspect.main([str(run), "--json"]) == 0
    expected = {"format": 1, "step": 1000, **FACTS, "state_sha256": state_sha256(tensors(1000)), "verified": True}
    assert json.loads(capsys.readouterr().out) == expected


def test_nothing_is_changed(run):
    before = run.files()
    inspect.main([str(run)])
    assert run.files() == before and len(before) == 4


def cut(folder: Folder, name: str) -> None:
    path = folder.path / name
    path.write_bytes(path.read_bytes()[:-9])


def flip(folder: Folder, name: str) -> None:
    path = folder.path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def other_hash(folder: Folder, name: str) -> None:
    path = folder.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state_sha256": "0" * 64}))


DAMAGES = [
    (cut, STATE, "cannot be read"),
    (flip, STATE, "does not have the state_sha256"),
    (Folder.delete, STATE, "cannot be read: .*No such file"),
    (cut, MANIFEST, "cannot be read"),
    (other_hash, MANIFEST, "does not have the state_sha256"),
    (Folder.delete, MANIFEST, "cannot be read: .*No such file"),
]


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGES, ids=[f"{damage.__name__}_{name}" for damage, name, _ in DAMAGES])
def test_damage_is_named(tmp_path, capsys, damage, name, words):
    for step in (900, 1000):
        checkpoint = write_checkpoint(tmp_path, tensors(step), FACTS, keep=2)
    damage(checkpoint, name)
    assert inspect.main([str(checkpoint), "--json"]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(f"massl-ray: The checkpoint is damaged: {tmp_path}/step_1000/") and line.endswith(".")
    assert re.search(words, line)


def test_of_a_run_the_latest_is_meant_also_when_it_is_damaged(run, capsys):
    (run / "checkpoints" / "step_1000").write_text(STATE, "")
    assert inspect.main([str(run)]) == 1
    assert f"{run}/checkpoints/step_1000/{STATE} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "empty", "memory://nowhere/run"])
def test_no_checkpoint(tmp_path, capsys, what):
    (tmp_path / "empty").mkdir()
    where = what if "://" in what else f"{tmp_path}/{what}"
    assert inspect.main([where]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        f"massl-ray: There is no checkpoint at {where}. Give a step_N folder, or a run directory that has one.\n",
    )


def test_a_place_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    for where in (str(tmp_path / "file"), "nosuch://host/run"):
        assert inspect.main([where]) == 2
        assert capsys.readouterr().err.startswith(f"massl-ray: {where} cannot be read: ")


def test_without_an_argument(capsys):
    with pytest.raises(SystemExit) as ended:
        inspect.main([])
    assert ended.value.code == 2 and "usage: massl-ray inspect" in capsys.readouterr().err
