"""Burning: a checkpoint becomes a ROM image. Plan, take the room, pack and prove and hash, publish.

The data area is cut into pairs of the image's 4 MiB chunks. They depend on the checkpoint alone, so threads take them
independently: each packs a pair where it belongs, or into a buffer of its own that it then writes, and hashes it; what
is hashed is what was proved.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from vai.burn import _pack
from vai.burn.gguf import GgufFile
from vai.burn.pack import ImagePlan, pack_range, plan_image
from vai.burn.recommended import recommended
from vai.errors import MalformedFile, NotSupported
from vai.models.spec import Spec, rope_divisors_tensor, spec_from_gguf
from vai.rom.image import CHUNK, Layout, TensorTable, canonical_json, layout, weights_id
from vai.rom.segment import Partial
from vai.text.fields import read as read_fields
from vai.text.template import template_section
from vai.text.tokenizer import tokenizer_section

# The part of `general.*` that says what a checkpoint is; everything else there is prose, links and tool versions.
_GENERAL = ("architecture", "name", "basename", "finetune", "size_label", "version", "license", "type", "file_type")
_MAX_GENERAL = 1024  # characters of one such value

_TOGETHER = 2 * CHUNK  # what a thread takes at a time: one core hashes two chunks in little more time than one


class Progress(NamedTuple):
    """How far a burn is. phase: "reading", "packing" or "publishing" · done, total: bytes of the image's data."""

    phase: str
    done: int
    total: int
    seconds: float


class Burned(NamedTuple):
    """A published image. bytes: of its file · seconds: from opening the checkpoint to publication."""

    digest: str
    weights: str
    bytes: int
    seconds: float


class Preview(NamedTuple):
    """What burning a file would make: the model, its tensors (chunk hashes are zeros), and the bytes of the image."""

    spec: Spec
    table: TensorTable
    file_bytes: int


def preview(source: Path) -> Preview:
    """What `burn` would make of a GGUF file, exact to the byte, from its header alone. Raises as `burn` does."""
    with _hurried(), GgufFile(source) as gguf:
        spec = _spec(gguf)
        plan = plan_image(gguf, spec)
        return Preview(spec, _table(plan), _layout(_sections(gguf, spec, plan), plan).file_bytes)


def burn(
    source: Path,
    root: Path,
    *,
    recipe: Mapping[str, object] | None = None,
    threads: int = 2,
    huge_pages: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Burned:
    """Burn the GGUF file `source` into an image under `root`.

    Deterministic: one file and one recipe give one digest everywhere; an image of that digest that is there already
    stays as it is. If anything fails, `progress` raising included, nothing remains of the attempt.

    recipe: what is to be changed on the way; nothing can be yet. huge_pages: take 2 MiB pages where the kernel gives
    them at once, which is also the fastest; the image is the same without. progress: called in this thread, first
    before any room is taken, then after each chunk, and once with "publishing", after which there is no way back.

    Raises ModelNotFound, BadRequest (cannot be read), MalformedFile, UnsupportedModel, NotSupported, NotEnoughRoom
    (before a byte is written), Unavailable (the root), CorruptImage (the proof failed).
    """
    began = time.monotonic()
    if recipe:
        raise NotSupported(f"No recipe can be applied while burning yet: {', '.join(sorted(recipe))}.", param="recipe")

    def report(phase: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(phase, done, total, time.monotonic() - began))

    report("reading", 0, 0)
    with _hurried(), GgufFile(source) as gguf:
        spec = _spec(gguf)
        plan = plan_image(gguf, spec)
        report("packing", 0, plan.data_bytes)
        # The sections hold what the header of the file holds, and a tensor table besides.
        section_bytes = gguf.header_bytes + len(_table(plan).to_bytes())
        with Partial(root, data_bytes=plan.data_bytes, section_bytes=section_bytes, huge_pages=huge_pages) as partial:
            chunks: list[bytes] = []
            with _chunks(plan, gguf, partial, threads) as hashes:
                sections = _sections(gguf, spec, plan)  # while others pack
                for chunk in hashes:
                    chunks.append(chunk)
                    report("packing", min(len(chunks) * CHUNK, plan.data_bytes), plan.data_bytes)
            sections["tensors"] = TensorTable(plan.data_bytes, chunks, plan.stored()).to_bytes()
            report("publishing", plan.data_bytes, plan.data_bytes)
            digest = partial.publish(sections, time.monotonic() - began)
            seconds = time.monotonic() - began
        file_bytes = _layout(sections, plan).file_bytes
    return Burned(digest, weights_id(sections["tensors"], sections["spec"]), file_bytes, seconds)


@contextmanager
def _hurried() -> Iterator[None]:
    """No cyclic garbage collection: a vocabulary is half a million objects that all stay, and looking through them
    again and again would double the time they take. And short turns: threads that pack need the interpreter lock for an
    instant each time, and would wait for it as long as they work."""
    collecting, turn = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        if collecting:
            gc.enable()


def _spec(gguf: GgufFile) -> Spec:
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    divisors: list[int] | list[float] = []
    name = rope_divisors_tensor(gguf.metadata, gguf.tensors)
    if name in gguf.tensors:
        if gguf.tensors[name].type != "F32":
            raise MalformedFile(f"The tensor {name} must be F32.")
        with gguf.data(name) as data, data.cast("f") as values:
            divisors = values.tolist()
    return spec_from_gguf(gguf.metadata, shapes, rope_divisors=divisors)


def _layout(sections: Mapping[str, bytes], plan: ImagePlan) -> Layout:
    return layout({name: len(section) for name, section in sections.items()}, plan.data_bytes)


def _table(plan: ImagePlan) -> TensorTable:
    """The tensor table with chunk hashes of zeros, which do not change its length."""
    return TensorTable(plan.data_bytes, [bytes(32)] * -(-plan.data_bytes // CHUNK), plan.stored())


def _sections(gguf: GgufFile, spec: Spec, plan: ImagePlan) -> dict[str, bytes]:
    """Every section of the image, the tensor table still without its hashes."""
    words = read_fields(gguf.metadata)
    return {
        "tensors": _table(plan).to_bytes(),
        "spec": spec.to_bytes(),
        "tokenizer": tokenizer_section(words),
        "template": template_section(words),
        "defaults": canonical_json(recommended(gguf.metadata)),
        "provenance": _provenance(gguf),
    }


def _provenance(gguf: GgufFile) -> bytes:
    """What the image was made from: content only, so that who burned it, where and when never changes the digest."""
    general = {key: gguf.metadata.get(f"general.{key}") for key in _GENERAL}
    return canonical_json(
        {
            "format": "gguf",
            "recipe": {},
            "source_header_sha256": gguf.header_sha256(),
            "vai_format": 1,
            "general": {
                key: value
                for key, value in general.items()
                if type(value) is int or (isinstance(value, str) and len(value) <= _MAX_GENERAL)
            },
        }
    )


@contextmanager
def _chunks(plan: ImagePlan, gguf: GgufFile, partial: Partial, threads: int) -> Iterator[Iterator[bytes]]:
    """Pack and write every chunk; inside the block, their SHA-256 in order, as they are ready.

    Left early, chunks not begun are dropped and those begun are waited for, since they use the mappings.
    """
    buffers: SimpleQueue[bytearray] = SimpleQueue()
    for _ in range(threads):
        buffers.put(bytearray())

    def one(start: int) -> list[bytes]:
        size = min(_TOGETHER, plan.data_bytes - start)
        place = partial.window(start, size)
        if place is not None:
            with place:
                return _fill(plan, gguf, start, place)
        buffer = buffers.get()
        try:
            buffer.extend(bytes(max(0, size - len(buffer))))
            with memoryview(buffer)[:size] as window:
                hashes = _fill(plan, gguf, start, window)
                partial.write(window, start)
                return hashes
        finally:
            buffers.put(buffer)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="burn")
    try:
        yield chain.from_iterable(pool.map(one, range(0, plan.data_bytes, _TOGETHER)))
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(plan: ImagePlan, gguf: GgufFile, start: int, window: memoryview) -> list[bytes]:
    """Pack the chunks from byte `start` of the data area on; their hashes."""
    pack_range(plan, gguf, start, window)
    return chunk_hashes(window, CHUNK, native=_pack.can_hash())


def chunk_hashes(data: memoryview, chunk: int, *, native: bool) -> list[bytes]:
    """SHA-256 of each `chunk` bytes. native: two at a time, where `_pack.can_hash()`."""
    if not native:
        return [hashlib.sha256(data[at : at + chunk]).digest() for at in range(0, len(data), chunk)]
    hashes = _pack.hash_each(data, chunk)
    return [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
