"""massl-ray embed: what is in the files, without a cluster and through a real one."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from massl_ray.data.decode import PLAIN
from massl_ray.data.sources import open_source
from massl_ray.embed import main
from massl_ray.evaluation import embedding
from massl_ray.evaluation.embedding import SETTINGS, SKIPPED, begin, decode, embed, finish, part_name, plan_embedding, write_part
from massl_ray.evaluation.features import backbone_features
from massl_ray.evaluation.subjects import open_subject
from massl_ray.storage import Folder
from tests.images import write_images
from tests.storages import in_memory
from tests.test_export import make_run
from tests.test_train import plain_environment

CPU = torch.device("cpu")
BROKEN = "ramps/0003.png"


@pytest.fixture
def run(tmp_path):
    """A run whose checkpoint was not trained, and 20 images of which one is broken."""
    config, state = make_run(tmp_path / "run")
    source = write_images(tmp_path / "images", 20)
    (source / BROKEN).write_bytes(b"no image")
    return tmp_path, config, state, open_source(str(source))


def make(folder, run: Path, images, tokens="pooled", dtype="float32", batch=4):
    """Without Ray. Returns the plan and the list of skipped images."""
    subject = open_subject(str(run))
    plan = plan_embedding(subject, images, PLAIN, tokens, dtype, batch)
    for part in begin(Folder(folder), plan):
        numbers = plan.batches_of(part)
        batches = (embed(subject, plan, decode(subject, images, PLAIN, plan.samples(number))) for number in numbers)
        amounts = list(write_part(Folder(folder), plan, part, images, batches))
        assert amounts == [len(plan.samples(number)) for number in numbers]
    return plan, finish(Folder(folder), plan)


def vectors(table, plan) -> np.ndarray:
    return table["vector"].combine_chunks().values.to_numpy(zero_copy_only=False).reshape(-1, *plan.shape)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("[!.]*")}


def test_values_labels_and_order(run, monkeypatch):
    """Those of the plain loop, in the order of the listing, over several parts; the folder is read as one table."""
    folder, config, state, images = run
    monkeypatch.setattr(embedding, "PART_ROWS", 8)
    plan, skipped = make(folder / "out", folder / "run", images)
    expected = backbone_features(state.teacher.backbone, images, config, CPU)
    table = pq.read_table(folder / "out")
    assert plan.parts == 3 and plan.rows == 8 and table.schema.names == ["path", "label", "vector"]
    assert table["path"].to_pylist() == [images.path(int(sample)) for sample in expected.samples]
    assert table["label"].to_pylist() == [Path(path).parent.name for path in table["path"].to_pylist()]
    np.testing.assert_allclose(vectors(table, plan), expected.rows.numpy(), atol=1e-5)
    assert str(table.schema.field("vector").type) == f"fixed_size_list<element: float>[{expected.rows.shape[1]}]"
    (line,) = (folder / "out" / SKIPPED).read_text().splitlines()
    assert json.loads(line) == {"image": skipped[0]} and skipped[0].startswith(f"{images.root}/{BROKEN}: UnidentifiedImageError")


def test_float16(run):
    folder, config, state, images = run
    plan, _ = make(folder / "out", folder / "run", images, dtype="float16")
    expected = backbone_features(state.teacher.backbone, images, config, CPU).rows
    found = vectors(pq.read_table(folder / "out"), plan)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_class_and_patch_tokens(run):
    folder, _, state, images = run
    subject, backbone = open_subject(str(folder / "run")), state.teacher.backbone.eval()
    good = np.array([sample for sample in range(len(images)) if BROKEN not in images.path(sample)])
    views = decode(subject, images, PLAIN, good.tolist()).views
    with torch.inference_mode():
        expected = backbone.forward_features(subject.normalized(torch.from_numpy(views)))
    for tokens, part, shape in (("class", expected[:, 0], (64,)), ("patch", expected[:, 1:], (2, 2, 64))):
        plan, _ = make(folder / tokens, folder / "run", images, tokens)
        assert plan.shape == shape
        found = vectors(pq.read_table(folder / tokens), plan)
        np.testing.assert_allclose(found.reshape(part.shape), part.numpy(), atol=1e-5)
        (name,) = {file.name for file in (folder / tokens).glob("*.parquet")}
        assert json.loads(pq.read_metadata(folder / tokens / name).metadata[b"shape"]) == list(shape)


def test_patch_tokens_of_a_conv_net(tmp_path):
    make_run(tmp_path / "run", "--model.backbone", "test_byobnet", "--views.global_size", "64")
    images = open_source(str(write_images(tmp_path / "images", 3)))
    plan, _ = make(tmp_path / "out", tmp_path / "run", images, "patch")
    pooled, _ = make(tmp_path / "pooled", tmp_path / "run", images)
    maps = vectors(pq.read_table(tmp_path / "out"), plan)
    np.testing.assert_allclose(maps.mean((1, 2)), vectors(pq.read_table(tmp_path / "pooled"), pooled), atol=1e-5)


@pytest.mark.parametrize("tokens", ["class", "patch"])
def test_tokens_that_there_are_not(tmp_path, capsys, tokens):
    write_images(tmp_path / "images", 4)
    assert main(["pixels", str(tmp_path / "images"), str(tmp_path / "out"), "--tokens", tokens]) == 2
    err = capsys.readouterr().err
    assert err == f"massl-ray: --tokens {tokens} are not to be had of pixels: it gives one vector an image and nothing else.\n"


def test_only_what_is_missing_is_made_again(run, monkeypatch):
    folder, _, _, images = run
    monkeypatch.setattr(embedding, "PART_ROWS", 8)
    make(folder / "out", folder / "run", images)
    before, written = hashes(folder / "out"), (folder / "out" / part_name(0)).stat().st_mtime_ns
    for name in (part_name(1), SKIPPED):
        (folder / "out" / name).unlink()
    (folder / "out" / f".{part_name(1)}.0123abcd").write_bytes(b"what a kill leaves")
    make(folder / "out", folder / "run", images)
    assert hashes(folder / "out") == before and (folder / "out" / part_name(0)).stat().st_mtime_ns == written


def test_a_part_whose_images_are_all_broken(tmp_path):
    make_run(tmp_path / "run")
    source = write_images(tmp_path / "images", 2)
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    plan, skipped = make(tmp_path / "out", tmp_path / "run", open_source(str(source)))
    table = pq.read_table(tmp_path / "out")
    assert len(skipped) == 2 and table.num_rows == 0 and table.schema.names[-1] == "vector"


def test_to_a_uri(run):
    folder, _, _, images = run
    there = in_memory()
    make(there, folder / "run", images)
    assert there.entries() == [SETTINGS, SKIPPED, part_name(0)]
    make(folder / "out", folder / "run", images)
    assert there.read_bytes(part_name(0)) == (folder / "out" / part_name(0)).read_bytes()


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("massl-ray: ") and err.count("\n") == 1
    return err


def test_mistakes(run, capsys):
    folder, _, _, images = run
    source, out = folder / "images", folder / "out"
    make(out, folder / "run", images)
    most = ["--data.max_skipped", "0.5"]
    most += ["--batch", "4"]
    assert "other embeddings: dtype differ" in refused(capsys, folder / "run", source, out, *most, "--dtype", "float16")
    assert "holds something else" in refused(capsys, folder / "run", source, folder / "images", *most)
    assert "1 of the 20 images" in refused(capsys, folder / "run", source, folder / "new", "--data.max_skipped", "0.01")
    assert "no folder or file" in refused(capsys, folder / "run", folder / "nowhere", out)
    assert "embed takes no --optim.lr" in refused(capsys, folder / "run", source, out, "--optim.lr", "1")
    assert "no timm model" in refused(capsys, "test_vitt", source, out)
    (out / SETTINGS).write_text("{")
    assert "is damaged" in refused(capsys, folder / "run", source, out, *most)
    assert not (folder / "new").exists()


# ---- on Ray ----------------------------------------------------------------------------------------------------------


def test_decoded_apart_as_beside_gpus(run):
    """Tasks decode, an actor embeds: the blocks between them have all that the actor needs."""
    from ray.data.block import BlockAccessor

    from massl_ray.on_ray.embed import Decoder, Embedder, Shared

    folder, _, _, images = run
    subject = open_subject(str(folder / "run"))
    plan = plan_embedding(subject, images, PLAIN, "pooled", "float16", 4)
    shared = Shared(None, None, None, plan)
    shared.held = (subject, images, np.array([4, 0, 2]))
    rows = {"id": np.arange(2)}
    blocks = [BlockAccessor.batch_to_block(row) for row in Decoder(shared, 1)(rows)]
    apart = [row for block in blocks for row in Embedder(shared, 1, False)(BlockAccessor.for_block(block).to_numpy())]
    together = list(Embedder(shared, 1, False)(rows))
    expected = [embed(subject, plan, decode(subject, images, PLAIN, plan.samples(number))) for number in (0, 2)]
    for found in (apart, together):
        assert [row["values"][0] for row in found] == [batch.vectors.tobytes() for batch in expected]
        assert [row["samples"][0] for row in found] == [batch.samples.tobytes() for batch in expected]
        assert ["".join(row["skipped"]) for row in found] == ["".join(batch.skipped) for batch in expected]
    assert sum(len(batch.skipped) for batch in expected) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster_as_without_one(ray_cluster, run, monkeypatch):
    """Actors on four CPUs, several datasets one after the other: the same files."""
    from massl_ray.on_ray import embed as on_ray

    folder, _, _, images = run
    monkeypatch.setattr(embedding, "PART_ROWS", 8)
    monkeypatch.setattr(on_ray, "DATASET_BATCHES", 6)
    make(folder / "alone", folder / "run", images, batch=2)
    subject, out = open_subject(str(folder / "run")), Folder(folder / "out")
    plan = plan_embedding(subject, images, PLAIN, "pooled", "float32", 2)
    amounts = list(on_ray.embed_parts(subject, images, out, plan, begin(out, plan)))
    finish(out, plan)
    assert amounts == [0] + [2] * 10
    assert hashes(folder / "out") == hashes(folder / "alone")


def command(run: Path, source: Path, dest: Path) -> list[str]:
    flags = ["--batch", "8", "--data.max_skipped", "0.5"]
    return [sys.executable, "-m", "massl_ray.embed", str(run), str(source), str(dest), *flags]


def done(*arguments: Path) -> str:
    found = subprocess.run(command(*arguments), capture_output=True, text=True, env=plain_environment())
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    """Killed in the middle, which nothing survives but what is on the disk; the result is that of a run that was not."""
    make_run(tmp_path / "run")
    source = write_images(tmp_path / "images", 64)
    paths = sorted(str(path) for path in source.rglob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(paths * 100))
    (source / "ramps" / "0000.png").write_bytes(b"")
    listed, whole, out = tmp_path / "list.txt", tmp_path / "whole", tmp_path / "out"
    printed = done(tmp_path / "run", listed, whole)
    assert "Vectors   6,300 of 64 float32, pooled" in printed and "Skipped   100, listed in" in printed
    started = subprocess.Popen(
        command(tmp_path / "run", listed, out), env=plain_environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait(60)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 0 < len(kept) < 4 and not (out / SKIPPED).exists()
    done(tmp_path / "run", listed, out)
    assert hashes(out) == hashes(whole) and len(hashes(out)) == 6
    assert all((out / name).stat().st_mtime_ns == written for name, written in kept.items())
    assert done(tmp_path / "run", listed, out).startswith("All embeddings of ")
