"""How the command line writes: sizes, durations, tables, JSON, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

Show = Callable[[int, int], None]  # bytes done, bytes in all
DIGEST_DIGITS = 12

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def size(count: float) -> str:
    """Bytes for a person: 913 B, 4.2 MiB, 3.56 GiB."""
    if count < 1 << 10:
        return f"{count:.0f} B"
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1):
        value = count / 1024**power
        if value < 1000 or unit == "TiB":
            break
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"


def slowness(slow: Mapping[str, int], whole: int) -> str:
    """Which part of an image of `whole` bytes is in slow types, given the bytes in each."""
    return f"{sum(slow.values()) / whole:.0%} in {', '.join(slow)}, which is slow: unpacked weight by weight"


def duration(seconds: float) -> str:
    """Seconds for a person: 0.4 s, 12 s, 5 min, 3 h, 2 d."""
    for limit, divisor, unit in ((10, 1, "s"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.1f} {unit}" if limit == 10 else f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def short(digest: str | None) -> str:
    """The first digits of a digest, as every command accepts them."""
    return "-" if digest is None else digest[:DIGEST_DIGITS]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, nothing else: readable for people, easy for awk."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """For programs. Keys stay as they are from one version to the next; new ones may come."""
    click.echo(json.dumps(value, indent=2))


@contextlib.contextmanager
def progress(label: str) -> Iterator[Show]:
    """A bar with rate and time left on a terminal; silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
