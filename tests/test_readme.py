"""README.md is true: its commands run, its snippet loads what they made, and the wheel brings all it needs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import write_images
from tests.test_train import plain_environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (.+)$", README, flags=re.MULTILINE)
SMALL = (
    "--train.steps 3 --train.global_batch_size 4 --train.micro_batch_size 2 --memory.size 64 --memory.num_blocks 2 "
    "--views.num_local 1"
)


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment() | options.pop("env", {}), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_is_known_to_a_test():
    """A command added to the README has to be added here, or run by the test that is named."""
    assert [command.split("#")[0].strip() for command in COMMANDS] == [
        "make demo",  # .ci/run
        "make test",  # .ci/run
        "pip install '.[demo]'",  # test_wheel, from the wheel
        "massl-ray train --data.source DIR --run.dir runs/mine --train.steps 2000",
        "massl-ray train --preset vit_small --data.source DIR --run.dir runs/vit_small",
        "ray job submit --working-dir . -- python -m massl_ray.train --preset demo",  # test_train.test_ray_job
    ]
    assert re.findall(r"^\| `massl-ray (\w+)", README, flags=re.MULTILINE) == [
        "train",
        "sweep",
        "doctor",
        "plan",
        "prepare",
        "report",
        "inspect",
        "evaluate",
        "embed",
        "export",
        "visualize",
        "compare",
        "bench",
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_commands_and_snippet(tmp_path):
    """The two training commands, cut short by more flags, then the report, then the Python that loads the backbone."""
    write_images(tmp_path / "DIR", 24, side=64)
    for command in COMMANDS:
        if command.startswith("massl-ray"):
            program, *arguments = shlex.split(command)
            run([str(Path(sys.executable).with_name(program)), *arguments, *SMALL.split()], cwd=tmp_path)
    assert "report.html" in run([str(Path(sys.executable).with_name("massl-ray")), "report", "runs/mine"], cwd=tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    run([sys.executable, "-c", snippet.replace("step_2000", "step_3")], cwd=tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_wheel(tmp_path):
    """`python -m build` makes a wheel that, unpacked elsewhere, trains the demo."""
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)])
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)])
    where = run([sys.executable, "-c", "import massl_ray; print(massl_ray.__file__)"], cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert where.startswith(str(site))
    command = [sys.executable, "-m", "massl_ray.train", "--train.steps", "2"]
    assert "Report" in run(command, cwd=tmp_path, env={"PYTHONPATH": str(site)})
