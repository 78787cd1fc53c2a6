"""`vai rm`: take a model's name away, and its image out of memory."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import click

from vai import config
from vai.cli.engine import ask
from vai.cli.output import short, size
from vai.daemon import roles
from vai.daemon.stop import end
from vai.errors import InUse, ModelNotFound, Unavailable
from vai.rom import segment
from vai.rom.holders import holders
from vai.rom.registry import Name, Registry

_PATIENCE = 5.0


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it under its users; the memory comes back when the last one ends.")
def rm(name: str, force: bool) -> None:
    """Remove the model NAME (or the image with this digest) from memory. The file it came from is not touched.

    The engine lets go of it: requests that run on it end. If another process uses it, that one is named, and nothing
    is removed unless --force.
    """
    settings = config.load()
    registry = Registry(settings.root, settings.names)
    digest, gone = _forget(registry, name)
    others = [other.name for other in registry.names() if other.digest == digest and digest is not None]
    if others:
        click.echo(f"{name} is forgotten; its image stays, it is also called {', '.join(others)}.")
        return
    if digest is None or not registry.is_resident(digest):
        click.echo(f"{name} is forgotten; it was not in memory.")
        return
    with contextlib.suppress(Unavailable):  # no engine, nothing to ask
        ask(settings.root, lambda engine: engine.release(digest))
    _end_burners(segment.image_path(settings.root, digest))
    try:
        freed = segment.remove(settings.root, digest, force=force)
    except InUse:
        for known in gone:
            registry.put(known)  # an error leaves everything as it was
        raise
    click.echo(f"{name} is removed: {size(freed)} of memory are free (image {short(digest)}).")


def _forget(registry: Registry, text: str) -> tuple[str | None, list[Name]]:
    """The digest that `text` means, and the names that were taken away: a model without a name gets no new request."""
    try:
        known = registry.get(text)
    except ModelNotFound:
        digest = registry.find(text)
        if not registry.is_resident(digest):
            raise
        gone = [name for name in registry.names() if name.digest == digest]
    else:
        digest, gone = known.digest or "", [known]
    for name in gone:
        registry.forget(name.name)
    return digest or None, gone


def _end_burners(path: Path) -> None:
    """End the burners that still give the image huge pages: our own, with nothing to lose."""
    for holder in holders(path):
        end(holder.pid, _PATIENCE, partial(_is_burner, holder.pid))


def _is_burner(pid: int) -> bool:
    return roles.arguments(pid)[1:3] == ["-m", "vai.burn"]
