"""`vai verify`: hash every byte of images in memory."""

from __future__ import annotations

import os
import time

import click

from vai import config
from vai.cli.output import short, size
from vai.errors import CorruptImage
from vai.rom import segment
from vai.rom.registry import Registry


@click.command()
@click.argument("name", required=False)
def verify(name: str | None) -> None:
    """Check every byte of the image of NAME, or of all images in memory, against the hashes made when it was burned.

    A flipped bit is found and the tensor that has it is named. Exit code 11 if an image is corrupt.
    """
    settings = config.load()
    registry = Registry(settings.root, settings.names)
    digests = [registry.find(name)] if name else [image.digest for image in registry.resident()]
    if not digests:
        click.echo("No image is in memory.")
    corrupt = []
    for digest in digests:
        try:
            click.echo(_check(registry, digest))
        except CorruptImage as error:
            click.echo(f"{short(digest)}  CORRUPT", err=True)
            corrupt.append(error)
    if corrupt:
        raise CorruptImage(" ".join(error.message for error in corrupt))


def _check(registry: Registry, digest: str) -> str:
    """A line of good news. Raises CorruptImage, ModelNotFound."""
    began = time.monotonic()
    with segment.attach(registry.root, digest) as image:
        segment.verify(image, threads=len(os.sched_getaffinity(0)))
        count = image.header.file_bytes
    seconds = time.monotonic() - began
    names = ", ".join(known.name for known in registry.names() if known.digest == digest) or "no name"
    return f"{short(digest)}  intact  {size(count)} in {seconds:.2f} s ({count / seconds / 1e9:.2f} GB/s)  {names}"
