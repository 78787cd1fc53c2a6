"""`vai ls`: the models by name, and images that have none."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.cli.output import duration, json_option, print_json, short, size, table
from vai.errors import VaiError
from vai.rom import segment
from vai.rom.registry import Registry


@click.command()
@json_option
def ls(as_json: bool) -> None:
    """List the models by name.

    RESIDENT tells whether the weights are in memory now. A model that is named but not resident is burned again when
    `vai serve` starts, or by `vai load`.
    """
    settings = config.load()
    rows = _rows(settings.root, settings.names)
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("No models yet. Burn one into memory: vai load model.gguf --name NAME")
    else:
        header = ("NAME", "IMAGE", "SIZE", "RESIDENT", "ARCHITECTURE", "BURNED")
        table(header, [_cells(row) for row in rows])
    for problem in Registry(settings.root, settings.names).broken():
        click.echo(f"vai: {problem.message}", err=True)


def _rows(root: Path, names: Path) -> list[dict[str, Any]]:
    """One for each name, then one for each image without a name."""
    registry = Registry(root, names)
    resident = {image.digest: image for image in registry.resident()}
    named = [(name.name, name.digest, name.source) for name in registry.names()]
    nameless = [(None, digest, None) for digest in resident if digest not in {digest for _, digest, _ in named}]
    rows = []
    for name, digest, source in [*named, *nameless]:
        image = resident.get(digest or "")
        header = image.header if image else None
        spec = _spec(root, digest) if header and digest else {}
        rows.append(
            {
                "name": name,
                "digest": digest,
                "source": source,
                "resident": image is not None,
                "bytes": image.bytes if image else None,
                "architecture": spec.get("architecture"),
                "experts": spec.get("experts"),
                "experts_used": spec.get("experts_used"),
                "burned_at": header.burned_at if header else None,
                "problem": image.problem if image else None,
            }
        )
    return rows


def _spec(root: Path, digest: str) -> dict[str, Any]:
    try:
        spec = json.loads(segment.read_sections(root, digest, "spec")["spec"])
    except (VaiError, ValueError):
        return {}
    return spec if isinstance(spec, dict) else {}


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"] or "-",
        short(row["digest"]),
        size(row["bytes"]) if row["bytes"] is not None else "-",
        "damaged" if row["problem"] else "yes" if row["resident"] else "no",
        _shape(row),
        f"{duration(max(0.0, time.time() - row['burned_at']))} ago" if row["burned_at"] else "-",
    ]


def _shape(row: dict[str, Any]) -> str:
    """The architecture; of a model with experts, how many of them a token uses too."""
    if not row["experts"]:
        return str(row["architecture"] or "-")
    return f"{row['architecture']}, {row['experts_used']} of {row['experts']} experts"
