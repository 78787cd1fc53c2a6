"""The ROM format, without I/O: header, section table, tensor table, identities. Specified in `docs/rom-format.md`.

Everything parsed here may be hostile: every count, size and offset is checked before it is used, and the layout is
canonical, so that checking is recomputing and comparing.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vai.errors import BadRequest, CorruptImage, WrongVersion

MAGIC = b"VAI-ROM\n"
ABI = 2
STATE_FROZEN = 1

CHUNK = 4 << 20  # bytes of data one SHA-256 covers
DATA_ALIGN = 2 << 20  # a huge page, in the file and in memory
DATA_OFFSET = DATA_ALIGN
TENSOR_ALIGN = 4096
SMALL_ALIGN = 64  # tensors under 4,096 bytes
SECTION_ALIGN = 64
HEADER_BYTES = 4096
SECTIONS = ("tensors", "spec", "tokenizer", "template", "defaults", "provenance")

MAX_SECTION = 256 << 20
MAX_DATA = 1 << 46
MAX_TENSORS = 1 << 16
MAX_EXTENT = 1 << 31  # rows or columns of one tensor

# magic, ABI, state, sections, reserved, file bytes, data offset, data bytes, digest, burned at, burn seconds, host
_FIXED = struct.Struct("<8sIIIIQQQ32sdd64s")
_ENTRY = struct.Struct("<16sQQ32s")
_TABLE_OFFSET = 256
_TABLE_BYTES = _ENTRY.size * len(SECTIONS)
_NAME = re.compile(r"[\x21-\x7e]{1,256}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


# --- block types ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockType:
    """How one block (16 rows x `k` columns) is stored in `bytes` bytes.

    group: columns whose activations share a scale in the exact kind; 0 = float activations. slow: the checkpoint's own
    blocks, one behind the other, of which kernels make binary32 weight by weight.
    """

    name: str
    k: int
    bytes: int
    group: int
    slow: bool = False


BLOCK_TYPES: Mapping[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("Q4_0", 64, 576, 32),
        BlockType("Q4_1", 64, 640, 32),
        BlockType("Q5_0", 64, 704, 32),
        BlockType("Q5_1", 64, 768, 32),
        BlockType("Q8_0", 64, 1088, 32),
        BlockType("Q4_K", 256, 2304, 256),
        BlockType("Q5_K", 256, 2816, 256),
        BlockType("Q6_K", 256, 3392, 256),
        BlockType("IQ4_NL", 64, 576, 32),
        BlockType("IQ4_XS", 256, 2176, 256),
        BlockType("MXFP4", 64, 544, 32),
        BlockType("Q2_K", 256, 16 * 84, 0, slow=True),
        BlockType("Q3_K", 256, 16 * 110, 0, slow=True),
        BlockType("IQ1_S", 256, 16 * 50, 0, slow=True),
        BlockType("IQ1_M", 256, 16 * 56, 0, slow=True),
        BlockType("IQ2_XXS", 256, 16 * 66, 0, slow=True),
        BlockType("IQ2_XS", 256, 16 * 74, 0, slow=True),
        BlockType("IQ2_S", 256, 16 * 82, 0, slow=True),
        BlockType("IQ3_XXS", 256, 16 * 98, 0, slow=True),
        BlockType("IQ3_S", 256, 16 * 110, 0, slow=True),
        BlockType("TQ1_0", 256, 16 * 54, 0, slow=True),
        BlockType("TQ2_0", 256, 16 * 66, 0, slow=True),
        BlockType("F16", 32, 1024, 0),
        BlockType("BF16", 32, 1024, 0),
        BlockType("F32", 16, 1024, 0),
    )
}
VECTOR = "VECTOR"  # raw little-endian binary32: norms and biases
BLOCK_ROWS = 16


def align(value: int, to: int) -> int:
    """The smallest multiple of `to` that is at least `value`."""
    return -(-value // to) * to


def tensor_bytes(type: str, rows: int, columns: int) -> int:
    """Stored size of a tensor of `rows` stored rows (a multiple of 16) and `columns` columns. Raises KeyError."""
    if type == VECTOR:
        return 4 * rows
    block = BLOCK_TYPES[type]
    return (rows // BLOCK_ROWS) * -(-columns // block.k) * block.bytes


# --- tensors ----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A logical tensor inside a stored one: its name in the checkpoint, its rows, where its blocks of 16 rows lie."""

    name: str
    rows: int
    first_block: int
    block_step: int

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows this part owns; the last may be padded."""
        return -(-self.rows // BLOCK_ROWS)

    def stored_row(self, row: int) -> int:
        """Stored row of this part's row `row` (for a VECTOR: of its element)."""
        return BLOCK_ROWS * (self.first_block + (row // BLOCK_ROWS) * self.block_step) + row % BLOCK_ROWS


class StoredTensor(NamedTuple):
    """One tensor as it lies in the data area.

    rows: stored rows, a multiple of 16 (VECTOR: elements) · columns: the real K (VECTOR: 1) · offset: in the data
    area · bytes: `tensor_bytes(type, rows, columns)` · parts: the logical tensors in it.
    """

    name: str
    type: str
    rows: int
    columns: int
    offset: int
    bytes: int
    parts: tuple[Part, ...]


def place(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Offsets of tensors of these sizes, in this order, and the bytes of the data area: the only layout there is."""
    offsets, end = [], 0
    for size in sizes:
        offset = align(end, TENSOR_ALIGN if size >= TENSOR_ALIGN else SMALL_ALIGN)
        offsets.append(offset)
        end = offset + size
    return offsets, align(end, TENSOR_ALIGN)


_TABLE_KEYS = ["abi", "chunk_bytes", "chunks", "data_bytes", "tensors"]


class TensorTable:
    """The `tensors` section: what lies where in the data area, and a SHA-256 per chunk of it.

    With chunk hashes of zeros it has its final length, so that a burner can plan the file before it has hashed.
    """

    __slots__ = ("_parts", "chunk_bytes", "chunks", "data_bytes", "tensors")

    def __init__(self, data_bytes: int, chunks: Sequence[bytes], tensors: Sequence[StoredTensor]) -> None:
        self.chunk_bytes = CHUNK
        self.data_bytes = data_bytes
        self.chunks = tuple(chunks)
        self.tensors = tuple(tensors)
        self._parts = {part.name: (tensor, part) for tensor in self.tensors for part in tensor.parts}

    def find(self, name: str) -> tuple[StoredTensor, Part]:
        """The stored tensor that holds the logical tensor `name`, and its part there. Raises BadRequest."""
        try:
            return self._parts[name]
        except KeyError:
            raise BadRequest(f"The image has no tensor '{name}'; `vai show` lists those it has.") from None

    def slow_bytes(self) -> dict[str, int]:
        """Bytes of tensors in each type that kernels unpack weight by weight; such types only."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.type != VECTOR and BLOCK_TYPES[tensor.type].slow:
                found[tensor.type] = found.get(tensor.type, 0) + tensor.bytes
        return found

    def names(self) -> list[str]:
        """Logical names, in stored order."""
        return list(self._parts)

    def at(self, chunk: int) -> list[StoredTensor]:
        """The tensors with bytes in this chunk."""
        low, high = chunk * self.chunk_bytes, (chunk + 1) * self.chunk_bytes
        return [t for t in self.tensors if t.offset < high and t.offset + t.bytes > low]

    def to_bytes(self) -> bytes:
        """The section, canonical."""
        return canonical_json(
            {
                "abi": ABI,
                "chunk_bytes": self.chunk_bytes,
                "chunks": [chunk.hex() for chunk in self.chunks],
                "data_bytes": self.data_bytes,
                "tensors": self.tensors,
            }
        )

    @classmethod
    def from_bytes(cls, section: bytes) -> TensorTable:
        """Parse and check everything. Raises CorruptImage (WrongVersion for another ABI)."""
        try:
            table = json.loads(section)
        except (ValueError, RecursionError):
            raise CorruptImage("The tensor table is not JSON; burn the model again.") from None
        _check(type(table) is dict and sorted(table) == _TABLE_KEYS, "its keys are not those it must have")
        if table["abi"] != ABI:
            raise WrongVersion(f"The tensor table has version {table['abi']!r:.20}, not {ABI}; burn the model again.")
        chunks, data_bytes, tensors = _typed([table[key] for key in _TABLE_KEYS[2:]], [list, int, list])
        _check(0 < data_bytes <= MAX_DATA, "its data area is empty or endless")
        _check(len(chunks) == -(-data_bytes // CHUNK), "it has not one hash a chunk")
        _check(all(type(c) is str and _DIGEST.fullmatch(c) for c in chunks), "a chunk hash is not a SHA-256")
        _check(len(tensors) <= MAX_TENSORS, "it has too many tensors")
        parsed = cls(data_bytes, [bytes.fromhex(c) for c in chunks], [_stored(t) for t in tensors])
        parsed._check_layout()
        _check(parsed.to_bytes() == section, "it is not in canonical form")
        return parsed

    def _check_layout(self) -> None:
        _check(len({t.name for t in self.tensors}) == len(self.tensors), "two stored tensors have one name")
        parts = sum(len(t.parts) for t in self.tensors)
        _check(len(self._parts) == parts, "two logical tensors have one name")
        offsets, data_bytes = place(t.bytes for t in self.tensors)
        _check([t.offset for t in self.tensors] == offsets, "a tensor does not lie where the layout puts it")
        _check(data_bytes == self.data_bytes, "the data area is not as long as its tensors")


def _check(condition: bool, fault: str) -> None:
    if not condition:
        raise CorruptImage(f"The tensor table is wrong: {fault}; burn the model again.")


_TENSOR_TYPES = [str, str, int, int, int, int, list]
_PART_TYPES = [str, int, int, int]


def _typed(value: Any, types: list[type]) -> list[Any]:
    # type(), not isinstance: to JSON, true is not 1.
    _check(type(value) is list and [type(item) for item in value] == types, "an entry has not the fields it must have")
    checked: list[Any] = value
    return checked


def _stored(value: Any) -> StoredTensor:
    name, kind, rows, columns, offset, size, parts = _typed(value, _TENSOR_TYPES)
    _check(_NAME.fullmatch(name) is not None, "a name is not 1 to 256 printable characters")
    _check(kind == VECTOR or kind in BLOCK_TYPES, f"{name} has an unknown type")
    _check(0 < rows <= MAX_EXTENT and 0 < columns <= MAX_EXTENT, f"{name} has a shape out of bounds")
    _check(rows % BLOCK_ROWS == 0, f"{name} has rows that are not a multiple of 16")
    _check(kind != VECTOR or columns == 1, f"{name} is a vector with columns")
    _check(size == tensor_bytes(kind, rows, columns), f"{name} has not the bytes of its shape")
    _check(0 < len(parts) <= rows // BLOCK_ROWS, f"{name} has no parts, or too many")
    stored = StoredTensor(name, kind, rows, columns, offset, size, tuple(_part(part) for part in parts))
    _check(_tiles(stored.parts, rows // BLOCK_ROWS), f"the parts of {name} do not tile its rows")
    return stored


def _part(value: Any) -> Part:
    name, rows, first_block, block_step = _typed(value, _PART_TYPES)
    _check(_NAME.fullmatch(name) is not None, "a name is not 1 to 256 printable characters")
    return Part(name, rows, first_block, block_step)


def _tiles(parts: tuple[Part, ...], blocks: int) -> bool:
    """Whether the parts own every block once: one after the other, or interleaved block by block."""
    if any(p.rows < 1 for p in parts):
        return False
    if all(p.block_step == 1 for p in parts):
        end = 0
        for part in parts:
            if part.first_block != end:
                return False
            end += part.blocks
        return end == blocks
    step = len(parts)
    return all(p.block_step == step and p.first_block == i and p.blocks * step == blocks for i, p in enumerate(parts))


# --- identity ---------------------------------------------------------------------------------------------------------


def canonical_json(obj: object) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, no escapes beyond JSON's own: one value, one byte string.

    Raises ValueError for NaN and infinities, TypeError for what JSON has no word for.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def weights_id(tensors_section: bytes, spec_section: bytes) -> str:
    """What keys Program, KV and speculation: weights and architecture, not tokenizer or template. 64 hex digits."""
    return _weights(hashlib.sha256(tensors_section).digest(), hashlib.sha256(spec_section).digest())


def _weights(tensors: bytes, spec: bytes) -> str:
    return hashlib.sha256(b"VAI weights 1\n" + tensors + spec).hexdigest()


def is_digest(text: str) -> bool:
    """Whether this is 64 lower-case hex digits, and so safe as a file name."""
    return _DIGEST.fullmatch(text) is not None


# --- header -----------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """Where a metadata section lies in the file, in bytes, and its SHA-256."""

    offset: int
    length: int
    sha256: bytes


class Layout(NamedTuple):
    """Where everything goes, from the lengths of the sections and the data alone. Bytes."""

    section_offsets: tuple[int, ...]
    data_offset: int
    file_bytes: int


def layout(lengths: Mapping[str, int], data_bytes: int) -> Layout:
    """The only layout there is for sections of these lengths (one for each of SECTIONS) and this much data."""
    offsets, end = [], DATA_OFFSET + data_bytes
    for name in SECTIONS:
        offsets.append(align(end, SECTION_ALIGN))
        end = offsets[-1] + lengths[name]
    return Layout(tuple(offsets), DATA_OFFSET, end)


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header. burned_at: seconds since 1970 · burn_seconds: how long · host: where; these three unhashed."""

    sections: Mapping[str, Section]
    data_offset: int
    data_bytes: int
    file_bytes: int
    digest: str
    burned_at: float
    burn_seconds: float
    host: str

    @property
    def weights(self) -> str:
        """`weights_id` of this image, from the hashes in the section table."""
        return _weights(self.sections["tensors"].sha256, self.sections["spec"].sha256)


def build_header(
    sections: Mapping[str, bytes], data_bytes: int, *, burned_at: float, burn_seconds: float, host: str
) -> bytes:
    """The first 4,096 bytes of a frozen image with these sections and this much data."""
    plan = layout({name: len(sections[name]) for name in SECTIONS}, data_bytes)
    table = b"".join(
        _ENTRY.pack(name.encode(), offset, len(sections[name]), hashlib.sha256(sections[name]).digest())
        for name, offset in zip(SECTIONS, plan.section_offsets, strict=True)
    )
    fixed = _FIXED.pack(
        MAGIC,
        ABI,
        STATE_FROZEN,
        len(SECTIONS),
        0,
        plan.file_bytes,
        plan.data_offset,
        data_bytes,
        hashlib.sha256(table).digest(),
        burned_at,
        burn_seconds,
        host.encode()[:63].decode(errors="ignore").encode(),
    )
    return (fixed.ljust(_TABLE_OFFSET, b"\0") + table).ljust(HEADER_BYTES, b"\0")


def parse_header(first_bytes: bytes, file_size: int) -> Header:
    """Check and parse the first 4,096 bytes of a file of `file_size` bytes. Raises CorruptImage, WrongVersion."""
    if len(first_bytes) < HEADER_BYTES or not first_bytes.startswith(MAGIC):
        raise CorruptImage("This file is not a ROM image; remove it and burn the model again.")
    (_, abi, state, count, reserved, file_bytes, data_offset, data_bytes, digest, burned_at, seconds, host) = (
        _FIXED.unpack_from(first_bytes)
    )
    if abi != ABI:
        raise WrongVersion(f"This image has format version {abi}; this VAI reads {ABI}. Burn the model again.")
    table = first_bytes[_TABLE_OFFSET : _TABLE_OFFSET + _TABLE_BYTES]
    _require(state == STATE_FROZEN, "its burn never ended")
    _require(count == len(SECTIONS) and reserved == 0, "its section count is wrong")
    _require(hashlib.sha256(table).digest() == digest, "its section table does not have its hash")
    _require(not any(first_bytes[_FIXED.size : _TABLE_OFFSET]), "its header padding is not zero")
    _require(not any(first_bytes[_TABLE_OFFSET + _TABLE_BYTES : HEADER_BYTES]), "its header padding is not zero")
    sections = _sections(table)
    _require(0 < data_bytes <= MAX_DATA and data_bytes % TENSOR_ALIGN == 0, "its data size is out of bounds")
    plan = layout({name: section.length for name, section in sections.items()}, data_bytes)
    _require(plan.section_offsets == tuple(s.offset for s in sections.values()), "its sections lie elsewhere")
    _require((plan.data_offset, plan.file_bytes) == (data_offset, file_bytes), "its sizes contradict each other")
    _require(0 <= burned_at < 1e11 and 0 <= seconds < 1e11, "its burn time is no time")
    _require(file_bytes == file_size, f"it should have {file_bytes} bytes and has {file_size}")
    return Header(
        sections=sections,
        data_offset=data_offset,
        data_bytes=data_bytes,
        file_bytes=file_bytes,
        digest=digest.hex(),
        burned_at=burned_at,
        burn_seconds=seconds,
        host="".join(c if c.isprintable() else "?" for c in host.rstrip(b"\0").decode(errors="replace")),
    )


def _sections(table: bytes) -> dict[str, Section]:
    sections = {}
    for expected, (name, offset, length, sha256) in zip(SECTIONS, _ENTRY.iter_unpack(table), strict=True):
        _require(name == expected.encode().ljust(16, b"\0"), f"its section table lacks '{expected}'")
        _require(length <= MAX_SECTION, f"its section '{expected}' is too long")
        sections[expected] = Section(offset, length, sha256)
    return sections


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise CorruptImage(f"The image is corrupt: {fault}. Remove it and burn the model again.")
