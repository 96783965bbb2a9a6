"""What others give us is read, never run: a pickle that would leave a mark is planted wherever something is read from."""

import io
import json
import pickle
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import massl_ray
from massl_ray.config.space import Sweep, base_of
from massl_ray.data.cache import mapped
from massl_ray.data.decode import PLAIN, UNREADABLE, Decoding, Encoded
from massl_ray.data.demo import cache_folder
from massl_ray.data.preparing import begin, do_part, finish
from massl_ray.data.sources import fault, open_source
from massl_ray.errors import UserError
from massl_ray.inspect import main as inspect
from massl_ray.method.network import load_weights
from massl_ray.report import main as report
from massl_ray.reporting.console import Console
from massl_ray.reporting.html import write_report
from massl_ray.reporting.skipped import SkippedImages
from massl_ray.shown import in_a_line
from massl_ray.storage import Folder
from massl_ray.sweep import main as sweep
from massl_ray.sweeping.results import write_results
from massl_ray.sweeping.table import SweepTable
from massl_ray.sweeping.trials import Outcome, Trial, folder_of, write_outcome
from massl_ray.training.checkpoint import Damaged, list_checkpoints, read_checkpoint, read_latest, read_manifest, write_checkpoint
from massl_ray.training.run import prepare_run
from tests.helpers import metrics_line, tiny_run
from tests.images import TINY, write_images
from tests.sources import add, encoded_images, table, write_folder, write_parquet, write_saved
from tests.test_html import Page

IMAGES = encoded_images(6)
DEEP = "[" * 100_000  # json gives up on it with an error of its own


class Evil:
    """Once unpickled it has left a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(tmp_path):
    """The object; whatever a test does with it, there is no mark in the end."""
    import ray.data._internal.object_extensions.arrow  # noqa: F401 - where Ray Data is, its types are known to Arrow

    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would work
    mark.unlink()
    yield Evil(mark)
    assert not mark.exists()


@pytest.fixture
def pickled(evil) -> bytes:
    return pickle.dumps(evil)


def readable(source: Path | str, how: Decoding = PLAIN) -> list[bool]:
    """Which images of a source can be read; the others are passed over with a reason."""
    images = open_source(str(source))
    return [fault(images, sample, how) is None for sample in range(len(images))]


# ---- weights and checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path, evil: torch.save({"weight": evil}, path),
        lambda path, evil: torch.save({"weight": torch.ones(1, 1), "bias": torch.ones(1), "more": evil}, path),
        lambda path, evil: torch.save(evil, path, _use_new_zipfile_serialization=False),
        lambda path, evil: path.write_bytes(pickle.dumps(evil)),
        lambda path, evil: path.write_bytes(pickle.dumps(evil, protocol=2)),
    ],
    ids=["zip", "beside weights", "legacy", "plain", "plain 2"],
)
def test_weights(evil, tmp_path, name, write):
    write(tmp_path / name, evil)
    with pytest.raises(UserError, match=r"model\.init: the weights file .* cannot be read") as refused:
        load_weights(torch.nn.Linear(1, 1), tmp_path / name)
    assert "weights_only" not in str(refused.value) and "\\n" not in str(refused.value)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", {"step": torch.tensor(step)}, {"images_seen": step}, keep=9)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_checkpoints(pickled, checkpoints, name):
    (checkpoints / "step_2" / name).write_bytes(pickled)
    with pytest.raises(Damaged, match=f"{name} cannot be read"):
        read_checkpoint(checkpoints / "step_2")
    with pytest.warns(UserWarning, match="passed over"):
        found = read_latest(checkpoints)
    assert found and int(found[0]["step"]) == 1


def test_a_manifest_that_is_too_deep(checkpoints):
    (checkpoints / "step_2" / "manifest.json").write_text(DEEP)
    with pytest.raises(Damaged, match="manifest.json cannot be read"):
        read_manifest(checkpoints / "step_2")


def test_a_state_cannot_bring_code_along_in_its_header(evil, checkpoints):
    """safetensors has a place for words of one's own: nobody reads them."""
    save_file({"step": torch.tensor(2)}, checkpoints / "step_2" / "state.safetensors", {"x": pickle.dumps(evil, 0).decode()})
    assert int(read_checkpoint(checkpoints / "step_2")[0]["step"]) == 2


# ---- images ----------------------------------------------------------------------------------------------------------


def object_array(evil) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.full((8, 8, 3), evil, dtype=object))
    return buffer.getvalue()


def test_arrays(evil, tmp_path):
    """One of objects is no image; nor is a pickle that calls itself an array or a picture."""
    for hostile in (object_array(evil), pickle.dumps(evil), b"\x93NUMPY\x01\x00" + pickle.dumps(evil)):
        for channels in (1, 3, 5):
            with pytest.raises(UNREADABLE):
                Encoded(hostile, Decoding(channels=channels)).pixels()
    folder = write_folder(tmp_path / "images", IMAGES)
    for kind in ("npy", "png", "jpg", "tif", "gif", "bmp", "webp"):
        (folder / "cat" / f"evil.{kind}").write_bytes(object_array(evil) if kind == "npy" else pickle.dumps(evil))
    assert sorted(readable(folder)) == [False] * 7 + [True] * 6
    (folder / "cat" / "evil.pkl").write_bytes(pickle.dumps(evil))
    torch.save(evil, folder / "cat" / "evil.pth")
    assert len(open_source(str(folder))) == 13


def test_members_of_archives(evil, pickled, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, image in enumerate(IMAGES):
            for kind, data in (("pkl", pickled), ("pickle", pickled), ("pth", pickled), ("pyd", pickled), ("cls", pickled)):
                add(tar, f"{number}.{kind}", data)
            add(tar, f"{number}.{'npy' if number else 'png'}", object_array(evil) if number else image)
    assert readable(tmp_path / "images.tar") == [True] + [False] * 5
    (tmp_path / "evil.tar").write_bytes(pickled)
    with pytest.raises(UserError, match="evil.tar in .* is no plain tar file"):
        open_source(str(tmp_path / "evil.tar"))


def test_a_list_of_paths(pickled, tmp_path):
    (tmp_path / "list.txt").write_bytes(pickled)
    with pytest.raises(UserError, match="neither a folder nor a text file"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "evil.png").write_bytes(pickled)
    (tmp_path / "other.txt").write_text("evil.png\nevil.pkl\n")
    (tmp_path / "evil.pkl").write_bytes(pickled)
    assert readable(tmp_path / "other.txt") == [False, False]


# ---- tables ----------------------------------------------------------------------------------------------------------


def unpickled_by_ray(values: list[bytes]) -> pa.Array:
    """A column of Ray Data's type of Python objects: whoever looks at a value unpickles it."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pa.array(values, pa.large_binary()))


def in_rows(column: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([column, pa.array(["x.png"] * len(column))], ["bytes", "path"])


def columns(evil) -> dict[str, pa.Table]:
    """Tables that hold no images, though their columns are called so."""
    hostile = unpickled_by_ray([pickle.dumps(evil)] * 6)
    labels = pa.array(["cat", "dog"] * 3)
    return {
        "plain": pa.table({"image": hostile, "label": labels}),
        "rows": pa.table({"image": in_rows(hostile), "label": labels}),
        "labels": pa.table({"image": IMAGES, "label": hostile}),
    }


def test_the_columns_are_ones_that_would_run(evil, tmp_path):
    """Else what follows would show nothing."""
    for name, column in (("plain", "image"), ("rows", "image"), ("labels", "label")):
        pq.write_table(columns(evil)[name], tmp_path / "a.parquet")
        pq.read_table(tmp_path / "a.parquet").column(column)[0].as_py()
        assert evil.mark.exists(), name
        evil.mark.unlink()


@pytest.mark.parametrize("kind", ["plain", "rows", "labels", "bytes"])
def test_parquet(evil, pickled, tmp_path, kind):
    """As the only file, and beside others that are as they should be."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "both").mkdir()
    hostile = pa.table({"image": [pickled] * 6}) if kind == "bytes" else columns(evil)[kind]
    pq.write_table(hostile, tmp_path / "alone" / "a.parquet")
    pq.write_table(hostile, tmp_path / "both" / "b.parquet")
    write_parquet(tmp_path / "both" / "a.parquet", IMAGES, hugging_face=kind == "rows")
    if kind in ("plain", "rows"):
        with pytest.raises(UserError, match="no column of image bytes"):
            open_source(str(tmp_path / "alone"))
        with pytest.raises(UserError, match="b.parquet in .* has no column 'image'"):
            open_source(str(tmp_path / "both"))
    else:
        assert readable(tmp_path / "alone") == [kind == "labels"] * 6
        assert readable(tmp_path / "both") == [True] * 6 + [kind == "labels"] * 6
        assert kind == "bytes" or open_source(str(tmp_path / "both")).labels is None
    (tmp_path / "evil.parquet").write_bytes(pickled)
    with pytest.raises(UserError, match="no whole Parquet file"):
        open_source(str(tmp_path / "evil.parquet"))


def write_stream(path: Path, hostile: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, hostile.schema) as writer:
        writer.write_table(hostile)


@pytest.mark.parametrize("kind", ["plain", "rows", "labels"])
@pytest.mark.parametrize("number", [0, 1])
def test_saved_data_sets(evil, pickled, tmp_path, kind, number):
    folder = write_saved(tmp_path / "saved", IMAGES)
    name = f"data-{number:05d}-of-00002.arrow"
    hostile = columns(evil)[kind]
    if kind == "labels":
        hostile = hostile.set_column(0, "image", table(IMAGES, hugging_face=True).column("image"))
    write_stream(folder / name, hostile)
    if kind == "labels":
        assert all(readable(folder)) and open_source(str(folder)).labels is None
    else:
        with pytest.raises(UserError, match="no column of image bytes" if number == 0 else "has no column 'image'"):
            open_source(str(folder))
    (folder / name).write_bytes(pickled)
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_that_says_it_with_a_pickle(pickled, tmp_path, name):
    folder = write_saved(tmp_path / "saved", IMAGES)
    for content in (pickled, DEEP.encode(), b"{}", b"[1]"):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.* is damaged"):
            open_source(str(folder))


# ---- prepared images -------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    images, folder = open_source(str(write_folder(tmp_path / "images", IMAGES))), tmp_path / "shards"
    plan = begin(images, Folder(folder), None, 64)
    assert plan
    do_part(images, Folder(folder), plan, 0)
    finish(images, Folder(folder), plan)
    return folder


def write_file(path: Path, hostile: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, hostile.schema) as writer:
        writer.write_table(hostile)


def test_shards(evil, pickled, shards):
    whole = pa.ipc.open_file(shards / "shard-00000.arrow").read_all()
    hostile = whole.set_column(0, "image", unpickled_by_ray([pickled] * 6))
    write_file(shards / "shard-00000.arrow", hostile)
    assert readable(shards) == [False] * 6
    (shards / "shard-00000.arrow").write_bytes(pickled)
    assert readable(shards) == [False] * 6
    write_file(shards / "shard-00000.arrow", whole.set_column(0, "image", pa.array([pickled] * 6, pa.large_binary())))
    assert readable(shards) == [False] * 6
    write_file(shards / "shard-00000.arrow", whole)
    assert readable(shards) == [True] * 6


def test_a_shard_that_points_beyond_itself(shards):
    """An image of it is said to lie where this process keeps other things, or nothing at all."""
    path = shards / "shard-00000.arrow"
    offsets = pa.ipc.open_file(path).read_all().column("image").chunk(0).buffers()[1].to_pybytes()[: 8 * 7]
    bent = np.frombuffer(offsets, np.int64).copy()
    bent[3] += 1 << 40
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, bent.tobytes()))
    assert readable(shards) == [False] * 6


@pytest.mark.parametrize("name", ["manifest.json", "index.arrow"])
def test_what_shards_say_about_themselves(evil, pickled, shards, name):
    def manifest(**changes) -> None:
        (shards / "manifest.json").write_text(json.dumps(json.loads(whole) | changes))

    whole = (shards / "manifest.json").read_text()
    if name == "manifest.json":
        for content in (pickled, DEEP.encode(), b"[]", b"{}"):
            (shards / name).write_bytes(content)
            with pytest.raises(UserError, match="manifest.json is damaged"):
                open_source(str(shards))
        for sha256 in ("../../evil", "", "a" * 63 + "/", None):
            manifest(shards=[{"name": "shard-00000.arrow", "count": 6, "size": 1, "sha256": sha256}])
            with pytest.raises(UserError, match="manifest.json is damaged"):
                open_source(str(shards))
        return
    from massl_ray.data.cache import hash_of

    index = pa.ipc.open_file(shards / name).read_all()
    for column in (0, 1):
        write_file(shards / name, index.set_column(column, index.schema.names[column], unpickled_by_ray([pickled] * 6)))
        manifest(index_sha256=hash_of(shards / name))
        with pytest.raises(UserError, match="manifest.json is damaged"):
            open_source(str(shards))
    (shards / name).write_bytes(pickled)
    manifest(index_sha256=hash_of(shards / name))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        open_source(str(shards))


def test_copies_of_remote_shards(pickled, shards, tmp_path, monkeypatch):
    """A copy is trusted to be what it is called, not to be harmless."""
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    remote = Folder("memory://untrusted/shards")
    for name in Folder(shards).files():
        remote.upload(shards / name, name)
    (shard,) = json.loads((shards / "manifest.json").read_text())["shards"]
    copy = cache_folder() / "shards" / f"{shard['sha256']}.arrow"
    assert readable(str(remote)) == [True] * 6 and copy.exists()
    copy.write_bytes(pickled)
    assert readable(str(remote)) == [False] * 6
    remote.write_text("shard-00000.arrow", "another one")
    copy.unlink()
    with pytest.raises(OSError, match="does not have the sha256 of its manifest"):
        mapped(remote, "shard-00000.arrow", shard["sha256"], 1 << 30)


# ---- directories of runs and sweeps ----------------------------------------------------------------------------------


def test_a_run_directory(pickled, tmp_path):
    """Of which somebody has exchanged the files: continuing it, and its report, say so."""
    from massl_ray.config import load

    source = write_images(tmp_path / "images", 12)
    run = tiny_run(source, tmp_path / "run")
    again = load([*TINY, "--data.source", str(source), "--run.dir", str(run.dir)])
    for name in ("config.toml", "images.json"):
        whole = (run.dir / name).read_bytes()
        for content in (pickled, DEEP.encode()):
            (run.dir / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name} is (damaged|not valid TOML)"):
                prepare_run(again)
        (run.dir / name).write_bytes(whole)
    prepare_run(again)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "eval/knn_pixels.json", "eval/neighbours.json", "views.png"])
def test_a_report(pickled, tmp_path, name, capsys):
    run = tiny_run(write_images(tmp_path / "images", 12), tmp_path / "run")
    for content in (pickled, DEEP.encode(), b"[1]", b"{}"):
        (run.dir / name).write_bytes(content)
        code = report([str(run.dir)])
        words = capsys.readouterr().err
        assert code == 0 or (code == 2 and words.startswith("massl-ray: ") and words.count("\n") == 1), words


SPEC = '[sweep]\nmetric = "loss"\n[settings.train]\nsteps = 2\n[space]\n"loss.student_temp" = {choice = [0.1]}\n'


@pytest.mark.parametrize("name", ["sweep.toml", "base.toml"])
def test_a_sweeps_settings(pickled, tmp_path, name, capsys):
    for other in ("sweep.toml", "base.toml"):
        (tmp_path / other).write_text(SPEC if other == "sweep.toml" else "")
    (tmp_path / name).write_bytes(pickled)
    assert sweep(["--resume", str(tmp_path)]) == 2
    words = capsys.readouterr().err
    assert f"{name} is not valid TOML" in words and words.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_goes_on_from_nothing_that_is_pickled(evil, pickled, tmp_path):
    """Ray Tune leaves pickles of its own behind; what is in them is not looked at again."""
    from tests.test_sweep import whole

    names = ["tuner.pkl", "trainable.pkl", "param_space.pkl", "searcher-state-x.pkl", "scheduler-state-x.pkl"]
    names += ["search_gen_state-x.json", "experiment_state-x.json"]
    root = tmp_path / "sweep"
    tune = root / ".tune" / "tune"
    tune.mkdir(parents=True)
    for name in names:
        (tune / name).write_bytes(pickled)
    (tmp_path / "spec.toml").write_text(SPEC)
    source = write_images(tmp_path / "images", 12)
    whole(str(tmp_path / "spec.toml"), *TINY[2:], "--data.source", str(source), "--run.dir", str(root))
    assert len(list((root / "trials").glob("*/trial.json"))) == 1
    left = {re.sub(r"-20\d\d-[\d_-]*\d", "-x", path.name) for path in tune.iterdir() if path.is_file()}
    assert left - set(names) == {".validate_storage_marker"}  # those that Tune leaves were there before


# ---- what is shown ---------------------------------------------------------------------------------------------------

RED, TURNED = "\x1b[31m\x1b]0;title\x07 [/red] $\\frac$ <b>", "cat\u202egnp.exe\u2066\x00"


def test_a_report_cannot_be_turned_round(tmp_path):
    """Characters that change the direction of what follows, or are none, are spelled out."""
    run = tiny_run(write_images(tmp_path / "images", 12), tmp_path / "run")
    near = {"path": f"/photos/{TURNED}.png", "class": TURNED, "similarity": 0.5, "picture": None}
    (run.dir / "eval" / "neighbours.json").write_text(json.dumps([near | {"neighbours": [near]}]))
    page = Page(write_report(run.dir))
    assert r"cat\u202egnp.exe\u2066\u0000" in page.source
    assert not set("\u202e\u2066\x00\x1b") & set(page.source)


@pytest.mark.parametrize("name", [RED, TURNED, "$x_", "<script>alert(1)</script>", "'><img src=x onerror=alert(1)>"])
def test_a_sweeps_page_and_tables(tmp_path, name, capsys):
    """Of settings and causes that are hostile: they stay text, on the page, in its charts and on a terminal."""
    spec = Sweep(space={"model.backbone": {"choice": [name, "b"]}, "memory.size": {"choice": [64, 128]}})  # type: ignore[dict-item]
    trials = []
    for number, point in enumerate({"model.backbone": one, "memory.size": size} for one in (name, "b") for size in (64, 128)):
        trial = Trial(f"{number}-seed-0", point, 0)
        (folder_of(tmp_path, trial) / "eval").mkdir(parents=True)
        (folder_of(tmp_path, trial) / "metrics.jsonl").write_text(json.dumps(metrics_line(10)) + "\n")
        record = {"features": "step_10", "step": 10, "top1": number / 5}
        (folder_of(tmp_path, trial) / "eval" / "knn_step_10.json").write_text(json.dumps(record))
        trials.append(trial)
    with SweepTable(tmp_path, trials, "knn") as _:
        for trial in trials:
            write_outcome(tmp_path, trial, Outcome("finished" if trial.name[0] != "0" else "failed", 1.0, name))
    told = capsys.readouterr().out
    assert told.count("\n") == 4 and all(c.isprintable() or c == "\n" for c in told) and in_a_line(name) in told

    write_results(tmp_path, spec, base_of(spec), trials)
    page = Page(tmp_path / "report.html")
    assert not {"script", "svg"} & {tag for tag, _ in page.tags}
    assert {attribute for _, attributes in page.tags for attribute in attributes} <= {
        "lang", "charset", "name", "content", "class", "alt", "src", "href"
    }  # fmt: skip
    assert not set("\u202e\u2066\x00\x1b") & set(page.source)
    for name, picture in page.images().items():
        assert all(not element.tag.endswith("script") for element in ElementTree.fromstring(picture).iter()), name


def test_a_terminal_is_not_commanded_by_names(tmp_path, capsys):
    """Of images, folders and classes; also in what workers say when they fail."""
    source, run_dir = tmp_path / f"images{RED.replace('/', '')}", tmp_path / f"run{RED.replace('/', '')}"
    write_images(source, 12)
    (source / f"{RED.replace('/', '')}.png").write_bytes(b"no image")
    run = tiny_run(source, run_dir, "--data.max_skipped", "0.5")
    console = Console(run, SkippedImages(run.dir))
    console.plan()
    for event in (
        {"kind": "skipped", "images": [f"{run.images.path(0)}: {RED}"]},
        {"kind": "note", "text": f"{run.folder} is full: {RED}"},
        {"kind": "failure", "text": f"Worker 0: OSError: {RED}\nsecond line {TURNED}"},
    ):
        console.follow(event)
    told = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in told) and r"\x1b[31m" in told
    assert "\nsecond line cat" in told  # lines that we made ourselves are lines
    with pytest.raises(UserError) as refused:
        tiny_run(source, tmp_path / "other", "--data.max_skipped", "0.01")
    assert str(refused.value).isprintable()


def test_a_manifest_does_not_command_a_terminal(checkpoints, capsys):
    path = checkpoints / "step_2" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images_seen": RED, TURNED: {RED: TURNED}}))
    assert inspect([str(checkpoints / "step_2")]) == 0
    told = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in told) and r"\x1b[31m" in told


# ---- and as a whole --------------------------------------------------------------------------------------------------


def test_nothing_of_ours_unpickles(tmp_path):
    """pickle and its kin are not even named where files are read; but for the unpickler that lets only numbers through."""
    words = ("pickle.load", "cloudpickle", "joblib", "allow_pickle=True", "weights_only=False", "yaml.load(", "Unpickler)")
    for path in Path(massl_ray.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            run = any(word in line for word in words) or re.search(r"(?<![\w.])(eval|exec)\(", line)
            assert not run or "class _Plain(pickle.Unpickler)" in line, f"{path}:{number}: {line}"


def test_checkpoints_are_found_by_name_alone(tmp_path):
    """A folder that is called otherwise is no checkpoint, wherever its name leads."""
    for name in ("step_1/../../x", "step_", "step_01", "step_1.pkl", "step_-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
    assert [path for path in list_checkpoints(tmp_path / "checkpoints") if path.name != "step_1"] == []
