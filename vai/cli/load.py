"""`vai load`: burn a model file into memory, with progress, and name it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.cli.output import short, size
from vai.daemon.loads import burn_argv, parse, renamed
from vai.errors import BadRequest, Interrupted, VaiError, by_code
from vai.rom.registry import Name, Registry

Show = Callable[[int, int], None]  # bytes done, bytes in all


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="What to call it; default: the file's name without .gguf.")
def load(file: Path | None, name: str | None) -> None:
    """Burn a GGUF FILE into memory and give it a name. No server has to run.

    The file is read once. What is in memory then is shared by every process that uses the model, and stays until
    `vai rm` or a reboot. Without FILE, a model that is named but not in memory is burned again.

    \b
    vai load qwen2-1.5b-q4_0.gguf --name qwen
    vai load --name qwen                  (again, after a reboot)
    """
    settings = config.load()
    registry = Registry(settings.root, settings.names)
    if file is None and name is None:
        raise BadRequest("Say which file to load: vai load FILE [--name NAME].")
    if file is None:
        known = registry.get(str(name))
        file, name = Path(known.source), known.name
        if not file.is_file():
            raise BadRequest(
                f"The file of '{name}', {file}, is gone; load it from where it is: vai load FILE --name {name}"
            )
    source = str(file.resolve())
    name = name or file.name.removesuffix(".gguf")
    began = time.monotonic()
    with _wish(registry, name, source), _progress(file.name) as show:
        digest = _burn(settings.root, source, show)
    registry.put(renamed(registry, name, source, digest))
    seconds = time.monotonic() - began
    count = next(image.bytes for image in registry.resident() if image.digest == digest)
    click.echo(
        f"{name} is in memory: {size(count)} as image {short(digest)}, "
        f'{seconds:.1f} s ({count / seconds / 1e9:.2f} GB/s). Try: vai run {name} "Hello"'
    )


@contextlib.contextmanager
def _wish(registry: Registry, name: str, source: str) -> Iterator[None]:
    """A new name is written before the burn, so that a bad one costs no burn; a burn that fails takes it back."""
    new = all(known.name != name for known in registry.names())
    if new:
        registry.put(Name(name=name, source=source))
    try:
        yield
    except BaseException:
        if new:
            registry.forget(name)
        raise


def _burn(root: Path, source: str, show: Show) -> str:
    """Run the burner to its end and return the digest. Raises the VaiError it reports."""
    digest: str | None = None
    failure: VaiError | None = None
    with subprocess.Popen(burn_argv(root, source), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as burner:
        for line in burner.stdout or ():
            message = parse(line)
            if "total" in message:
                show(int(message.get("done", 0)), int(message["total"]))
            digest = message.get("digest", digest)
            if isinstance(error := message.get("error"), dict):
                failure = by_code(str(error.get("code")))(str(error.get("message")))
    if failure is not None:
        raise failure
    if digest is None:
        raise Interrupted(f"The burn of {source} ended early (exit code {burner.returncode}) and left nothing behind.")
    return digest


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Show]:
    """A bar with rate and time left on a terminal; silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"burning {label}", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
