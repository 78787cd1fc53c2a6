"""Tiles hold what the rows hold: against the layout's definition, bit by bit, and against the format's own package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import gguf as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vai.burn import _pack
from vai.rom.image import BLOCK_TYPES, tensor_bytes

Bytes = NDArray[np.uint8]
MATRICES = ("Q4_0", "Q8_0", "F16", "BF16", "F32")
VALUE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


def row_bytes(type: str, columns: int) -> int:
    return columns * VALUE_BYTES[type] if type in VALUE_BYTES else columns // 32 * {"Q4_0": 18, "Q8_0": 34}[type]


def source(type: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes(type, columns)), dtype=np.uint8)


def places(type: str, row: int, k: int, columns: int) -> tuple[int, int, int, int]:
    """Element (row, k) as docs/rom-format.md lays it out: its byte, shift, byte of its scale (or -1), and bits."""
    block = BLOCK_TYPES[type]
    base = ((row // 16) * -(-columns // block.k) + k // block.k) * block.bytes
    n, k = row % 16, k % block.k
    if type == "Q4_0":
        line, within = divmod(k, 8)
        nibble = 2 * within if within < 4 else 2 * (within - 4) + 1
        return base + 64 + 64 * line + 4 * n + nibble // 2, 4 * (nibble % 2), base + 32 * (k // 32) + 2 * n, 4
    if type == "Q8_0":
        return base + 64 + 64 * (k // 4) + 4 * n + k % 4, 0, base + 32 * (k // 32) + 2 * n, 8
    if type == "F32":
        return base + 64 * k + 4 * n, 0, -1, 32
    return base + 64 * (k // 2) + 4 * n + 2 * (k % 2), 0, -1, 16


def by_definition(type: str, rows: Bytes, columns: int) -> Bytes:
    """The stored bytes of a matrix, element by element."""
    stored_rows = -(-len(rows) // 16) * 16
    out = np.zeros(tensor_bytes(type, stored_rows, columns), np.uint8)
    for row in range(len(rows)):
        for k in range(columns):
            at, shift, scale, _ = places(type, row, k, columns)
            if type == "Q4_0":
                group = rows[row, k // 32 * 18 :]
                code = group[2 + k % 16] >> 4 * (k % 32 // 16) & 15
                out[at] |= code << shift
                out[scale : scale + 2] = group[:2]
            elif type == "Q8_0":
                group = rows[row, k // 32 * 34 :]
                out[at] = group[2 + k % 32] ^ 0x80
                out[scale : scale + 2] = group[:2]
            else:
                size = VALUE_BYTES[type]
                out[at : at + size] = rows[row, k * size : (k + 1) * size]
    return out


def packed(type: str, rows: Bytes, columns: int) -> Bytes:
    stored_rows = -(-len(rows) // 16) * 16
    out = np.full(tensor_bytes(type, stored_rows, columns), 0xAA, np.uint8)
    assert _pack.fill(type, False, rows.data, len(rows), columns, 0, 1, 0, out.data)
    return out


def shapes() -> Iterator[tuple[str, int, int]]:
    for type in MATRICES:
        for rows in (1, 15, 16, 17, 48):
            for columns in (32, 64, 96, 160) if type in ("Q4_0", "Q8_0") else (1, 15, 16, 17, 31, 32, 33, 64, 65):
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


def test_each_nibble_alone_lands_in_its_place() -> None:
    """16 lanes x 64 columns, one nibble set at a time: exactly that nibble of the tile is set, and comes back."""
    for row in range(16):
        for k in range(64):
            raw = np.zeros((16, 36), np.uint8)
            raw[row, k // 32 * 18 + 2 + k % 16] = 9 << 4 * (k % 32 // 16)
            tile = packed("Q4_0", raw, 64)
            at, shift, _, _ = places("Q4_0", row, k, 64)
            assert np.flatnonzero(tile).tolist() == [at]
            assert tile[at] == 9 << shift
            assert _pack.unpack("Q4_0", False, tile.data, 16, 64, 0, 1) == raw.tobytes()


@pytest.mark.parametrize("type", MATRICES)
def test_the_proof_sees_every_single_bit(type: str) -> None:
    """Any bit of a tile flipped, in codes, scales, missing lanes or the tail of K, and the proof fails."""
    columns = 32 if type in ("Q4_0", "Q8_0") else 5
    raw = source(type, 15, columns)
    tile = packed(type, raw, columns)
    assert _pack.proved(type, False, raw.data, 15, columns, 0, 1, tile.data)
    for at in range(len(tile)):
        for bit in range(8):
            tile[at] ^= 1 << bit
            assert not _pack.proved(type, False, raw.data, 15, columns, 0, 1, tile.data), (at, bit)
            tile[at] ^= 1 << bit


@settings(deadline=None, max_examples=60)
@given(
    type=st.sampled_from(MATRICES),
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
def test_any_cut_into_windows_gives_the_same_bytes(type: str, rows: int, groups: int, cuts: list[float]) -> None:
    columns = 32 * groups
    raw = source(type, rows, columns)
    whole = packed(type, raw, columns)
    edges = [0, *sorted(int(cut * len(whole)) for cut in cuts), len(whole)]
    out = np.full_like(whole, 0xAA)
    for low, high in pairwise(edges):
        assert _pack.fill(type, False, raw.data, rows, columns, 0, 1, low, out[low:high].data)
    assert np.array_equal(out, whole)


@settings(deadline=None, max_examples=60)
@given(
    type=st.sampled_from(MATRICES),
    rows=st.integers(1, 50),
    groups=st.integers(1, 4),
    interleaved=st.booleans(),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_parts_side_by_side_do_not_touch_one_another(
    type: str, rows: int, groups: int, interleaved: bool, cuts: list[float]
) -> None:
    columns, blocks = 32 * groups, -(-rows // 16)
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


DEQUANTIZE: dict[str, Callable[[Bytes, Bytes], NDArray[np.float32]]] = {
    "Q4_0": lambda codes, scales: (codes.astype(np.float32) - 8) * scales.view(np.float16).astype(np.float32),
    "Q8_0": lambda codes, scales: (codes.astype(np.float32) - 128) * scales.view(np.float16).astype(np.float32),
    "F16": lambda values, _: values.view(np.float16).astype(np.float32),
    "BF16": lambda values, _: (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F32": lambda values, _: values.view(np.float32),
}


@pytest.mark.parametrize("type", MATRICES)
def test_tiles_dequantize_to_the_bits_the_package_gives(type: str) -> None:
    rows, columns = 19, 96
    weights = np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)
    kind = oracle.GGMLQuantizationType[type]
    raw = np.ascontiguousarray(oracle.quants.quantize(weights, kind)).view(np.uint8).reshape(rows, -1)
    expected = oracle.quants.dequantize(oracle.quants.quantize(weights, kind), kind)
    tiles = packed(type, raw, columns)
    for row in range(rows):
        for k in range(columns):
            at, shift, scale, bits = places(type, row, k, columns)
            if scale >= 0:
                code = (tiles[at : at + 1] >> shift) & ((1 << bits) - 1)
                value = DEQUANTIZE[type](code, tiles[scale : scale + 2])
            else:
                value = DEQUANTIZE[type](tiles[at : at + bits // 8], tiles[:0])
            assert value.tobytes() == expected[row, k].astype(np.float32).tobytes(), (row, k)


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
        _pack.fill("Q4_0", False, source("Q4_0", 16, 64).data, 16, 64, 0, 1, 0, bytes(576))  # type: ignore[arg-type] # read-only
