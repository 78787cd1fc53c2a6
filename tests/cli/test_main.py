"""The command line itself: help, errors, exit codes, and what it costs to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest

import vai.cli

Vai = Callable[..., subprocess.CompletedProcess[str]]


def test_help_lists_every_command_and_imports_none(vai: Vai) -> None:
    shown = vai("--help")
    assert shown.returncode == 0
    program = "import sys, vai.cli; sys.argv = ['vai', '--help'];\ntry: vai.cli.main()\nexcept SystemExit: pass\n"
    program += "print([m for m in sys.modules if m.startswith('vai.')], file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert loaded.strip() == "['vai.errors', 'vai.cli']"
    for command in vai_commands():
        assert f"\n  {command} " in shown.stdout


def vai_commands() -> list[str]:
    return list(vai.cli._COMMANDS)


def test_every_command_explains_itself() -> None:
    with click.Context(vai.cli.vai) as context:
        for name in vai_commands():
            command = vai.cli.vai.get_command(context, name)
            assert command is not None
            assert command.name == name
            assert len(command.get_help(context).splitlines()) > 4


@pytest.mark.parametrize("command", ["ls", "stop", "logs", "verify"])
def test_small_commands_load_nothing_heavy(vai: Vai, command: str) -> None:
    program = f"import sys, vai.cli; sys.argv = ['vai', '{command}'];\ntry: vai.cli.main()\nexcept SystemExit: pass\n"
    program += "print([m for m in ('numpy', 'msgspec', 'tokenizers', 'rich', 'starlette') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.endswith("[]\n")


def test_a_command_that_is_not_there_is_a_usage_error(vai: Vai) -> None:
    refused = vai("frobnicate")
    assert refused.returncode == 2
    assert "No such command" in refused.stderr


def test_a_reader_that_leaves_early_is_no_error(environment: dict[str, str]) -> None:
    program = f"{sys.executable} -m vai --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_bad_environment_is_named(vai: Vai) -> None:
    refused = vai("ls", VAI_PORT="many")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "VAI_PORT=many" in refused.stderr


def test_stop_with_nothing_running_says_so(vai: Vai) -> None:
    stopped = vai("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "Nothing is running.\n")
