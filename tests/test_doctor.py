"""massl-ray doctor: the report alone, and whether training would stop."""

import json
import sys

import pytest

from massl_ray.doctor import main
from tests.sources import encoded_images, write_folder

IMAGES = encoded_images(20)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", IMAGES)


def test_all_is_well(folder, capsys):
    assert main(["--data.source", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Images    20 in {folder}") and lines[1:4] == [
        "Formats   PNG 20",
        "Sides     shorter 40 to 40 px, half under 40; longer 40 to 40 px, half under 40",
        "Labels    2 classes of 10 to 10 images",
    ]
    assert lines[4].startswith("Channels") and len(lines) == 5


def test_broken_images_fail_above_what_is_allowed(folder, capsys):
    for number in (0, 2):
        (folder / "cat" / f"{number:03d}.png").write_bytes(IMAGES[number][:500])
    assert main(["--data.source", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "Broken    2 cannot be read" in out and f"{folder}/cat/002.png: " in out
    assert out.endswith("Training would stop: 2 of 20 images cannot be read, and data.max_skipped is 0.05.\n")
    assert main(["--data.source", str(folder), "--data.max_skipped", "0.1"]) == 0
    assert "Broken    2 cannot be read" in capsys.readouterr().out


def test_images_of_too_many_pixels_cannot_be_read(folder, capsys):
    assert main(["--data.source", str(folder), "--data.max_pixels", "1599"]) == 1
    assert "40 x 40 pixels, more than data.max_pixels 1599 allows" in capsys.readouterr().out


def test_for_programs(folder, capsys):
    (folder / "cat" / "000.png").write_bytes(b"")
    (folder / "cat" / "002.png").write_bytes(b"")
    assert main(["--json", "--data.source", str(folder)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 20 and found["fails"] is True and found["labels"] == {"cat": 10, "dog": 10}
    assert [each["path"] for each in found["broken"]] == [f"{folder}/cat/000.png", f"{folder}/cat/002.png"]
    assert main(["--json", "--data.source", str(folder), "--data.max_skipped", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["fails"] is False


def test_one_image_is_too_few(tmp_path, capsys):
    write_folder(tmp_path / "images", IMAGES[:1])
    assert main(["--data.source", str(tmp_path / "images")]) == 1
    assert capsys.readouterr().out.endswith("Training would stop: it needs at least 2 images.\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.source", "/nowhere"], "there is no folder or file /nowhere"),
        (["--data.sauce", "x"], "the nearest is 'data.source'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, words, capsys):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: massl-ray doctor --data.source SOURCE [--json]" in capsys.readouterr().out


def test_neither_torch_nor_ray_is_needed(folder):
    """It answers at once, also where neither is installed."""
    import subprocess

    code = f"import sys; from massl_ray.doctor import main; main(['--data.source', {str(folder)!r}]); "
    code += "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
