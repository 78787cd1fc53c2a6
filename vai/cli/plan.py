"""`vai plan`: what models will take of the memory, to the byte, before anything is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.cli import report
from vai.cli.output import json_option, print_json, size, slowness, table
from vai.config import KV_TYPES, Config
from vai.daemon import pool
from vai.errors import BadRequest, ModelNotFound, NotEnoughRoom
from vai.rom import segment
from vai.rom.image import TensorTable, align
from vai.rom.registry import Registry
from vai.rom.room import Room, free_room


@dataclass(frozen=True, slots=True)
class Planned:
    """What one model takes, in bytes.

    digest: of its image in memory; None where `file` would have to be burned · kv_bytes_per_token: in pages of 32
    tokens · tokens_that_fit: what the whole scratchpad holds of it; None for any number, where it keeps nothing, or no
    more than its windows · tokens_in_whole_chunks: of a prompt that is computed in the largest steps there are, not in
    smaller ones for lack of room; None for any number · page_scratchpad, context_scratchpad: the smallest scratchpad
    that holds a page of it, and its whole context · groups: its layers by how far back they look, with `window` None
    for those that see everything, and the bytes of a token in them · slow: bytes of the image in each type that kernels
    unpack weight by weight.
    """

    name: str
    digest: str | None
    file: str | None
    image_bytes: int
    workspace_bytes: int
    context: int
    kv_bytes_per_token: int
    tokens_that_fit: int | None
    tokens_in_whole_chunks: int | None
    page_scratchpad: int
    context_scratchpad: int
    groups: list[dict[str, int | None]]
    slow: dict[str, int]


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs the models, now or when it is started.

    scratchpad: bytes for pages, of `kv_type`. taken: of those and their headers, what is in memory already. fast: what
    it computes prompts with, None: as everything else.
    """

    threads: int
    fast: str | None
    scratchpad: int
    taken: int
    kv_type: str

    @property
    def whole(self) -> int:
        """The scratchpad with the headers of its pages."""
        return pool.whole_bytes(self.scratchpad)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--kv", help="Scratchpad for all models together, as in 4G; default what runs, or would be started.")
@click.option("--kv-type", type=click.Choice(KV_TYPES), help="How keys and values are stored; default as for --kv.")
@json_option
def plan(models: tuple[str, ...], kv: str | None, kv_type: str | None, as_json: bool) -> None:
    """Say what MODELS (names, or GGUF files not loaded yet) will take of the memory, and whether they fit together.

    Images and workspaces are exact and known before anything is loaded. The scratchpad is shared by all models; TOKENS
    FIT is what it holds of one model alone, whose layers with a window keep no more than that. A file counts as a new
    image. Exit code 8 if the plan does not fit.

    \b
    Examples:
      vai plan qwen2-1.5b-q4_0.gguf deepseek-6.7b-q4_0.gguf --kv 2G
      vai plan qwen --kv-type q8_0
    """
    settings = config.load()
    segment.prepare(settings.root)
    room = free_room(settings.root)
    engine = _engine(settings, config.parse_size(kv) if kv else None, kv_type, room)
    planned = [_model(settings, text, engine) for text in dict.fromkeys(models)]
    found = _sum(planned, engine, room)
    found["reason"] = _refusal(settings, planned, engine, found)
    found["accepted"] = found["reason"] is None
    if as_json:
        print_json(found)
    else:
        _show(planned, found)
    if found["reason"] is not None:
        raise NotEnoughRoom(found["reason"])


def _engine(settings: Config, kv: int | None, kv_type: str | None, room: Room) -> Engine:
    """The engine that runs; where it has another scratchpad or KV type, the one that `vai serve` would start now."""
    from vai.kernels import table as kernels

    running = report.engine(settings.root)
    threads = running["threads"] if running else settings.threads
    fast = running["fast"] if running else kernels.fast(settings.fast)
    if running and kv in (None, running["pool_bytes"]) and kv_type in (None, running["kv_type"]):
        return Engine(threads, fast, running["pool_bytes"], _in_memory(running["pid"]), running["kv_type"])
    scratchpad = align(kv or settings.kv_bytes or pool.default_bytes(room.free), pool.SLAB)
    return Engine(threads, fast, scratchpad, 0, kv_type or settings.kv_type)


def _in_memory(pid: int) -> int:
    """Bytes of an engine's scratchpad that have been touched so far, and so are no longer free."""
    descriptor = pool.reopen(pid)
    if descriptor is None:
        return 0
    try:
        return os.fstat(descriptor).st_blocks * 512  # the unit of stat(2), whatever the page size
    finally:
        os.close(descriptor)


def _model(settings: Config, text: str, engine: Engine) -> Planned:
    """Raises ModelNotFound, BadRequest where a name's file is gone, and what reading a checkpoint raises."""
    from vai.kernels import table as kernels
    from vai.kernels.program import MAX_ROWS, MAX_SEQUENCES, PAGE_TOKENS
    from vai.models.decoder import build
    from vai.models.spec import Spec
    from vai.scratchpad.budget import bytes_that_hold, pages_ahead, pages_at_once, tokens_that_fit
    from vai.scratchpad.pages import Owner

    found = _find(settings, text)
    if isinstance(found, Path):
        from vai.burn.burn import preview

        spec, tensors, image_bytes = preview(found)
    else:
        sections = segment.read_sections(settings.root, found, "tensors", "spec")
        spec, tensors = Spec.from_bytes(sections["spec"]), TensorTable.from_bytes(sections["tensors"])
        image_bytes = segment.read_header(settings.root, found).file_bytes
    program = build(spec)
    pages = [group.page_bytes(engine.kv_type) for group in program.groups]
    owners = [Owner(text, group, count) for group, count in enumerate(pages)]
    least, whole = (
        [pages_at_once(group.window, ahead) for group in program.groups] for ahead in (1, pages_ahead(MAX_ROWS))
    )
    return Planned(
        name=text,
        digest=None if isinstance(found, Path) else found,
        file=str(found.resolve()) if isinstance(found, Path) else None,
        image_bytes=image_bytes,
        workspace_bytes=kernels.workspace_bytes(
            program,
            tensors,
            max_rows=MAX_ROWS,
            max_sequences=MAX_SEQUENCES,
            threads=engine.threads,
            fast=engine.fast,
        ),
        context=program.context,
        kv_bytes_per_token=sum(pages) // PAGE_TOKENS,
        tokens_that_fit=tokens_that_fit(engine.scratchpad, owners, least),
        tokens_in_whole_chunks=tokens_that_fit(engine.scratchpad, owners, whole),
        page_scratchpad=bytes_that_hold(1, owners, least),
        context_scratchpad=bytes_that_hold(program.context, owners, least),
        groups=[
            {"layers": group.layers, "window": group.window, "bytes_per_token": bytes_ // PAGE_TOKENS}
            for group, bytes_ in zip(program.groups, pages, strict=True)
        ],
        slow=tensors.slow_bytes(),
    )


def _find(settings: Config, text: str) -> str | Path:
    """What a name, a digest or a path means: the digest of an image in memory, or the file to burn."""
    registry, file = Registry(settings.root, settings.names), Path(text)
    try:
        digest = registry.find(text)
    except ModelNotFound:
        with contextlib.suppress(ModelNotFound):
            return _source(registry, text)  # named, but never burned
        if file.is_file():
            return file
        raise
    return digest if registry.is_resident(digest) else _source(registry, text)


def _source(registry: Registry, name: str) -> Path:
    file = Path(registry.get(name).source)
    if not file.is_file():
        raise BadRequest(f"The file of '{name}' is gone ({file}), so nothing can be said before it is loaded again.")
    return file


def _sum(planned: Sequence[Planned], engine: Engine, room: Room) -> dict[str, Any]:
    """What the command prints as JSON. Two names of one image share it, and its workspace."""
    distinct = list({model.digest or model.file: model for model in planned}.values())
    new = sum(model.image_bytes for model in distinct if model.file)
    workspaces = sum(model.workspace_bytes for model in distinct)
    need = new + workspaces + engine.whole - engine.taken
    return {
        "models": [asdict(model) for model in planned],
        "threads": engine.threads,
        "new_image_bytes": new,
        "resident_image_bytes": sum(model.image_bytes for model in distinct if model.digest),
        "workspace_bytes": workspaces,
        "scratchpad_bytes": engine.scratchpad,
        "kv_type": engine.kv_type,
        "scratchpad_header_bytes": engine.whole - engine.scratchpad,
        "scratchpad_taken": engine.taken,
        "need": need,
        "room": room._asdict(),
        "left": room.free - need,
    }


def _refusal(settings: Config, planned: Sequence[Planned], engine: Engine, found: dict[str, Any]) -> str | None:
    """Why the plan cannot be, and the way out; None where it can."""
    for model in planned:
        if model.tokens_that_fit == 0:
            return (
                f"A scratchpad of {size(engine.scratchpad)} holds no page of {model.name}, whose every token takes "
                f"{size(model.kv_bytes_per_token)}. Give it at least {size(model.page_scratchpad)}: "
                f"{_option(model.page_scratchpad)}."
            )
    if found["left"] >= 0:
        return None
    parts = (
        f"images {size(found['new_image_bytes'])}, workspaces {size(found['workspace_bytes'])}, "
        f"scratchpad with headers {size(engine.whole - engine.taken)}"
    )
    ways = [f"unload {what}" for what in _could_go(settings, planned)]
    smaller = pool.page_bytes(max(0, engine.whole + found["left"]) // pool.SLAB * pool.SLAB)
    if smaller > 0 and all(model.page_scratchpad <= smaller for model in planned):
        ways.append(f"take a scratchpad of at most {size(smaller)} ({_option(smaller)})")
    return (
        f"This needs {size(found['need'])} ({parts}), but only "
        f"{size(found['room']['free'])} are free: {found['room']['limit']}. "
        + (f"You could {', or '.join(ways)}." if ways else "Plan fewer or smaller models.")
    )


def _could_go(settings: Config, planned: Sequence[Planned]) -> list[str]:
    """Images in memory that the plan does not name, each with its size."""
    registry, wanted = Registry(settings.root, settings.names), {model.digest for model in planned}
    names = {name.digest: name.name for name in registry.names()}
    others = [image for image in registry.resident() if image.digest not in wanted]
    return [f"{names.get(image.digest, image.digest[:12])} ({size(image.bytes)})" for image in others]


def _show(planned: Sequence[Planned], found: dict[str, Any]) -> None:
    header = ("MODEL", "IN MEMORY", "IMAGE", "WORKSPACE", "KV PER TOKEN", "CONTEXT", "TOKENS FIT")
    table(header, [_row(model) for model in planned])
    for model in planned:
        if any(group["window"] for group in model.groups):
            click.echo(f"\n{model.name} keeps {', '.join(map(_group, model.groups))}.")
        for line in _short_of(model):
            click.echo(f"\n{model.name}{line}.")
        if model.slow:
            click.echo(f"\n{model.name}: {slowness(model.slow, model.image_bytes)}.")
    click.echo()
    room = found["room"]
    lines = [
        ("Images to burn", size(found["new_image_bytes"]), ""),
        ("Workspaces", size(found["workspace_bytes"]), f"at most, with {found['threads']} threads"),
        ("Scratchpad", size(found["scratchpad_bytes"]), _pages(found)),
        ("Its headers", size(found["scratchpad_header_bytes"]), "of the pages"),
        ("Needed", size(found["need"]), ""),
        ("Free", size(room["free"]), room["limit"]),
        ("Left", size(max(found["left"], 0)), ""),
    ]
    table(("MEMORY", "", ""), lines)
    if found["accepted"]:
        click.echo("\nThis fits.")


def _short_of(model: Planned) -> Iterator[str]:
    """What the scratchpad is too small for, with the size that would do."""
    fits, whole = model.tokens_that_fit, model.tokens_in_whole_chunks
    if fits is not None and fits < model.context:
        yield (
            f" is refused prompts of {fits:,} tokens and more, and its answers end there: a context of "
            f"{model.context:,} takes {_option(model.context_scratchpad)}"
        )
    if whole is not None and whole < min(model.context, model.context if fits is None else fits):
        yield f" computes prompts of {whole:,} tokens and more in chunks of fewer rows, for which there is room"


def _option(scratchpad: int) -> str:
    return f"--kv {scratchpad >> 20}M"


def _group(group: Mapping[str, int | None]) -> str:
    reach = f"of the last {group['window']:,} tokens" if group["window"] else "of every token"
    return f"{size(group['bytes_per_token'] or 0)} {reach} in {group['layers']} layers"


def _pages(found: dict[str, Any]) -> str:
    taken = found["scratchpad_taken"]
    kept = f"keys and values as {found['kv_type']}"
    return f"{kept}; {size(taken)} are in memory already" if taken else kept


def _row(model: Planned) -> list[str]:
    return [
        model.name,
        "yes" if model.digest else "no",
        size(model.image_bytes),
        size(model.workspace_bytes),
        size(model.kv_bytes_per_token),
        f"{model.context:,}",
        "any" if model.tokens_that_fit is None else f"{model.tokens_that_fit:,}",
    ]
