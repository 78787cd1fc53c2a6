"""Tiles hold what the rows hold: against the layout's definition, bit by bit, and against the format's own package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import gguf as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vai.burn import _pack
from vai.burn.burn import chunk_hashes
from vai.rom.image import BLOCK_TYPES, tensor_bytes

Bytes = NDArray[np.uint8]
GROUPS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
SUPERBLOCKS = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # of 256
RAW = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")
QUANTIZED = GROUPS_OF_32 + SUPERBLOCKS
VALUE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
MATRICES = (*QUANTIZED, *VALUE_BYTES)  # whose every number has a place of its own


def block_columns(type: str) -> int:
    """Columns of the format's own blocks."""
    return 1 if type in VALUE_BYTES else 32 if type in GROUPS_OF_32 else 256


def row_bytes(type: str, columns: int) -> int:
    block, size = oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType[type]]
    return columns // block * size


def source(type: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)


Bits = list[tuple[int, int, int]]  # (byte, shift, count): the bits of a number in pieces, lowest first


def nibble(line: int, n: int, k: int) -> Bits:
    """Element k of row n in nibble lines that begin at byte `line`."""
    within = k % 8
    position = 2 * within if within < 4 else 2 * (within - 4) + 1
    return [(line + 64 * (k // 8) + 4 * n + position // 2, 4 * (position % 2), 4)]


def fifth(line: int, n: int, k: int) -> Bits:
    return [(line + 64 * (k // 32) + 4 * n + k % 4, k % 32 // 4, 1)]


def half(byte: int) -> Bits:
    return [(byte, 0, 8), (byte + 1, 0, 8)]


def places(type: str, row: int, k: int, columns: int) -> dict[str, Bits]:
    """Where docs/rom-format.md puts what element (row, k) is made of: its code or value, and the scales it needs."""
    block = BLOCK_TYPES[type]
    base = ((row // 16) * -(-columns // block.k) + k // block.k) * block.bytes
    n, k = row % 16, k % block.k
    d = half(base + 32 * (k // 32) + 2 * n)
    low = [(base + 64 + 16 * (k // 32) + n, shift, 4) for shift in (0, 4)]
    high = [(base + 192 + 16 * (k // 32 % 4) + n, shift + (4 if k >= 128 else 0), 2) for shift in (0, 2)]
    scales = {"d": half(base + 2 * n), "dmin": half(base + 32 + 2 * n), "sc": [low[0], high[0]], "m": [low[1], high[1]]}
    match type:
        case "F32":
            return {"value": [(base + 64 * k + 4 * n + i, 0, 8) for i in range(4)]}
        case "F16" | "BF16":
            return {"value": half(base + 64 * (k // 2) + 4 * n + 2 * (k % 2))}
        case "Q8_0":
            return {"code": [(base + 64 + 64 * (k // 4) + 4 * n + k % 4, 0, 8)], "d": d}
        case "Q4_0":
            return {"code": nibble(base + 64, n, k), "d": d}
        case "Q4_1":
            return {"code": nibble(base + 128, n, k), "d": d, "m": [(at + 64, *bits) for at, *bits in d]}
        case "Q5_0":
            return {"code": nibble(base + 64, n, k) + fifth(base + 576, n, k), "d": d}
        case "Q5_1":
            code = nibble(base + 128, n, k) + fifth(base + 640, n, k)
            return {"code": code, "d": d, "m": [(at + 64, *bits) for at, *bits in d]}
        case "Q4_K":
            return {"code": nibble(base + 256, n, k), **scales}
        case "Q5_K":
            return {"code": nibble(base + 256, n, k) + fifth(base + 2304, n, k), **scales}
        case "Q6_K":
            pair = (base + 2368 + 64 * (k // 16) + 4 * n + k % 4, 2 * (k % 16 // 4), 2)
            scale = [(base + 64 + 16 * (k // 16) + n, 0, 8)]
            return {"code": [*nibble(base + 320, n, k), pair], "d": half(base + 2 * n), "sc": scale}
        case "IQ4_NL":
            return {"code": nibble(base + 64, n, k), "d": d}
        case "IQ4_XS":
            g = k // 32
            scale = [(base + 64 + 16 * (g % 4) + n, 4 * (g // 4), 4), (base + 32 + 16 * (g % 2) + n, 2 * (g // 2), 2)]
            return {"code": nibble(base + 128, n, k), "d": half(base + 2 * n), "sc": scale}
        case "MXFP4":
            return {"code": nibble(base + 32, n, k), "e": [(base + 16 * (k // 32) + n, 0, 8)]}
    raise KeyError(type)


def source_places(type: str, k: int) -> dict[str, Bits]:
    """The same within a row of the checkpoint: ggml's block_q4_0, block_q6_K and so on (ggml-common.h)."""
    if type in VALUE_BYTES:
        return {"value": [(k * VALUE_BYTES[type] + i, 0, 8) for i in range(VALUE_BYTES[type])]}
    block, size = oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType[type]]
    base, k = k // block * size, k % block
    g = k // 32
    if type == "Q8_0":
        return {"d": half(base), "code": [(base + 2 + k, 0, 8)]}
    if type == "MXFP4":
        return {"e": [(base, 0, 8)], "code": [(base + 1 + k % 16, 4 * (k // 16), 4)]}
    if type == "IQ4_XS":
        scale = [(base + 4 + g // 2, 4 * (g % 2), 4), (base + 2 + g // 4, 2 * (g % 4), 2)]
        return {"d": half(base), "sc": scale, "code": [(base + 8 + 16 * g + k % 16, 4 * (k % 32 // 16), 4)]}
    if type in GROUPS_OF_32:
        places, at = {"d": half(base)}, base + 2
        if type.endswith("1"):
            places["m"], at = half(at), at + 2
        top = [(at + k // 8, k % 8, 1)] if type.startswith("Q5") else []
        places["code"] = [(at + 4 * len(top) + k % 16, 4 * (k // 16), 4), *top]
        return places
    if type == "Q6_K":
        h, within, f = k // 128, k % 32, k % 128 // 32
        code = [(base + 64 * h + 32 * (f % 2) + within, 4 * (f // 2), 4), (base + 128 + 32 * h + within, 2 * f, 2)]
        return {"code": code, "sc": [(base + 192 + k // 16, 0, 8)], "d": half(base + 208)}
    if g < 4:
        scales: dict[str, Bits] = {"sc": [(base + 4 + g, 0, 6)], "m": [(base + 8 + g, 0, 6)]}
    else:
        scales = {
            "sc": [(base + 8 + g, 0, 4), (base + g, 6, 2)],
            "m": [(base + 8 + g, 4, 4), (base + 4 + g, 6, 2)],
        }
    at = base + (16 if type == "Q4_K" else 48)
    code = [(at + 32 * (g // 2) + k % 32, 4 * (g % 2), 4)]
    top = [(base + 16 + k % 32, g, 1)] if type == "Q5_K" else []
    return {"d": half(base), "dmin": half(base + 2), "code": code + top, **scales}


def get(data: Bytes, bits: Bits) -> int:
    value = have = 0
    for at, shift, count in bits:
        value |= (int(data[at]) >> shift & (1 << count) - 1) << have
        have += count
    return value


def put(data: Bytes, bits: Bits, value: int) -> None:
    for at, shift, count in bits:
        mask = (1 << count) - 1
        data[at] = int(data[at]) & ~(mask << shift) | (value & mask) << shift
        value >>= count


def by_definition(type: str, rows: Bytes, columns: int) -> Bytes:
    """The stored bytes of a matrix, number by number."""
    stored_rows = -(-len(rows) // 16) * 16
    out = np.zeros(tensor_bytes(type, stored_rows, columns), np.uint8)
    sources = [source_places(type, k) for k in range(columns)]
    for row in range(len(rows)):
        for k in range(columns):
            for what, bits in places(type, row, k, columns).items():
                value = get(rows[row], sources[k][what])
                put(out, bits, value ^ 0x80 if (type, what) == ("Q8_0", "code") else value)
    return out


def packed(type: str, rows: Bytes, columns: int) -> Bytes:
    stored_rows = -(-len(rows) // 16) * 16
    out = np.full(tensor_bytes(type, stored_rows, columns), 0xAA, np.uint8)
    assert _pack.fill(type, False, rows.data, len(rows), columns, 0, 1, 0, out.data)
    return out


@pytest.mark.parametrize("type", RAW)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (17, 768), (48, 512)])
def test_raw_blocks_stay_what_they_are_row_behind_row(type: str, rows: int, columns: int) -> None:
    raw, size = source(type, rows, columns, rows), row_bytes(type, 256)
    tiles = packed(type, raw, columns)
    whole = np.zeros((-(-rows // 16) * 16, raw.shape[1]), np.uint8)
    whole[:rows] = raw
    assert np.array_equal(tiles, whole.reshape(-1, 16, columns // 256, size).swapaxes(1, 2).reshape(-1))
    assert _pack.unpack(type, False, tiles.data, rows, columns, 0, 1) == raw.tobytes()
    for at in range(0, len(tiles), 7):
        tiles[at] ^= 1 << at % 8
        assert not _pack.proved(type, False, raw.data, rows, columns, 0, 1, tiles.data), at
        tiles[at] ^= 1 << at % 8


COLUMNS = {1: (1, 15, 16, 17, 31, 32, 33, 64, 65), 32: (32, 64, 96, 160), 256: (256, 512)}


def shapes() -> Iterator[tuple[str, int, int]]:
    for type in MATRICES:
        for rows in (1, 15, 16, 17, 48):
            for columns in COLUMNS[block_columns(type)] if rows < 48 else COLUMNS[block_columns(type)][-1:]:
                yield type, rows, columns


@pytest.mark.parametrize("type", MATRICES)
def test_tiles_are_laid_out_as_the_format_says_with_tails_of_zeros(type: str) -> None:
    for kind, rows, columns in shapes():
        if kind == type:
            raw = source(type, rows, columns, rows * columns)
            assert np.array_equal(packed(type, raw, columns), by_definition(type, raw, columns)), (rows, columns)


@pytest.mark.parametrize("type", MATRICES)
def test_unpacking_gives_the_rows_back(type: str) -> None:
    for kind, rows, columns in shapes():
        if kind == type:
            raw = source(type, rows, columns)
            again = _pack.unpack(type, False, packed(type, raw, columns).data, rows, columns, 0, 1)
            assert again == raw.tobytes(), (rows, columns)


@pytest.mark.parametrize("type", QUANTIZED)
def test_each_code_alone_lands_in_its_place(type: str) -> None:
    """16 lanes, every column of a tile, one code at a time: exactly its bits are set in the tile, and come back."""
    columns = BLOCK_TYPES[type].k
    for row in range(16):
        for k in range(row % 3, columns, 1 if columns == 64 else 3):
            raw = np.zeros((16, row_bytes(type, columns)), np.uint8)
            put(raw[row], source_places(type, k)["code"], 0xFF)
            if type == "Q8_0":
                raw[:, 2:34] ^= 0x80
                raw[:, 36:] ^= 0x80
            tile = packed(type, raw, columns)
            expected = np.zeros_like(tile)
            put(expected, places(type, row, k, columns)["code"], 0xFF)
            assert np.array_equal(tile, expected), (row, k)
            assert _pack.unpack(type, False, tile.data, 16, columns, 0, 1) == raw.tobytes()


@pytest.mark.parametrize("type", MATRICES)
def test_the_proof_sees_every_single_bit(type: str) -> None:
    """Any bit of a tile flipped, in codes, scales, missing lanes or the tail of K, and the proof fails."""
    columns = 5 if type in VALUE_BYTES else block_columns(type)
    raw = source(type, 15, columns)
    tile = packed(type, raw, columns)
    assert _pack.proved(type, False, raw.data, 15, columns, 0, 1, tile.data)
    for at in range(len(tile)):
        for bit in range(8):
            tile[at] ^= 1 << bit
            assert not _pack.proved(type, False, raw.data, 15, columns, 0, 1, tile.data), (at, bit)
            tile[at] ^= 1 << bit


@settings(max_examples=60)
@given(
    type=st.sampled_from((*MATRICES, *RAW)),
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
def test_any_cut_into_windows_gives_the_same_bytes(type: str, rows: int, groups: int, cuts: list[float]) -> None:
    columns = max(block_columns(type), 32) * groups
    raw = source(type, rows, columns)
    whole = packed(type, raw, columns)
    edges = [0, *sorted(int(cut * len(whole)) for cut in cuts), len(whole)]
    out = np.full_like(whole, 0xAA)
    for low, high in pairwise(edges):
        assert _pack.fill(type, False, raw.data, rows, columns, 0, 1, low, out[low:high].data)
    assert np.array_equal(out, whole)


@settings(max_examples=60)
@given(
    type=st.sampled_from((*MATRICES, *RAW)),
    rows=st.integers(1, 50),
    groups=st.integers(1, 4),
    interleaved=st.booleans(),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_parts_side_by_side_do_not_touch_one_another(
    type: str, rows: int, groups: int, interleaved: bool, cuts: list[float]
) -> None:
    columns, blocks = max(block_columns(type), 32) * groups, -(-rows // 16)
    parts = [source(type, rows, columns, seed) for seed in (1, 2)]
    alone = [packed(type, part, columns).reshape(blocks, -1) for part in parts]
    order = [(0, 2), (1, 2)] if interleaved else [(0, 1), (blocks, 1)]
    stored = np.concatenate(alone) if not interleaved else np.stack(alone, axis=1).reshape(2 * blocks, -1)
    out = np.full(stored.size, 0xAA, np.uint8)
    edges = [0, *sorted(int(cut * out.size) for cut in cuts), out.size]
    for part, (first, step) in zip(parts, order, strict=True):
        for low, high in pairwise(edges):
            assert _pack.fill(type, False, part.data, rows, columns, first, step, low, out[low:high].data)
    assert np.array_equal(out, stored.reshape(-1))
    for part, (first, step) in zip(parts, order, strict=True):
        assert _pack.unpack(type, False, out.data, rows, columns, first, step) == part.tobytes()


F = np.float32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def number(bits: int, kind: str) -> np.float32:
    """The binary16, bfloat16 or binary32 with these bits."""
    if kind == "F16":
        return np.array(bits, np.uint16).view(np.float16).astype(F)[()]
    value: np.float32 = np.array(bits << 16 if kind == "BF16" else bits, np.uint32).view(F)[()]
    return value


def dequantized(type: str, parts: dict[str, int]) -> np.float32:
    """A weight from what `places` finds, each operation rounded."""
    if "value" in parts:
        return number(parts["value"], type)
    if type == "MXFP4":
        return F(MXFP4[parts["code"]] * 2.0 ** (parts["e"] - 128))
    zero = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q6_K": 32}.get(type, 0)
    if type.startswith("IQ4"):
        parts["code"] = IQ4[parts["code"]]
    q, d = F(parts["code"] - zero), number(parts["d"], "F16")
    match type:
        case "Q4_1" | "Q5_1":
            return q * d + number(parts["m"], "F16")
        case "Q4_K" | "Q5_K":
            return (d * F(parts["sc"])) * q - number(parts["dmin"], "F16") * F(parts["m"])
        case "IQ4_XS":
            return (d * F(parts["sc"] - 32)) * q
        case "Q6_K":
            return (d * F(np.uint8(parts["sc"]).view(np.int8))) * q
    return q * d


def finite(type: str, raw: Bytes, columns: int) -> Bytes:
    """Random bytes with scales that are numbers."""
    for k in range(0, columns, block_columns(type)):
        for what in ("d", "m", "dmin") if type in GROUPS_OF_32 else ("d", "dmin"):
            for bits in [bits for name, bits in source_places(type, k).items() if name == what]:
                raw[:, bits[1][0]] &= 0xBB
        if type == "MXFP4":
            raw[:, source_places(type, k)["e"][0][0]] &= 0xF7  # 12 x 2^123 is the largest
    return raw


@pytest.mark.parametrize("type", MATRICES)
def test_tiles_dequantize_to_the_bits_the_package_gives(type: str) -> None:
    rows, columns = 19, max(96, 2 * block_columns(type)) if block_columns(type) > 32 else 96
    kind = oracle.GGMLQuantizationType[type]
    if type in VALUE_BYTES:
        weights = np.random.default_rng(3).standard_normal((rows, columns)).astype(F)
        raw = np.ascontiguousarray(oracle.quants.quantize(weights, kind)).view(np.uint8).reshape(rows, -1)
    else:
        raw = finite(type, source(type, rows, columns, 3), columns)
    expected = oracle.quants.dequantize(raw if type in QUANTIZED else oracle.quants.quantize(weights, kind), kind)
    tiles = packed(type, raw, columns)
    for row in range(rows):
        for k in range(columns):
            parts = {what: get(tiles, bits) for what, bits in places(type, row, k, columns).items()}
            assert dequantized(type, parts).tobytes() == expected[row, k].astype(F).tobytes(), (row, k)


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_every_half_widens_to_the_same_number_and_comes_back() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = np.full(1 << 16, 0xAAAAAAAA, np.uint32)
    assert _pack.fill("F16", True, halves.data.cast("B"), 1 << 16, 1, 0, 1, 0, out.data.cast("B"))
    numbers = ~np.isnan(halves.view(np.float16))
    assert np.array_equal(out.view(np.float32)[numbers], halves.view(np.float16)[numbers].astype(np.float32))
    assert np.isnan(out.view(np.float32)[~numbers]).all()
    assert np.array_equal(np.signbit(out.view(np.float32)), np.signbit(halves.view(np.float16)))
    assert _pack.unpack("F16", True, out.data.cast("B"), 1 << 16, 1, 0, 1) == halves.tobytes()


def test_a_brain_float_is_the_upper_half_of_its_number() -> None:
    values = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.uint32)
    assert _pack.fill("BF16", True, values.data.cast("B"), 1 << 16, 1, 0, 1, 0, out.data.cast("B"))
    assert np.array_equal(out, values.astype(np.uint32) << 16)
    assert _pack.unpack("BF16", True, out.data.cast("B"), 1 << 16, 1, 0, 1) == values.tobytes()


@pytest.mark.parametrize("type", ["F16", "BF16", "F32"])
def test_the_proof_of_a_vector_sees_every_single_bit(type: str) -> None:
    raw = source(type, 13, 1, 5)
    out = np.full(16, 0xAAAAAAAA, np.uint32).view(np.uint8)
    assert _pack.fill(type, True, raw.data, 13, 1, 0, 1, 0, out.data)
    assert not out[13 * 4 :].any(), "padded with zeros"
    for at in range(len(out)):
        for bit in range(8):
            out[at] ^= 1 << bit
            assert not _pack.proved(type, True, raw.data, 13, 1, 0, 1, out.data), (at, bit)
            out[at] ^= 1 << bit
    assert _pack.proved(type, True, raw.data, 13, 1, 0, 1, out.data)


# --- hashes -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.binary(max_size=700), piece=st.integers(1, 300))
def test_pieces_are_hashed_in_order_as_the_standard_library_hashes_them(data: bytes, piece: int) -> None:
    expected = [hashlib.sha256(data[at : at + piece]).digest() for at in range(0, len(data), piece)]
    assert chunk_hashes(memoryview(data), piece, native=False) == expected
    if _pack.can_hash():
        assert chunk_hashes(memoryview(data), piece, native=True) == expected
        assert chunk_hashes(memoryview(data * 40), piece * 41, native=True) == [
            hashlib.sha256((data * 40)[at : at + piece * 41]).digest() for at in range(0, 40 * len(data), piece * 41)
        ]
    else:
        with pytest.raises(RuntimeError):
            _pack.hash_each(data, piece)


def test_a_piece_of_nothing_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        _pack.hash_each(b"abc", 0)


# --- hostile arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "rows", "columns", "first", "step"),
    [
        ("Q4_0", 17, 64, 0, 1),  # the source has 16 rows
        ("Q4_0", 16, 128, 0, 1),
        ("Q4_0", 16, 33, 0, 1),
        ("Q4_0", 0, 64, 0, 1),
        ("Q4_0", 16, 0, 0, 1),
        ("Q4_0", 16, 64, 0, 0),
        ("Q4_0", 1 << 40, 64, 0, 1),
        ("Q4_0", 16, 1 << 40, 0, 1),
        ("Q4_0", 16, 64, 1 << 40, 1),
        ("Q4_K", 16, 64, 0, 1),
        ("Q6_K", 16, 384, 0, 1),
        ("Q3_K", 16, 256, 0, 1),
        ("Q8_K", 16, 256, 0, 1),
        ("F32", 16, 64, 0, 1),
    ],
)
def test_shapes_that_do_not_fit_the_source_are_refused(
    type: str, rows: int, columns: int, first: int, step: int
) -> None:
    raw = source("Q4_0", 16, 64)
    with pytest.raises(ValueError):
        _pack.fill(type, False, raw.data, rows, columns, first, step, 0, bytearray(576))
    with pytest.raises(ValueError):
        _pack.proved(type, False, raw.data, rows, columns, first, step, bytes(576))


def test_stored_bytes_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError):
        _pack.unpack("Q4_0", False, bytes(575), 16, 64, 0, 1)
    with pytest.raises(ValueError):
        _pack.unpack("Q4_0", False, bytes(576), 16, 64, 1, 1)
    with pytest.raises(BufferError):
        _pack.fill("Q4_0", False, source("Q4_0", 16, 64).data, 16, 64, 0, 1, 0, bytes(576))  # read-only


@pytest.mark.parametrize(
    ("position", "end", "count", "limit", "error"),
    [
        (0, 27, 2, 99, None),
        (0, 27, 3, 99, IndexError),  # there are two
        (0, 26, 2, 99, ValueError),  # the end is within the second
        (0, 27, 2, 5, ValueError),  # which has six bytes
        (0, 28, 2, 99, ValueError),  # longer than the buffer
        (28, 27, 0, 99, ValueError),
        (0, 27, 1 << 61, 99, ValueError),
        (1, 27, 1, 99, ValueError),  # a length of 2^56 and more
    ],
)
def test_strings_are_read_inside_their_bounds(
    position: int, end: int, count: int, limit: int, error: type[Exception] | None
) -> None:
    raw = b"".join(len(text).to_bytes(8, "little") + text for text in ("gröe".encode(), b"sechs!"))
    if error is None:
        assert _pack.strings(raw, position, end, count, limit) == (["gröe", "sechs!"], 27)
    else:
        with pytest.raises(error):
            _pack.strings(raw, position, end, count, limit)
