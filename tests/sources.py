"""The same few images in every kind of source, as tests need them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("cat", "dog")


def encoded_images(number: int, side: int = 40) -> list[bytes]:
    """PNG files, no two alike."""
    random = np.random.default_rng(3)
    images = []
    for _ in range(number):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


def write_folder(folder: Path, images: Sequence[bytes]) -> Path:
    """Class folders, alternating."""
    for number, image in enumerate(images):
        path = folder / NAMES[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder


def write_list(path: Path, images: Sequence[bytes]) -> Path:
    """A list of paths with labels, beside a folder of the files."""
    write_folder(path.parent / "listed", images)
    lines = [f"listed/{NAMES[number % 2]}/{number:03d}.png\t{NAMES[number % 2]}\n" for number in range(len(images))]
    path.write_text("".join(lines))
    return path


def write_parquet(path: Path, images: Sequence[bytes], *, row_group: int = 3, hugging_face: bool = False) -> Path:
    """Plain bytes and words, or as Hugging Face has it: bytes with a path, and numbered classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(images, hugging_face=hugging_face), path, row_group_size=row_group)
    return path


def table(images: Sequence[bytes], *, hugging_face: bool) -> pa.Table:
    numbers = [number % 2 for number in range(len(images))]
    if not hugging_face:
        return pa.table({"id": range(len(images)), "image": list(images), "label": [NAMES[number] for number in numbers]})
    rows = [{"bytes": image, "path": f"{number:03d}.png"} for number, image in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    kept = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.table({"image": rows, "label": pa.array(numbers, pa.int64())}).replace_schema_metadata(kept)


def write_tar(path: Path, images: Sequence[bytes]) -> Path:
    """A WebDataset shard with classes and captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            for extension, data in (("cls", NAMES[number % 2].encode()), ("png", image), ("txt", b"a caption")):
                add(tar, f"{number:06d}.{extension}", data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_saved(folder: Path, images: Sequence[bytes], *, batch: int = 3) -> Path:
    """As `datasets.save_to_disk` does, in two files."""
    folder.mkdir(parents=True)
    whole = table(images, hugging_face=True)
    half = len(whole) // 2
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (whole.slice(0, half), whole.slice(half)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part, max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


KINDS = {
    "folder": lambda folder, images: write_folder(folder / "images", images),
    "pattern": lambda folder, images: write_folder(folder / "images", images) / "*" / "*.png",
    "list": lambda folder, images: write_list(folder / "list.txt", images),
    "parquet": lambda folder, images: write_parquet(folder / "images.parquet", images),
    "parquet of Hugging Face": lambda folder, images: write_parquet(folder / "hf.parquet", images, hugging_face=True),
    "tar": lambda folder, images: write_tar(folder / "images.tar", images),
    "saved": lambda folder, images: write_saved(folder / "saved", images),
}
"""A source of each kind: what to give as data.source, given a folder to write into and images."""
