"""`vai logs`: what the processes wrote."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import click

from vai import config
from vai.daemon.roles import ROLES
from vai.errors import ModelNotFound

_LINES = 50
_LOGS = (*ROLES, "burn")


@click.command()
@click.argument("role", required=False, type=click.Choice(_LOGS))
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written; Ctrl-C ends it.")
def logs(role: str | None, follow: bool) -> None:
    """Show the last lines of the log of ROLE, or of all."""
    directory = config.load().logs
    paths = [directory / f"{name}.log" for name in ([role] if role else _LOGS)]
    paths = [path for path in paths if path.exists()]
    if not paths:
        raise ModelNotFound(f"There is no such log in {directory} yet; `vai serve` writes them.")
    ends = {path: _last(path, headed=len(paths) > 1) for path in paths}
    while follow:
        time.sleep(0.2)
        for path in paths:
            ends[path] = _new(path, ends[path], f"{path.stem}: " if len(paths) > 1 else "")


def _last(path: Path, *, headed: bool) -> int:
    """Print the last lines; return where the file ended."""
    if headed:
        click.echo(click.style(f"── {path} ", bold=True))
    with open(path, errors="replace") as file:
        for line in deque(file, _LINES):
            click.echo(line, nl=False)
        return file.tell()


def _new(path: Path, start: int, prefix: str) -> int:
    """Print what came after `start`; return where the file ends now. A log put aside and begun anew is read anew."""
    if not path.exists():
        return start
    with open(path, errors="replace") as file:
        file.seek(start if path.stat().st_size >= start else 0)
        while (line := file.readline()).endswith("\n"):
            click.echo(prefix + line, nl=False)
            start = file.tell()
        return min(start, path.stat().st_size)
