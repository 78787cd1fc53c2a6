"""`vai logs`: what the processes wrote."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import click

from vai import config
from vai.daemon.roles import ROLES
from vai.errors import ModelNotFound

_LINES = 50
_LOGS = (*ROLES, "burn")


class _End(NamedTuple):
    """How far a log has been shown."""

    inode: int
    offset: int


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


def _last(path: Path, *, headed: bool) -> _End:
    """Print the last lines; return where the file ended."""
    if headed:
        click.echo(click.style(f"── {path} ", bold=True))
    with open(path, "rb") as file:
        lines = deque(file, _LINES)
        end = _End(os.fstat(file.fileno()).st_ino, file.tell())
    for line in lines:
        click.echo(line, nl=False)
    return end


def _new(path: Path, end: _End, prefix: str) -> _End:
    """Print the whole lines that came after `end`; return where they ended. A log begun anew is read from its start."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only its absence is to be caught
    except FileNotFoundError:
        return end
    with file:
        found = os.fstat(file.fileno())
        offset = end.offset if found.st_ino == end.inode and found.st_size >= end.offset else 0
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            click.echo(prefix.encode() + line, nl=False)
            offset += len(line)
    return _End(found.st_ino, offset)
