"""The format: round trips, and every way in which a header or a table can lie."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rom_toy import sections, stored, toy_tensors

from vai.errors import BadRequest, CorruptImage, WrongVersion
from vai.rom import image as form
from vai.rom.image import BLOCK_TYPES, VECTOR, Part, TensorTable

TENSORS, DATA_BYTES = toy_tensors()
SECTIONS = sections(b"", TENSORS, DATA_BYTES)
HEADER = form.build_header(SECTIONS, DATA_BYTES, burned_at=1.7e9, burn_seconds=2.5, host="burner")
FILE_BYTES = form.layout({name: len(s) for name, s in SECTIONS.items()}, DATA_BYTES).file_bytes


@st.composite
def _tables(draw: st.DrawFn) -> TensorTable:
    specification = []
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([*BLOCK_TYPES, VECTOR]))
        columns = 1 if kind == VECTOR else draw(st.integers(1, 300))
        count = draw(st.integers(1, 3))
        interleaved = count > 1 and draw(st.booleans())
        blocks = [draw(st.integers(1, 5))] * count if interleaved else draw(_counts(count))
        parts, end = [], 0
        for number, own in enumerate(blocks):
            rows = 16 * own - draw(st.integers(0, 15))
            first, step = (number, count) if interleaved else (end, 1)
            parts.append((f"part.{index}.{number}", rows, first, step))
            end += own
        specification.append((f"stored.{index}", kind, 16 * sum(blocks), columns, parts))
    tensors, data_bytes = stored(specification)
    chunks = [hashlib.sha256(bytes([i])).digest() for i in range(-(-data_bytes // form.CHUNK))]
    return TensorTable(data_bytes, chunks, tensors)


def _counts(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 5), min_size=count, max_size=count)


@given(_tables())
def test_a_table_survives_its_own_bytes(table: TensorTable) -> None:
    again = TensorTable.from_bytes(table.to_bytes())
    assert (again.tensors, again.chunks, again.data_bytes) == (table.tensors, table.chunks, table.data_bytes)
    assert again.to_bytes() == table.to_bytes()


@given(_tables())
def test_every_row_of_every_part_has_a_stored_row_of_its_own(table: TensorTable) -> None:
    for tensor in table.tensors:
        rows = [part.stored_row(r) for part in tensor.parts for r in range(part.rows)]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < tensor.rows for row in rows)


@given(_tables(), st.data())
def test_any_changed_byte_of_a_table_is_refused_or_changes_it(table: TensorTable, data: st.DataObject) -> None:
    section = bytearray(table.to_bytes())
    position = data.draw(st.integers(0, len(section) - 1))
    section[position] ^= data.draw(st.integers(1, 255))
    try:
        parsed = TensorTable.from_bytes(bytes(section))
    except (CorruptImage, WrongVersion):
        return
    assert parsed.to_bytes() == bytes(section) != table.to_bytes()


@given(st.binary(max_size=200))
def test_bytes_that_are_no_table_are_refused(section: bytes) -> None:
    with pytest.raises(CorruptImage):
        TensorTable.from_bytes(section)


def _lie(path: list[str | int], value: object) -> bytes:
    table = json.loads(TensorTable(DATA_BYTES, [bytes(32)] * -(-DATA_BYTES // form.CHUNK), TENSORS).to_bytes())
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return form.canonical_json(table)


QKV, GATE_UP = 2, 3
NAME, TYPE, ROWS, COLUMNS, OFFSET, BYTES, PARTS = range(7)
LIES = {
    "another chunk size": (["chunk_bytes"], 1 << 20),
    "no chunks": (["chunks"], []),
    "a chunk too many": (["chunks"], ["0" * 64] * 99),
    "a short chunk hash": (["chunks", 0], "0" * 63),
    "an upper-case chunk hash": (["chunks", 0], "A" * 64),
    "a chunk hash that is a number": (["chunks", 0], 5),
    "data that is longer": (["data_bytes"], DATA_BYTES + 4096),
    "data that is endless": (["data_bytes"], 1 << 80),
    "data that is negative": (["data_bytes"], -4096),
    "data that is true": (["data_bytes"], True),
    "data that is a float": (["data_bytes"], float(DATA_BYTES)),
    "a key nobody knows": (["extra"], 1),
    "no tensors": (["tensors"], []),
    "tensors that are a string": (["tensors"], "tensors"),
    "a tensor that is an object": (["tensors", 0], {}),
    "a tensor with a field too few": (["tensors", 0], ["a", "F32", 16]),
    "an empty name": (["tensors", 0, NAME], ""),
    "a name with a line break": (["tensors", 0, NAME], "a\nb"),
    "a name with a terminal escape": (["tensors", 0, NAME], "\x1b[2J"),
    "a name of a kilobyte": (["tensors", 0, NAME], "a" * 1024),
    "a name twice": (["tensors", 0, NAME], "blk.0.attn_qkv.weight"),
    "a type nobody knows": (["tensors", 0, TYPE], "Q3_K"),
    "rows that are no blocks": (["tensors", 0, ROWS], 1023),
    "no rows": (["tensors", 0, ROWS], 0),
    "negative rows": (["tensors", 0, ROWS], -16),
    "rows beyond 64 bits": (["tensors", 0, ROWS], 1 << 70),
    "no columns": (["tensors", 0, COLUMNS], 0),
    "columns of a vector": (["tensors", 1, COLUMNS], 2),
    "columns that are true": (["tensors", 1, COLUMNS], True),
    "an offset past the end": (["tensors", 0, OFFSET], 1 << 40),
    "an offset over a neighbour": (["tensors", QKV, OFFSET], 0),
    "an offset that is negative": (["tensors", 0, OFFSET], -4096),
    "bytes that are too few": (["tensors", 0, BYTES], 64),
    "bytes that are too many": (["tensors", 0, BYTES], 1 << 50),
    "no parts": (["tensors", QKV, PARTS], []),
    "more parts than blocks": (["tensors", 1, PARTS], [["p", 1, 0, 1]] * 5),
    "a part that is no list": (["tensors", QKV, PARTS, 0], 7),
    "a part with a name twice": (["tensors", QKV, PARTS, 0, 0], "blk.0.attn_k.weight"),
    "a part without rows": (["tensors", QKV, PARTS, 0, 1], 0),
    "a part of more rows than there are": (["tensors", QKV, PARTS, 0, 1], 1 << 60),
    "a part that begins elsewhere": (["tensors", QKV, PARTS, 1, 2], 65),
    "a part that begins before": (["tensors", QKV, PARTS, 1, 2], -1),
    "a part that steps over blocks": (["tensors", QKV, PARTS, 1, 3], 2),
    "a part that stands still": (["tensors", 0, PARTS, 0, 3], 0),
    "an interleaved part in its neighbour": (["tensors", GATE_UP, PARTS, 1, 2], 0),
    "an interleaved part that is shorter": (["tensors", GATE_UP, PARTS, 1, 1], 16),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_refused(lie: str) -> None:
    with pytest.raises(CorruptImage):
        TensorTable.from_bytes(_lie(*LIES[lie]))


def test_a_table_of_another_version_is_refused_by_number() -> None:
    with pytest.raises(WrongVersion, match="version 1, not 2"):
        TensorTable.from_bytes(_lie(["abi"], 1))


@pytest.mark.parametrize(
    "change", [lambda s: s + b"\n", lambda s: s.replace(b",", b", ", 1), lambda s: s.decode().encode("utf-16")]
)
def test_a_table_has_one_spelling(change: object) -> None:
    with pytest.raises(CorruptImage, match=r"canonical|JSON"):
        TensorTable.from_bytes(change(SECTIONS["tensors"]))


@pytest.mark.parametrize("bomb", [b"[" * 1_000_000, b"1" * 1_000_000, b'{"abi":' + b"9" * 100_000 + b"}"])
def test_json_that_would_exhaust_the_parser_is_refused(bomb: bytes) -> None:
    with pytest.raises(CorruptImage):
        TensorTable.from_bytes(bomb)


def test_a_logical_tensor_is_found_inside_the_fused_one() -> None:
    tensor, part = TensorTable(DATA_BYTES, [bytes(32)], TENSORS).find("blk.0.attn_v.weight")
    assert tensor.name == "blk.0.attn_qkv.weight"
    assert part == Part("blk.0.attn_v.weight", 241, 80, 1)
    assert part.stored_row(17) == 16 * 81 + 1


def test_a_tensor_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"blk\.7\.attn_q\.weight"):
        TensorTable(DATA_BYTES, [bytes(32)], TENSORS).find("blk.7.attn_q.weight")


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "size"),
    [
        ("Q4_0", 32, 65, 2 * 2 * 576),
        ("Q8_0", 16, 64, 1088),
        ("F16", 16, 33, 2048),
        ("F32", 16, 16, 1024),
        (VECTOR, 48, 1, 192),
    ],
)
def test_stored_sizes_are_those_of_the_specification(kind: str, rows: int, columns: int, size: int) -> None:
    assert form.tensor_bytes(kind, rows, columns) == size


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=20))
def test_placed_tensors_are_aligned_and_apart(sizes: list[int]) -> None:
    offsets, data_bytes = form.place(sizes)
    end = 0
    for offset, size in zip(offsets, sizes, strict=True):
        assert offset >= end
        assert offset % (4096 if size >= 4096 else 64) == 0
        end = offset + size
    assert end <= data_bytes < end + 4096


# --- header -----------------------------------------------------------------------------------------------------------


def test_a_header_survives_its_own_bytes() -> None:
    header = form.parse_header(HEADER, FILE_BYTES)
    assert (header.data_bytes, header.file_bytes) == (DATA_BYTES, FILE_BYTES)
    assert (header.burned_at, header.burn_seconds, header.host) == (1.7e9, 2.5, "burner")
    assert header.data_offset == 2 << 20
    assert header.sections["tensors"].offset == header.data_offset + DATA_BYTES
    last = header.sections["provenance"]
    assert last.offset + last.length == FILE_BYTES
    assert header.sections["spec"].sha256 == hashlib.sha256(SECTIONS["spec"]).digest()
    assert header.weights == form.weights_id(SECTIONS["tensors"], SECTIONS["spec"])


@given(st.integers(0, form.HEADER_BYTES - 1), st.integers(1, 255))
def test_a_changed_header_byte_is_refused_unless_no_hash_covers_it(position: int, change: int) -> None:
    changed = bytearray(HEADER)
    changed[position] ^= change
    honest = form.parse_header(HEADER, FILE_BYTES)
    try:
        header = form.parse_header(bytes(changed), FILE_BYTES)
    except (CorruptImage, WrongVersion):
        return
    assert 80 <= position < 160
    assert (header.digest, header.sections, header.weights) == (honest.digest, honest.sections, honest.weights)
    assert header.host.isprintable()
    assert 0 <= header.burned_at < 1e11 and 0 <= header.burn_seconds < 1e11


def _signed(**fields: int) -> bytes:
    """A header whose section table lies and whose digest is right for the lie."""
    changed = bytearray(HEADER)
    for name, value in fields.items():
        index, field = name.split("_")
        at = 256 + 64 * int(index[1:]) + {"offset": 16, "length": 24}[field]
        changed[at : at + 8] = struct.pack("<Q", value)
    changed[48:80] = hashlib.sha256(changed[256:640]).digest()
    return bytes(changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"s0_offset": 0},
        {"s0_offset": 1 << 63},
        {"s1_offset": 4096},
        {"s0_offset": form.HEADER_BYTES},  # where sections lay before the data
        {"s0_offset": form.DATA_OFFSET},  # on the data
        {"s0_offset": form.DATA_OFFSET + DATA_BYTES - 64},
        {"s0_offset": form.DATA_OFFSET + DATA_BYTES + 64},
        {"s5_offset": FILE_BYTES},
        {"s1_length": 0},
        {"s1_length": 1 << 30},
        {"s5_length": (1 << 64) - 1},
        {"s5_length": 1 << 22},
    ],
)
def test_a_section_table_that_lies_is_refused_even_when_its_hash_is_right(fields: dict[str, int]) -> None:
    assert form.parse_header(_signed(), FILE_BYTES)
    with pytest.raises(CorruptImage):
        form.parse_header(_signed(**fields), FILE_BYTES)


def test_a_section_under_another_name_is_refused() -> None:
    changed = bytearray(HEADER)
    changed[256 + 64 : 256 + 68] = b"evil"
    changed[48:80] = hashlib.sha256(changed[256:640]).digest()
    with pytest.raises(CorruptImage, match="spec"):
        form.parse_header(bytes(changed), FILE_BYTES)


@pytest.mark.parametrize("at", [24, 32, 40])
@pytest.mark.parametrize("value", [0, 1, 4096, (1 << 46) + 4096, (1 << 64) - 4096])
def test_sizes_that_contradict_each_other_are_refused(at: int, value: int) -> None:
    changed = bytearray(HEADER)
    changed[at : at + 8] = struct.pack("<Q", value)
    with pytest.raises(CorruptImage):
        form.parse_header(bytes(changed), FILE_BYTES)


@pytest.mark.parametrize("size", [0, FILE_BYTES - 1, FILE_BYTES + 1, FILE_BYTES * 2])
def test_a_file_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(CorruptImage, match=f"has {size}"):
        form.parse_header(HEADER, size)


def test_another_abi_is_refused_by_number() -> None:
    with pytest.raises(WrongVersion, match="format version 9; this VAI reads 2"):
        form.parse_header(HEADER[:8] + struct.pack("<I", 9) + HEADER[12:], FILE_BYTES)


@pytest.mark.parametrize("first", [b"", b"GGUF", HEADER[:4095], bytes(4096)])
def test_what_is_no_image_is_refused_by_name(first: bytes) -> None:
    with pytest.raises(CorruptImage, match="not a ROM image"):
        form.parse_header(first, len(first))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_burn_time_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(CorruptImage):
        form.parse_header(HEADER[:80] + struct.pack("<d", seconds) + HEADER[88:], FILE_BYTES)


def test_a_long_host_name_is_cut_at_a_character() -> None:
    header = form.build_header(SECTIONS, DATA_BYTES, burned_at=0.0, burn_seconds=0.0, host="ä" * 60)
    assert form.parse_header(header, FILE_BYTES).host == "ä" * 31


# --- identity ---------------------------------------------------------------------------------------------------------


def test_canonical_json_has_one_spelling() -> None:
    assert form.canonical_json({"b": [1, 2.5, None], "a": "é\n"}) == '{"a":"é\\n","b":[1,2.5,null]}'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        form.canonical_json({"x": float("nan")})


def test_weights_depend_on_tensors_and_spec_alone() -> None:
    base = form.weights_id(SECTIONS["tensors"], SECTIONS["spec"])
    assert form.weights_id(SECTIONS["tensors"] + b" ", SECTIONS["spec"]) != base
    assert form.weights_id(SECTIONS["tensors"], SECTIONS["spec"] + b" ") != base
    other = sections(b"", TENSORS, DATA_BYTES, template=b'{"chat_template":"x"}')
    header = form.build_header(other, DATA_BYTES, burned_at=0.0, burn_seconds=0.0, host="")
    parsed = form.parse_header(header, FILE_BYTES)
    assert parsed.weights == base
    assert parsed.digest != form.parse_header(HEADER, FILE_BYTES).digest


def test_a_table_knows_the_tensors_of_each_chunk() -> None:
    table = TensorTable(DATA_BYTES, [bytes(32)], TENSORS)
    assert [t.name for t in table.at(0)] == [t.name for t in TENSORS if t.offset < form.CHUNK]
    assert [t.name for t in table.at(1)] == [t.name for t in TENSORS if t.offset + t.bytes > form.CHUNK]
