"""`vai show`: what a model is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.cli.output import json_option, print_json, short, size, table
from vai.rom import segment
from vai.rom.image import BLOCK_TYPES
from vai.rom.registry import Registry

_TEMPLATE_LINES = 12


@click.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the shape, the tensors, the origin and the chat template of the model NAME (or of an image's digest)."""
    settings = config.load()
    registry = Registry(settings.root, settings.names)
    found = _describe(settings.root, registry.find(name))
    found = {"names": [n.name for n in registry.names() if n.digest == found["digest"]], **found}
    if as_json:
        print_json(found)
        return
    click.echo(f"{', '.join(found['names']) or 'no name'}: image {found['digest']}, {size(found['bytes'])}\n")
    table(("SPEC", ""), [[key, _value(value)] for key, value in found["spec"].items()])
    click.echo()
    rows = [
        [type, str(told["count"]), size(told["bytes"]), "slow: unpacked weight by weight" if told["slow"] else ""]
        for type, told in found["tensors"].items()
    ]
    table(("TENSORS", "COUNT", "BYTES", ""), rows)
    click.echo()
    table(("SECTION", "BYTES"), [[section, size(count)] for section, count in found["sections"].items()])
    click.echo()
    table(("FROM", ""), [[key, _value(value)] for key, value in found["provenance"].items()])
    _template(found["template"].get("chat_template"))


def _describe(root: Path, digest: str) -> dict[str, Any]:
    """Everything of an image but its weights. Raises ModelNotFound, CorruptImage."""
    with segment.attach(root, digest) as image:
        tensors: dict[str, dict[str, int]] = {}
        slow = {kind.name for kind in BLOCK_TYPES.values() if kind.slow}
        for stored in image.table.tensors:
            told = tensors.setdefault(stored.type, {"count": 0, "bytes": 0, "slow": stored.type in slow})
            told["count"] += 1
            told["bytes"] += stored.bytes
        return {
            "digest": digest,
            "weights": image.weights,
            "bytes": image.header.file_bytes,
            "burned_at": image.header.burned_at,
            "burn_seconds": image.header.burn_seconds,
            "host": image.header.host,
            "spec": json.loads(image.spec),
            "tensors": tensors,
            "sections": {section: entry.length for section, entry in image.header.sections.items()},
            "template": json.loads(image.section("template")),
            "defaults": json.loads(image.section("defaults")),
            "provenance": json.loads(image.section("provenance")),
        }


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return short(text) if len(text) == 64 else text[:100]


def _template(template: str | None) -> None:
    if template is None:
        click.echo("\nNo chat template: the model completes text.")
        return
    lines = template.splitlines()
    click.echo("\nCHAT TEMPLATE")
    for line in lines[:_TEMPLATE_LINES]:
        click.echo(f"  {line[:200]}")
    if len(lines) > _TEMPLATE_LINES:
        click.echo(f"  … {len(lines) - _TEMPLATE_LINES} more lines; --json has them all")
