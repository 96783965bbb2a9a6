"""The command of commands."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from massl_ray.__main__ import COMMANDS, main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_its_purpose(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr()
    lines = [line.split(maxsplit=1) for line in printed.out.splitlines()]
    assert all([name, purpose] in lines for name, purpose in COMMANDS.items())
    assert "massl-ray COMMAND --help" in printed.out and not printed.err


def test_unknown_command_exits_2_and_names_the_known_ones(capsys):
    assert main(["trian", "--run.seed", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"massl-ray: there is no command 'trian'. Commands: {', '.join(COMMANDS)}.\n"
    assert not printed.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_main(name):
    assert callable(importlib.import_module(f"massl_ray.{name}").main)


def test_command_gets_the_rest_and_gives_the_exit_code(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "massl_ray.train", SimpleNamespace(main=lambda argv: seen.append(argv) or 7))
    assert main(["train", "--run.seed", "1"]) == 7
    monkeypatch.setattr(sys, "argv", ["massl-ray", "train", "-h"])
    assert main() == 7
    assert seen == [["--run.seed", "1"], ["-h"]]


def test_a_wrong_flag_exits_2_through_the_command(capsys):
    assert main(["train", "--memory.slots", "4"]) == 2
    assert "massl-ray: There is no setting 'memory.slots'" in capsys.readouterr().err
