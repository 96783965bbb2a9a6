"""Images in columns: Parquet files and saved Hugging Face data sets."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from massl_ray.data import tables
from massl_ray.data.sources import open_source
from massl_ray.data.tables import image_column, label_column, open_parquet
from massl_ray.errors import UserError
from massl_ray.storage import Folder
from tests.helpers import names
from tests.sources import encoded_images, write_parquet, write_saved

IMAGES = encoded_images(11)


def everything(images) -> list[bytes]:
    return [images.read(sample) for sample in range(len(images))]


def test_rows_of_several_files_and_row_groups(tmp_path):
    write_parquet(tmp_path / "b.parquet", IMAGES[7:], row_group=2)
    write_parquet(tmp_path / "a.parquet", IMAGES[:7], row_group=3)
    images = open_source(str(tmp_path))
    assert everything(images) == IMAGES and images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]  # each file begins anew
    assert names(images)[5:9] == ["a.parquet:5", "a.parquet:6", "b.parquet:0", "b.parquet:1"]
    assert everything(images.take(np.array([9, 0, 6]))) == [IMAGES[9], IMAGES[0], IMAGES[6]]


def test_row_groups_are_read_once_and_not_sent_along(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", IMAGES, row_group=4)
    images, read = open_source(f"{tmp_path}/a.parquet"), []
    whole = tables.pq.ParquetFile.read_row_group
    monkeypatch.setattr(tables.pq.ParquetFile, "read_row_group", lambda self, n, **k: read.append(n) or whole(self, n, **k))
    assert everything(images) == everything(images) == IMAGES and read == [0, 1, 2]
    sent = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 3000 and everything(sent) == IMAGES and read == [0, 1, 2, 0, 1, 2]


def test_hugging_face_names_its_classes(tmp_path):
    images = open_source(str(write_parquet(tmp_path / "a.parquet", IMAGES, hugging_face=True)))
    assert everything(images) == IMAGES
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1] * 5 + [0]


def test_a_row_may_only_point_to_a_file(tmp_path):
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    rows = [
        {"bytes": None, "path": "x.png"},
        {"bytes": None, "path": str(tmp_path / "x.png")},
        {"bytes": None, "path": None},
        {"bytes": IMAGES[1], "path": "gone.png"},
        None,
    ]
    pq.write_table(pa.table({"photo": rows}), tmp_path / "a.parquet")
    images = open_source(f"{tmp_path}/a.parquet")
    assert [images.read(0), images.read(1), images.read(3)] == [IMAGES[0], IMAGES[0], IMAGES[1]]
    for sample in (2, 4):
        with pytest.raises(ValueError, match="there is no image in this row"):
            images.read(sample)


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "sub/../../secret.png", "file:///etc/hostname"])
def test_a_row_does_not_lead_out_of_its_folder(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    (tmp_path / "table" / "sub").mkdir(parents=True)
    pq.write_table(pa.table({"photo": [{"bytes": None, "path": path}]}), tmp_path / "table/a.parquet")
    with pytest.raises(ValueError, match="lies outside the table's own folder and is not read"):
        open_source(f"{tmp_path}/table/a.parquet").read(0)


def schema(**kinds: pa.DataType) -> pa.Schema:
    return pa.schema(list(kinds.items()))


def test_which_column_holds_images():
    both = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert image_column(schema(id=pa.int64(), photo=pa.binary()), "x") == "photo"
    assert image_column(schema(mask=pa.large_binary(), image=both), "x") == "image"
    assert image_column(schema(jpg=pa.binary_view(), hash=pa.binary()), "x") == "jpg"
    with pytest.raises(UserError, match="x has several columns of bytes \\(a, b\\); its columns are a, b. Name the one"):
        image_column(schema(a=pa.binary(), b=pa.binary()), "x")
    with pytest.raises(UserError, match="x has no column of image bytes; its columns are path, size"):
        image_column(schema(path=pa.string(), size=pa.int64()), "x")


def test_which_column_holds_labels():
    assert label_column(schema(label=pa.int32(), target=pa.string())) == "label"
    assert label_column(schema(label=pa.float32(), cls=pa.dictionary(pa.int8(), pa.string()))) == "cls"
    assert label_column(schema(caption=pa.string())) is None


def test_no_labels_where_one_is_missing(tmp_path):
    pq.write_table(pa.table({"image": IMAGES[:3], "label": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert open_source(f"{tmp_path}/a.parquet").labels is None


def test_files_that_do_not_belong_together(tmp_path):
    write_parquet(tmp_path / "a.parquet", IMAGES[:2])
    pq.write_table(pa.table({"photo": IMAGES[:3]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet in .* has no column 'image', as a\.parquet has"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_broken_file_is_refused_by_name(tmp_path, keep):
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"data\.source: a\.parquet in .* is no whole Parquet file \(.+\)\. Mend or remove it\.$"):
        open_source(str(path))


def test_a_file_that_is_damaged_later_is_images_that_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    images = open_parquet(Folder(tmp_path), ["a.parquet"])
    path.write_bytes(b"PAR1")
    with pytest.raises((OSError, ValueError)):
        images.read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        images.read(0)


def test_saved(tmp_path):
    images = open_source(str(write_saved(tmp_path / "saved", IMAGES)))
    assert everything(images) == IMAGES and images.classes == ("cat", "dog")
    assert names(images)[4:6] == ["data-00000-of-00002.arrow:4", "data-00001-of-00002.arrow:0"]
    assert everything(pickle.loads(pickle.dumps(images))) == IMAGES and len(pickle.dumps(images.store)) < 2000


def test_saved_in_splits(tmp_path):
    for part, some in (("train", IMAGES[:6]), ("test", IMAGES[6:])):
        write_saved(tmp_path / "saved" / part, some)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert everything(open_source(str(tmp_path / "saved"))) == IMAGES[:6]
    assert everything(open_source(str(tmp_path / "saved"), "test")) == IMAGES[6:]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["all"]}')
    with pytest.raises(UserError, match="has no split 'train'. Give the folder of one: all"):
        open_source(str(tmp_path / "saved"))


def test_a_saved_file_that_is_cut_off(tmp_path):
    folder = write_saved(tmp_path / "saved", IMAGES)
    path = folder / "data-00001-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is no whole Arrow file"):
        open_source(str(folder))
