"""massl-ray doctor: everything a run needs, for people and for programs; what is broken is found, and nothing else hides it."""

import json
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from massl_ray.checkup import everything, machine
from massl_ray.doctor import main
from tests.sources import encoded_images, write_folder
from tests.test_plan import work_out_once

IMAGES = encoded_images(20)
ROOT = Path(__file__).parents[1]
TINY = (
    "--model.backbone test_vit --views.global_size 32 --views.local_size 16 --head.hidden_dim 16 --head.dim 8 --memory.size 640 "
    "--memory.num_blocks 2 --train.global_batch_size 16 --train.micro_batch_size 8 --train.device cpu"
).split()
AUTO = ["--train.device", "auto"]
Space = namedtuple("Space", "total used free")


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch, tmp_path):
    """As where nobody else runs Ray, with a home and a working folder of its own."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))  # so that nobody listens there
        monkeypatch.setattr(machine, "PORTS", {first.getsockname()[1]: "Ray's head", second.getsockname()[1]: "Ray's dashboard"})
        monkeypatch.setattr(machine, "SHM", tmp_path)
        monkeypatch.setattr(machine, "memory_bytes", lambda: 1e9)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "home").mkdir()
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        work_out_once(monkeypatch)
        yield


@pytest.fixture
def flags(tmp_path):
    folder = write_folder(tmp_path / "images", IMAGES)
    return [*TINY, "--data.source", str(folder), "--run.dir", str(tmp_path / "run")]


def found_by(capsys, *flags: str) -> tuple[int, dict[str, list[str]], dict]:
    """Exit code, {check: severities}, and all that was printed as JSON."""
    code = main(["--json", *flags])
    printed = json.loads(capsys.readouterr().out)
    severities: dict[str, list[str]] = {}
    for finding in printed["findings"]:
        severities.setdefault(finding["check"], []).append(finding["severity"])
    return code, severities, printed


def test_all_is_well(flags, capsys, tmp_path):
    assert main(flags) == 0
    out = capsys.readouterr().out.splitlines()
    folder = tmp_path / "images"
    assert out[0].startswith(f"Images    20 in {folder}") and out[1:4] == [
        "Formats   PNG 20",
        "Sides     shorter 40 to 40 px, half under 40; longer 40 to 40 px, half under 40",
        "Labels    2 classes of 10 to 10 images",
    ]
    assert out[4].startswith("Channels") and out[5] == ""
    severities = [line.split()[0] for line in out[6:]]
    assert severities == sorted(severities, key=["ok", "note", "warning", "error"].index) and "error" not in severities
    assert not (tmp_path / "run").exists()


def test_for_programs(flags, capsys, tmp_path):
    code, severities, printed = found_by(capsys, *flags)
    assert code == 0 and printed["fails"] is False and set(printed) == {"findings", "images", "fails"}
    assert printed["images"]["images"] == 20 and printed["images"]["labels"] == {"cat": 10, "dog": 10}
    assert set(severities) == {
        *("python", "ray", "torch", "cuda", "ray token", "shared memory", "ports", "storage", "images", "model", "settings"),
        *("views", "start", "memory", "time and cost", "disk"),
    }
    for finding in printed["findings"]:
        assert set(finding) == {"check", "severity", "sentence", "remedy"} and finding["sentence"].endswith(".")
        assert finding["remedy"] is None if finding["severity"] == "ok" else True
        assert finding["remedy"] if finding["severity"] in ("warning", "error") else True


def test_broken_images_fail_above_what_is_allowed(flags, capsys, tmp_path):
    folder = tmp_path / "images"
    for number in (0, 2):
        (folder / "cat" / f"{number:03d}.png").write_bytes(IMAGES[number][:500])
    assert main(flags) == 1
    out = capsys.readouterr().out
    assert "Broken    2 cannot be read" in out and f"{folder}/cat/002.png: " in out
    assert (
        out.splitlines()[-1].startswith("error    images") and "2 of 20 images cannot be read, and data.max_skipped is 0.05" in out
    )
    code, severities, printed = found_by(capsys, *flags, "--data.max_skipped", "0.1")
    assert code == 0 and severities["images"] == ["warning"] and severities["start"] == ["ok"]
    assert [each["path"] for each in printed["images"]["broken"]] == [f"{folder}/cat/000.png", f"{folder}/cat/002.png"]


def test_all_images_broken_and_all_of_them_allowed(flags, capsys, tmp_path):
    for path in (tmp_path / "images").glob("*/*"):
        path.write_bytes(b"")
    code, severities, _ = found_by(capsys, *flags, "--data.max_skipped", "1")
    assert severities["images"] == ["warning"] and "views" not in severities and code in (0, 1)


def test_images_of_too_many_pixels_cannot_be_read(flags, capsys):
    assert main([*flags, "--data.max_pixels", "1599"]) == 1
    assert "40 x 40 pixels, more than data.max_pixels 1599 allows" in capsys.readouterr().out


def test_without_images_the_other_checks_are_made(flags, capsys):
    code, severities, printed = found_by(capsys, *flags, "--data.source", "/nowhere")
    assert code == 1 and printed["images"] is None and printed["fails"] is True
    assert severities["images"] == ["error"] and severities["storage"] == ["ok"] and severities["model"] == ["ok"]
    assert "start" not in severities


def test_one_image_is_too_few(flags, capsys, tmp_path):
    write_folder(tmp_path / "one", IMAGES[:1])
    code, severities, _ = found_by(capsys, *flags, "--data.source", str(tmp_path / "one"))
    assert code == 1 and severities["images"] == ["error"]


def test_a_model_that_does_not_exist(flags, capsys):
    code, severities, printed = found_by(capsys, *flags, "--model.backbone", "vit_huge_patch99")
    assert code == 1 and severities["model"] == ["error"] and severities["settings"] and "memory" not in severities
    assert "is no timm model" in printed["findings"][-1]["sentence"]


def test_a_broken_machine(flags, capsys, monkeypatch, tmp_path):
    """All at once: no room on the disk, too little shared memory, a token but no mode, run.dir that is a file."""
    (tmp_path / "home" / ".ray").mkdir()
    (tmp_path / "home" / ".ray" / "auth_token").write_text("x")
    (tmp_path / "run").write_text("")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Space(1e6, 1e6, 1e3))
    code, severities, printed = found_by(capsys, *flags)
    assert code == 1 and printed["fails"] is True
    assert severities["ray token"] == ["warning"] and severities["shared memory"] == ["warning"]
    assert severities["disk"] == ["error"] and severities["storage"] == ["error"] and "start" not in severities
    assert [finding["severity"] for finding in printed["findings"][-2:]] == ["error", "error"]


def test_a_run_of_another_configuration(flags, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    code, severities, _ = found_by(capsys, *flags)
    assert code == 1 and severities["start"] == ["error"] and severities["storage"] == ["ok"]


def test_measured(flags, capsys, monkeypatch):
    code, severities, printed = found_by(capsys, *flags, "--measure")
    assert code == 0 and severities["measured"] == ["ok"]
    assert any("(measured)" in finding["sentence"] for finding in printed["findings"])


@pytest.mark.parametrize("name", ["aws", "azure", "gcp", "kuberay"])
def test_the_files_of_cluster(name, flags, capsys, monkeypatch, tmp_path):
    """Nothing in them fails; this machine's disk and shared memory are not those of the run."""
    monkeypatch.chdir(tmp_path)  # where no runs/demo is: that of `make demo` has another configuration
    monkeypatch.setattr(everything, "check_storage", lambda where: pytest.fail("run.dir is a path of another machine"))
    code, severities, _ = found_by(
        capsys, *flags[: -len(["--run.dir", "x"])], *AUTO, "--cluster", str(ROOT / "cluster" / f"{name}.yaml")
    )
    assert code == 0 and "disk" not in severities and "shared memory" not in severities and severities["memory"] == ["ok"]
    assert "dashboard" not in severities and "cluster" not in severities and severities["data.source"] == ["warning"]


def test_an_open_dashboard(flags, capsys, tmp_path):
    text = (ROOT / "cluster" / "aws.yaml").read_text()
    assert "--dashboard-host=127.0.0.1" in text
    (tmp_path / "open.yaml").write_text(text.replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"))
    code, severities, printed = found_by(capsys, *flags, "--cluster", str(tmp_path / "open.yaml"))
    assert code == 1 and severities["dashboard"] == ["error"] and "listen on 0.0.0.0" in printed["findings"][-1]["sentence"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.sauce", "x"], "the nearest is 'data.source'"),
        (["--cluster", "none.yaml"], "The cluster file none.yaml cannot be read"),
        (["--cluster"], "expected one argument"),
        (["--memory.size", "1"], "memory.size is '1'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, words, capsys):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("massl-ray: ") and err.count("\n") == 1


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "usage: massl-ray doctor [--cluster FILE] [--measure] [--json]" in capsys.readouterr().out


def test_no_ray_is_started_or_imported(flags):
    import subprocess

    code = f"import sys; from massl_ray.doctor import main; main({flags!r}); sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
