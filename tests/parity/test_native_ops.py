"""Every operation, by every implementation this machine has, equals the NumPy reference bit for bit.

The operations run as Programs over a ROM made here, value by value: an `Embed` of an F32 table puts any activation in
front of the operation under test. What is compared are bits; a NaN equals a NaN.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import reference, table
from vai.kernels.ops import (
    Attention,
    Embed,
    ExpertLinear,
    ExpertSum,
    GatedAdd,
    Glu,
    HeadNorm,
    KvWrite,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Route,
    Rows,
)
from vai.kernels.program import KV_TYPES, PAGE_TOKENS, CacheGroup, Plan, Program, StepArgs
from vai.rom.image import BLOCK_TYPES, CHUNK, VECTOR, Part, StoredTensor, TensorTable, place, tensor_bytes

Floats = NDArray[np.float32]
TYPES = ("Q4_0", "Q8_0", "F16", "BF16", "F32")
ROWS = 33


# ---------------------------------------------------------------- a ROM made of given values


def pad(x: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    return np.pad(x, ((0, -len(x) % rows), (0, -x.shape[1] % columns)))


def pack_float(x: NDArray[Any], k: int, interleave: int) -> bytes:
    x = pad(x, 16, k)
    tiles = x.reshape(len(x) // 16, 16, x.shape[1] // k, k // interleave, interleave)
    return tiles.transpose(0, 2, 3, 1, 4).tobytes()


def pack_scales(d: NDArray[np.float16]) -> NDArray[np.uint8]:
    d = pad(d, 16, 2)
    blocks = np.ascontiguousarray(d.reshape(len(d) // 16, 16, d.shape[1] // 2, 2).transpose(0, 2, 3, 1))
    return blocks.view(np.uint8).reshape(*blocks.shape[:2], 64)


def pack_q4_0(codes: NDArray[np.uint8], d: NDArray[np.float16]) -> bytes:
    codes = pad(codes, 16, 64)
    natural = codes.reshape(len(codes) // 16, 16, codes.shape[1] // 64, 8, 2, 4)  # line, low or high nibble, byte
    lines = (natural[..., 0, :] | natural[..., 1, :] << 4).transpose(0, 2, 3, 1, 4)
    return np.concatenate([pack_scales(d), lines.reshape(*lines.shape[:2], 512)], axis=2).tobytes()


def pack_q8_0(codes: NDArray[np.uint8], d: NDArray[np.float16]) -> bytes:
    codes = pad(codes, 16, 64)
    lines = codes.reshape(len(codes) // 16, 16, codes.shape[1] // 64, 16, 4).transpose(0, 2, 3, 1, 4)
    return np.concatenate([pack_scales(d), lines.reshape(*lines.shape[:2], 1024)], axis=2).tobytes()


def random_matrix(rng: np.random.Generator, type: str, rows: int, columns: int) -> bytes:
    """Tiles with every code, scales of both signs, and among them zero, subnormal and the largest."""
    if type == "F32":
        return pack_float(rng.standard_normal((rows, columns)).astype(np.float32), 16, 1)
    if type in ("F16", "BF16"):
        x = rng.standard_normal((rows, columns)).astype(np.float32)
        x[0, 0] = 2.0**-20  # a subnormal half
        return pack_float(x.astype(np.float16) if type == "F16" else reference.narrow_bf16(x), 32, 2)
    d = (rng.standard_normal((rows, -(-columns // 32))) * 0.05).astype(np.float16)
    d.flat[:4] = (0.0, 2.0**-24, -(2.0**-15), 65504.0)[: d.size]
    if type == "Q4_0":
        return pack_q4_0(rng.integers(0, 16, (rows, columns)).astype(np.uint8), d)
    codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
    codes[0, 0] = 0  # -128
    return pack_q8_0(codes, d)


class Rom:
    """Tensors in memory where an image has them in a file: (type, parts, columns, bytes) by name."""

    def __init__(self, tensors: dict[str, tuple[str, tuple[Part, ...], int, bytes]]) -> None:
        offsets, size = place(len(data) for *_, data in tensors.values())
        buffer = np.zeros(size, np.uint8)
        stored = []
        for (name, (type, parts, columns, data)), offset in zip(tensors.items(), offsets, strict=True):
            buffer[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            rows = 16 * sum(-(-part.rows // 16) for part in parts)
            assert len(data) == tensor_bytes(type, rows, columns)
            stored.append(StoredTensor(name, type, rows, columns, offset, len(data), parts))
        self.table = TensorTable(size, [bytes(32)] * -(-size // CHUNK), stored)
        self.data = memoryview(buffer).toreadonly()

    def tensor(self, name: str) -> tuple[StoredTensor, Part, memoryview]:
        stored, part = self.table.find(name)
        return stored, part, self.data[stored.offset : stored.offset + stored.bytes]

    def constants(self) -> dict[str, tuple[int, int]]:
        return {part.name: (part.rows, stored.columns) for stored in self.table.tensors for part in stored.parts}


def one(name: str, type: str, rows: int, columns: int, data: bytes) -> dict[str, Any]:
    return {name: (type, (Part(name, rows, 0, 1),), columns, data)}


def activations(name: str, x: Floats) -> dict[str, Any]:
    return one(name, "F32", *x.shape, pack_float(x, 16, 1))


def vector(name: str, x: Floats) -> dict[str, Any]:
    return one(name, VECTOR, len(x), 1, np.pad(x, (0, -len(x) % 16)).astype("<f4").tobytes())


def awkward(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    """Activations with an outlier channel, zero groups, values below every guard, huge ones, infinities and NaNs."""
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    x[:, columns // 3] *= 40
    x[1] = 0
    x[2, : columns // 2] = 0
    x[3] *= np.float32(2.0**-101)
    x[4] *= np.float32(2.0**-140)  # subnormal
    x[5] *= np.float32(2.0**110)
    x[6, columns // 2] = np.nan
    x[7, 0] = np.inf
    x[8, columns - 1] = -np.inf
    x[9] = np.float32(-0.0)
    x[10] = np.where(np.arange(columns) % 2, 0.5, 127.0)  # codes on the half: 0.5 rounds to even
    return x


def program(
    rom: Rom, ops: Sequence[Op], output: str, groups: Sequence[CacheGroup] = (), context: int = 4096
) -> Program:
    vocabulary = min(rom.constants()[op.weight][0] for op in ops if isinstance(op, Embed))
    return Program(tuple(ops), tuple(groups), {"logits": output}, rom.constants(), 0, vocabulary, context)


def native(rom: Rom, prog: Program, isa: str, workers: table.Workers, kv_type: str = "bf16", rows: int = 64) -> Plan:
    return table.lower(prog, rom, isa=isa, workers=workers, kv_type=kv_type, max_rows=rows, max_sequences=rows)


def step(
    tokens: Iterable[int],
    starts: Sequence[int] = (0,),
    context: Sequence[int] = (0,),
    tables: Sequence[NDArray[np.int64]] = (),
    outputs: Sequence[int] | None = None,
) -> StepArgs:
    """`starts`: the first row of each sequence."""
    ids = np.array(list(tokens), np.int32)
    bounds = np.array([*starts, len(ids)], np.int32)
    positions = [c + i for c, a, b in zip(context, bounds[:-1], bounds[1:], strict=True) for i in range(b - a)]
    rows = np.arange(len(ids)) if outputs is None else np.array(outputs)
    return StepArgs(
        ids, np.array(positions, np.int32), bounds, np.array(context, np.int32), tuple(tables), rows.astype(np.int32)
    )


def same(a: Floats, b: Floats) -> None:
    """Bit for bit, but for what kind of NaN a NaN is."""
    a, b = np.where(np.isnan(a), np.float32(np.nan), a), np.where(np.isnan(b), np.float32(np.nan), b)
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def reference_of(rom: Rom, prog: Program, args: StepArgs) -> Floats:
    plan = reference.ReferencePlan(prog, rom, kv_type="bf16", max_rows=64, max_sequences=64)
    return plan.forward(args, np.zeros(0, np.uint8))


@pytest.fixture(scope="module", params=table.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pools() -> list[table.Workers]:
    """Thread pools of 1, 2 and 3 threads."""
    return [table.make_workers(threads) for threads in (1, 2, 3)]


EMPTY = np.zeros(0, np.uint8)


# ---------------------------------------------------------------- without pages


@pytest.mark.parametrize("type", TYPES)
def test_a_row_is_the_same_in_any_company_on_any_threads(isa: str, pools: list[table.Workers], type: str) -> None:
    rng = np.random.default_rng(1)
    rom = Rom(
        activations("x.weight", awkward(rng, ROWS, 160))
        | one("w.weight", type, 100, 160, random_matrix(rng, type, 100, 160))
        | vector("w.bias", rng.standard_normal(100).astype(np.float32))
        | activations("r.weight", rng.standard_normal((ROWS, 100)).astype(np.float32))
        | activations("a.weight", rng.standard_normal((ROWS, 100)).astype(np.float32))
    )
    ops = [Embed("x", "x.weight"), Embed("r", "r.weight"), Embed("a", "a.weight")]
    linear = Linear("y", "x", "w.weight", bias="w.bias", addend="a", residual="r")
    prog = program(rom, [*ops, linear], "y")
    expected = reference_of(rom, prog, step(range(ROWS)))
    assert not np.isfinite(expected[6:9]).any()
    assert np.isfinite(np.delete(expected, [5, 6, 7, 8], axis=0)).all()
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        for rows in range(1, ROWS + 1):
            tokens = (np.arange(rows) * 7 + rows) % ROWS
            same(plan.forward(step(tokens), EMPTY), expected[tokens])


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(20, 896), (33, 1536), (18, 8960), (16, 11008), (1, 32), (70, 96), (5, 4864)]
)
def test_real_depths_and_tails_give_the_reference_s_bits(
    isa: str, pools: list[table.Workers], type: str, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(columns)
    rom = Rom(
        activations("x.weight", awkward(rng, 40, columns))
        | one("w.weight", type, rows, columns, random_matrix(rng, type, rows, columns))
    )
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    same(native(rom, prog, isa, pools[1]).forward(step(range(40)), EMPTY), reference_of(rom, prog, step(range(40))))


@pytest.mark.parametrize("columns", [3, 7, 33, 47])
@pytest.mark.parametrize("type", ["F16", "BF16", "F32"])
def test_float_weights_may_have_any_number_of_columns(
    isa: str, pools: list[table.Workers], type: str, columns: int
) -> None:
    rng = np.random.default_rng(3)
    rom = Rom(
        activations("x.weight", rng.standard_normal((20, columns)).astype(np.float32))
        | one("w.weight", type, 23, columns, random_matrix(rng, type, 23, columns))
    )
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    same(native(rom, prog, isa, pools[1]).forward(step(range(20)), EMPTY), reference_of(rom, prog, step(range(20))))


@pytest.mark.parametrize("type", TYPES)
def test_embedding_rows_are_dequantized(isa: str, pools: list[table.Workers], type: str) -> None:
    rng = np.random.default_rng(4)
    rom = Rom(one("e.weight", type, 50, 160, random_matrix(rng, type, 50, 160)))
    prog = program(rom, [Embed("x", "e.weight"), Rows("y", "x")], "y")
    args = step([0, 49, 17, 15, 16, 3, 3], outputs=[0, 2, 3, 6])
    same(native(rom, prog, isa, pools[1]).forward(args, EMPTY), reference_of(rom, prog, args))


@pytest.mark.parametrize("columns", [16, 33, 96, 1536, 4096])
def test_rms_norm_sums_in_the_order_of_sixteen(isa: str, pools: list[table.Workers], columns: int) -> None:
    rng = np.random.default_rng(5)
    rom = Rom(
        activations("x.weight", awkward(rng, ROWS, columns))
        | vector("n.weight", rng.standard_normal(columns).astype(np.float32))
        | one("w.weight", "Q8_0", 16, columns, random_matrix(rng, "Q8_0", 16, columns))
    )
    norm = [Embed("x", "x.weight"), RmsNorm("n", "x", "n.weight", 1e-6)]
    args = step(range(ROWS))
    for output, ops in (("n", norm), ("y", [*norm, Linear("y", "n", "w.weight")])):
        if output == "n" or columns % 32 == 0:
            prog = program(rom, ops, output)
            same(native(rom, prog, isa, pools[2]).forward(args, EMPTY), reference_of(rom, prog, args))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 48), (6, 20), (3, 128)])
def test_each_head_has_a_norm_of_its_own(isa: str, pools: list[table.Workers], heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(14)
    rom = Rom(
        activations("x.weight", awkward(rng, ROWS, heads * head_dim))
        | vector("n.weight", rng.standard_normal(head_dim).astype(np.float32))
    )
    ops = [Embed("x", "x.weight"), HeadNorm("y", "x", "n.weight", heads, 1e-6)]
    kept = [*ops, HeadNorm("z", "x", "n.weight", heads, 1.0)]  # x is read again: the first may not write over it
    args = step(range(ROWS))
    for output, these in (("y", ops), ("z", kept)):
        prog = program(rom, these, output)
        same(native(rom, prog, isa, pools[2]).forward(args, EMPTY), reference_of(rom, prog, args))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_the_gated_unit_covers_the_whole_range_of_exp(isa: str, pools: list[table.Workers], act: str) -> None:
    gate = np.concatenate([np.linspace(-100, 100, 40 * 97 - 8), [0, -0.0, np.nan, np.inf, -np.inf, 88.3, -88.3, 1e-40]])
    gate = gate.astype(np.float32).reshape(40, 97)
    rom = Rom(activations("g.weight", gate) | activations("u.weight", np.roll(gate, 5, axis=0)))
    prog = program(rom, [Embed("g", "g.weight"), Embed("u", "u.weight"), Glu("y", "g", "u", act)], "y")
    same(native(rom, prog, isa, pools[1]).forward(step(range(40)), EMPTY), reference_of(rom, prog, step(range(40))))


@pytest.mark.parametrize(("gate", "up"), [("Q4_0", "Q4_0"), ("F16", "F16"), ("Q4_0", "Q8_0"), ("Q8_0", "F32")])
@pytest.mark.parametrize(("bias", "act"), [(False, "silu"), (True, "silu"), (False, "gelu_tanh")])
def test_gate_and_up_are_the_same_fused_or_not(
    isa: str, pools: list[table.Workers], gate: str, up: str, bias: bool, act: str
) -> None:
    rng = np.random.default_rng(6)
    g, u = random_matrix(rng, gate, 40, 96), random_matrix(rng, up, 40, 96)
    parts = (Part("gate.weight", 40, 0, 2), Part("up.weight", 40, 1, 2))
    tensors = activations("x.weight", awkward(rng, ROWS, 96)) | vector("n.weight", np.ones(96, np.float32))
    biases = rng.standard_normal((2, 48)).astype(np.float32)
    biases[:, 40:] = 0
    if gate == up:
        pairs = np.stack([np.frombuffer(each, np.uint8).reshape(3, -1) for each in (g, u)], axis=1)
        tensors["gate_up.weight"] = (gate, parts, 96, pairs.tobytes())
        bias_parts = (Part("gate.bias", 40, 0, 2), Part("up.bias", 40, 1, 2))
        interleaved = biases.reshape(2, 3, 16).transpose(1, 0, 2).astype("<f4").tobytes()
        tensors["gate_up.bias"] = (VECTOR, bias_parts, 1, interleaved)
    else:
        tensors |= one("gate.weight", gate, 40, 96, g) | one("up.weight", up, 40, 96, u)
        tensors |= vector("gate.bias", biases[0, :40]) | vector("up.bias", biases[1, :40])
    rom = Rom(tensors)
    ops = [
        Embed("x", "x.weight"),
        RmsNorm("n", "x", "n.weight", 1e-6),
        Linear("g", "n", "gate.weight", bias="gate.bias" if bias else None),
        Linear("u", "n", "up.weight", bias="up.bias" if bias else None),
        Glu("y", "g", "u", act),
    ]
    prog = program(rom, ops, "y")
    expected = reference_of(rom, prog, step(range(ROWS)))
    plan = native(rom, prog, isa, pools[1])
    assert any(line.startswith("gated") for line in plan.lines()) == (gate == up)
    for rows in (1, 5, ROWS):
        same(plan.forward(step(range(rows)), EMPTY), expected[:rows])


def test_embeddings_are_scaled_norms_have_residuals_and_logits_are_capped(isa: str, pools: list[table.Workers]) -> None:
    rng = np.random.default_rng(17)
    rom = Rom(
        activations("x.weight", awkward(rng, ROWS, 96))
        | activations("r.weight", rng.standard_normal((ROWS, 96)).astype(np.float32))
        | vector("n.weight", rng.standard_normal(96).astype(np.float32))
        | one("w.weight", "Q8_0", 50, 96, random_matrix(rng, "Q8_0", 50, 96))
    )
    ops = [
        Embed("x", "x.weight", scale=7.3),
        Embed("r", "r.weight"),
        RmsNorm("sum", "x", "n.weight", 1e-6, residual="r"),  # in the place of r
        RmsNorm("next", "sum", "n.weight", 1e-6, residual="sum"),
        Linear("y", "next", "w.weight", softcap=3.0),
    ]
    for output in ("x", "sum", "next", "y"):
        prog = program(rom, ops[: 1 + [op.output for op in ops].index(output)], output)
        expected = reference_of(rom, prog, step(range(ROWS)))
        for workers in pools:
            same(native(rom, prog, isa, workers).forward(step(range(ROWS)), EMPTY), expected)
    assert (np.abs(expected[10:]) <= 3).all() and (np.abs(expected[10:]) > 2.5).any()


def test_an_interleaved_part_that_others_read_is_computed_alone(isa: str, pools: list[table.Workers]) -> None:
    rng = np.random.default_rng(7)
    g, u = random_matrix(rng, "Q4_0", 40, 64), random_matrix(rng, "Q4_0", 40, 64)
    pairs = np.stack([np.frombuffer(each, np.uint8).reshape(3, -1) for each in (g, u)], axis=1).tobytes()
    parts = (Part("gate.weight", 40, 0, 2), Part("up.weight", 40, 1, 2))
    rom = Rom(activations("x.weight", awkward(rng, ROWS, 64)) | {"gate_up.weight": ("Q4_0", parts, 64, pairs)})
    ops = [Embed("x", "x.weight"), Linear("g", "x", "gate.weight"), Linear("u", "x", "up.weight")]
    for output in ("g", "u"):
        prog = program(rom, ops, output)
        same(native(rom, prog, isa, pools[1]).forward(step(range(20)), EMPTY), reference_of(rom, prog, step(range(20))))


@pytest.mark.parametrize("magnitude", [1.0, 1.19])
@pytest.mark.parametrize("pairing", ["norm", "neox"])
@pytest.mark.parametrize(("head_dim", "pairs"), [(8, 4), (20, 10), (64, 16), (128, 64)])
def test_rope_turns_by_the_same_angles(
    isa: str, pools: list[table.Workers], pairing: str, head_dim: int, pairs: int, magnitude: float
) -> None:
    rng = np.random.default_rng(8)
    frequencies = tuple(float(f) for f in 10000.0 ** -(np.arange(pairs) / pairs))
    rom = Rom(activations("x.weight", rng.standard_normal((ROWS, 3 * head_dim)).astype(np.float32)))
    prog = program(
        rom,
        [Embed("x", "x.weight"), Rope("y", "x", 3, head_dim, pairing, frequencies, magnitude)],
        "y",
        context=1 << 20,
    )
    plan = native(rom, prog, isa, pools[1])
    for start in (0, 5000, (1 << 20) - ROWS):
        args = step(range(ROWS), context=[start])
        same(plan.forward(args, EMPTY), reference_of(rom, prog, args))


def test_a_value_that_is_still_needed_is_not_overwritten(isa: str, pools: list[table.Workers]) -> None:
    rng = np.random.default_rng(9)
    rom = Rom(
        activations("x.weight", rng.standard_normal((ROWS, 64)).astype(np.float32))
        | one("a.weight", "Q4_0", 64, 64, random_matrix(rng, "Q4_0", 64, 64))
        | one("b.weight", "F32", 64, 64, random_matrix(rng, "F32", 64, 64))
    )
    ops = [
        Embed("x", "x.weight"),
        Rope("turned", "x", 2, 32, "neox", (1.0, 0.5)),
        Linear("y", "turned", "a.weight", residual="x"),
        Linear("z", "y", "b.weight", residual="y"),
        Linear("w", "x", "a.weight", addend="z", residual="y"),
        Linear("last", "w", "b.weight", residual="turned"),
    ]
    prog = program(rom, ops, "last")
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        same(plan.forward(step(range(ROWS)), EMPTY), reference_of(rom, prog, step(range(ROWS))))


@contextmanager
def flushing_subnormals() -> Iterator[None]:
    """This thread's floating-point environment as a library built for speed leaves it."""
    where, bits = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}[platform.machine()]  # MXCSR, FPCR inside fenv_t
    libm, before = ctypes.CDLL("libm.so.6"), ctypes.create_string_buffer(64)
    libm.fegetenv(before)
    changed = ctypes.create_string_buffer(before.raw, 64)
    mode = ctypes.c_uint32.from_buffer(changed, where)
    mode.value |= bits
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(before)


def test_a_caller_that_flushes_subnormals_does_not_pass_that_on(isa: str) -> None:
    rng = np.random.default_rng(15)
    rom = Rom(activations("x.weight", awkward(rng, ROWS, 96)) | vector("n.weight", np.ones(96, np.float32)))
    prog = program(rom, [Embed("x", "x.weight"), RmsNorm("n", "x", "n.weight", 1.0)], "n")
    expected = reference_of(rom, prog, step(range(ROWS)))
    got: list[Floats] = []

    def run() -> None:
        with flushing_subnormals():
            assert float("5e-324") * 1.0 == 0.0
            got.append(native(rom, prog, isa, table.make_workers(2)).forward(step(range(ROWS)), EMPTY).copy())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (np.abs(expected[4]) < 2.0**-126).all() and expected[4].any()
    same(got[0], expected)


# ---------------------------------------------------------------- the other block types, with a twin of their own


TABLES = {
    "IQ4_NL": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "IQ4_XS": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}


@dataclass
class Coded:
    """A quantized matrix in natural order: codes [N, K] and what scales them, as a checkpoint has it.

    `d` and `m`: half-precision scales and minimums [N, groups]; `scales` and `minimums`: the integers of the K types,
    [N, K / 32], in Q6_K [N, K / 16] and no minimums. MXFP4 has in `scales` [N, K / 32] the exponents of its scales.
    """

    type: str
    codes: NDArray[np.uint8]
    d: NDArray[np.float16]
    m: NDArray[np.float16]
    scales: NDArray[np.int64]
    minimums: NDArray[np.int64]

    def tiles(self) -> bytes:
        k = self.group if self.group == 256 else 64
        if self.type == "MXFP4":
            head = [bytes_of_rows(self.scales.astype(np.uint8), 2)]
        elif self.type == "IQ4_XS":
            low = self.scales.reshape(len(self.scales), -1, 2, 4) & 15
            high = self.scales.reshape(len(self.scales), -1, 4, 2) >> 4
            high = (high << np.array([0, 2, 4, 6])[:, None]).sum(axis=2)
            head = [
                bytes_of_rows(self.d, 1),
                bytes_of_rows(high.reshape(len(high), -1).astype(np.uint8), 2),
                bytes_of_rows((low[:, :, 0] | low[:, :, 1] << 4).reshape(len(low), -1).astype(np.uint8), 4),
            ]
        elif self.type in ("Q4_1", "Q5_1"):
            head = [pack_scales(self.d), pack_scales(self.m)]
        elif self.type in ("Q5_0", "IQ4_NL"):
            head = [pack_scales(self.d)]
        else:
            head = [np.concatenate([bytes_of_rows(self.d, 1), bytes_of_rows(self.m, 1)], axis=2)]
            if self.type == "Q6_K":
                head.append(bytes_of_rows(self.scales.astype(np.int8), 16))
            else:
                low = (self.scales & 15) | (self.minimums & 15) << 4
                pairs = ((self.scales >> 4) | (self.minimums >> 4) << 2).reshape(len(self.scales), -1, 2, 4)
                above = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(self.scales), -1)
                head += [bytes_of_rows(low.astype(np.uint8), 8), bytes_of_rows(above.astype(np.uint8), 4)]
        codes = pad(self.codes, 16, k)
        natural = codes.reshape(len(codes) // 16, 16, codes.shape[1] // k, k // 8, 2, 4) & 15
        lines = [(natural[..., 0, :] | natural[..., 1, :] << 4).transpose(0, 2, 3, 1, 4)]
        bits = {"Q5": 1, "Q6": 2}.get(self.type[:2], 0)
        if bits:
            parts = 8 // bits  # of a byte: neighbours by four columns
            high = codes.reshape(len(codes) // 16, 16, codes.shape[1] // k, k // parts // 4, parts, 4) >> 4
            line = (high.astype(np.uint8) << (bits * np.arange(parts, dtype=np.uint8))[:, None]).sum(
                axis=4, dtype=np.uint8
            )
            lines.append(line.transpose(0, 2, 3, 1, 4))
        return np.concatenate([*head, *(each.reshape(*each.shape[:2], -1) for each in lines)], axis=2).tobytes()

    @property
    def group(self) -> int:
        return 256 if self.type in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS") else 32

    def values(self) -> NDArray[np.int64]:
        """What the codes stand for."""
        codes = self.codes.astype(np.int64)
        if self.type in TABLES:
            return np.array(TABLES[self.type])[codes]
        return codes - {"Q5_0": 16, "Q6_K": 32}.get(self.type, 0)

    def factors(self) -> NDArray[np.int64]:
        """The integer scales of a group of 256."""
        return self.scales - 32 if self.type == "IQ4_XS" else self.scales

    def scale(self) -> Floats:
        """The float scales of each group."""
        if self.type == "MXFP4":
            return (2.0 ** (self.scales - 128)).astype(np.float32)
        return self.d.astype(np.float32)

    @np.errstate(all="ignore")
    def dequantized(self) -> Floats:
        d, m = self.scale(), self.m.astype(np.float32)
        codes = self.values().astype(np.float32)
        if self.group == 256:
            each = self.codes.shape[1] // self.scales.shape[1]
            scale = np.repeat(d, 256 // each, axis=1) * self.factors().astype(np.float32)
            y = np.repeat(scale, each, axis=1) * codes
            if self.type not in ("Q4_K", "Q5_K"):
                return y
            return y - np.repeat(np.repeat(m, 8, axis=1) * self.minimums.astype(np.float32), 32, axis=1)
        y = codes * np.repeat(d, 32, axis=1)
        return y + np.repeat(m, 32, axis=1) if self.type in ("Q4_1", "Q5_1") else y

    @np.errstate(all="ignore")
    def times(self, x: Floats) -> Floats:
        """x [M, K] times this transposed, in the exact kind, group by group."""
        group = self.group
        q, da = quantized_activations(x, group)
        d, m = self.scale(), self.m.astype(np.float32)
        acc = np.zeros((len(x), len(self.codes)), np.float32)
        codes = self.values()
        for g in range(x.shape[1] // group):
            at = slice(g * group, (g + 1) * group)
            dda, mda = d[:, g] * da[:, g, None], m[:, g] * da[:, g, None]
            if group == 32:
                product = (q[:, at] @ codes[:, at].T).astype(np.float32) * dda
                if self.type in ("Q4_1", "Q5_1"):
                    product = product + q[:, at].sum(axis=1).astype(np.float32)[:, None] * mda
            else:
                each = self.codes.shape[1] // self.scales.shape[1]
                own = slice(g * 256 // each, (g + 1) * 256 // each)
                scaled = codes[:, at] * np.repeat(self.factors()[:, own], each, axis=1)
                total = q[:, at] @ scaled.T
                assert (np.abs(total) < 1 << 31).all()
                product = total.astype(np.float32) * dda
                if self.type in ("Q4_K", "Q5_K"):
                    offset = q[:, at].reshape(len(x), 8, 32).sum(axis=2) @ self.minimums[:, own].T
                    product = product - offset.astype(np.float32) * mda
            acc = acc + product
        return acc


def bytes_of_rows(values: NDArray[Any], each: int) -> NDArray[np.uint8]:
    """[N, blocks * each] values as [N / 16, blocks, bytes]: `each` runs of 16 rows' values."""
    values = pad(values, 16, each)
    blocks = values.reshape(len(values) // 16, 16, values.shape[1] // each, each).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(*blocks.shape[:2], -1)


@np.errstate(all="ignore")
def quantized_activations(x: Floats, group: int) -> tuple[NDArray[np.int64], Floats]:
    groups = x.reshape(len(x), -1, group)
    am = np.abs(groups).max(axis=2)
    usable = np.isfinite(am) & (am >= np.float32(2.0**-100))
    q = np.rint(groups * (np.float32(127) / np.where(usable, am, np.float32(1)))[..., None])
    q = np.where(usable[..., None], q, 0).astype(np.int64).reshape(x.shape)
    nothing = np.where(np.isfinite(am), np.float32(0), np.float32(np.nan))
    return q, np.where(usable, am / np.float32(127), nothing)


def random_codes(rng: np.random.Generator, type: str, rows: int, columns: int, *, extreme: bool = False) -> Coded:
    """Every code and scale; or the largest of all, which overflow wherever anything may."""
    group = 256 if type in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS") else 32
    bits = 4 if type in TABLES else int(type[1])
    halves = (rng.standard_normal((2, rows, columns // group)) * 0.05).astype(np.float16)
    halves[:, 0, 0] = 2.0**-24
    halves[:, -1, -1] = 0
    if type in ("Q5_0", "Q6_K", *TABLES):
        halves[1] = 0
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    lowest, highest, each = {"Q6_K": (-128, 127, 16), "MXFP4": (1, 254, 32)}.get(type, (0, 63, 32))
    scales, minimums = rng.integers(lowest, highest + 1, (2, rows, columns // each))
    if extreme:
        codes[::2], codes[1::2] = (1 << bits) - 1, 7 if type == "MXFP4" else 0
        scales[:], minimums[:] = lowest or highest, highest
        if type == "IQ4_XS":
            scales[:] = 0  # which is -32
    return Coded(type, codes, *halves, scales, minimums)


CODED = ("Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4")


@pytest.mark.parametrize("type", CODED)
def test_other_blocks_give_their_twin_s_bits_in_any_company_on_any_threads(
    isa: str, pools: list[table.Workers], type: str
) -> None:
    rng = np.random.default_rng(20)
    x, w, residual = awkward(rng, ROWS, 512), random_codes(rng, type, 100, 512), rng.standard_normal((ROWS, 100))
    rom = Rom(
        activations("x.weight", x)
        | one("w.weight", type, 100, 512, w.tiles())
        | activations("r.weight", residual.astype(np.float32))
    )
    ops = [Embed("x", "x.weight"), Embed("r", "r.weight"), Linear("y", "x", "w.weight", residual="r")]
    prog = program(rom, ops, "y")
    expected = w.times(x) + residual.astype(np.float32)
    assert np.isnan(expected[6:9]).any(axis=1).all()
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        for rows in range(1, ROWS + 1):
            tokens = (np.arange(rows) * 7 + rows) % ROWS
            same(plan.forward(step(tokens), EMPTY), expected[tokens])


@pytest.mark.parametrize("type", CODED)
@pytest.mark.parametrize(("rows", "columns"), [(20, 768), (33, 1536), (18, 8960), (5, 11008), (1, 256), (70, 96)])
def test_other_blocks_at_real_depths_and_tails(
    isa: str, pools: list[table.Workers], type: str, rows: int, columns: int
) -> None:
    if columns % 256 and BLOCK_TYPES[type].k == 256:
        columns = 4864
    rng = np.random.default_rng(columns)
    x, w = awkward(rng, 40, columns), random_codes(rng, type, rows, columns)
    rom = Rom(activations("x.weight", x) | one("w.weight", type, rows, columns, w.tiles()))
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    same(native(rom, prog, isa, pools[1]).forward(step(range(40)), EMPTY), w.times(x))


@pytest.mark.parametrize("type", CODED)
def test_the_largest_sums_do_not_overflow(isa: str, pools: list[table.Workers], type: str) -> None:
    rng = np.random.default_rng(21)
    x = np.where(rng.integers(0, 2, (ROWS, 512)) > 0, np.float32(1), np.float32(-1))
    x[0], x[1] = 1, -1
    w = random_codes(rng, type, 32, 512, extreme=True)
    rom = Rom(activations("x.weight", x) | one("w.weight", type, 32, 512, w.tiles()))
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    plan = native(rom, prog, isa, pools[1])
    for rows in (1, ROWS, 64):
        tokens = np.arange(rows) % ROWS
        same(plan.forward(step(tokens), EMPTY), w.times(x)[tokens])


@pytest.mark.parametrize("type", CODED)
def test_embedding_rows_of_other_blocks_are_dequantized(isa: str, pools: list[table.Workers], type: str) -> None:
    rng = np.random.default_rng(22)
    columns = 512 if BLOCK_TYPES[type].k == 256 else 160
    w = random_codes(rng, type, 50, columns)
    rom = Rom(one("e.weight", type, 50, columns, w.tiles()))
    prog = program(rom, [Embed("x", "e.weight"), Rows("y", "x")], "y")
    tokens = np.array([0, 49, 17, 15, 16, 3])
    same(native(rom, prog, isa, pools[1]).forward(step(tokens), EMPTY), w.dequantized()[tokens])


@pytest.mark.parametrize("type", CODED)
def test_the_reference_is_the_other_blocks_twin(type: str) -> None:
    rng = np.random.default_rng(24)
    x, w = awkward(rng, ROWS, 512), random_codes(rng, type, 50, 512)
    rom = Rom(activations("x.weight", x) | one("w.weight", type, 50, 512, w.tiles()))
    multiplied = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    same(reference_of(rom, multiplied, step(range(ROWS))), w.times(x))
    gathered = program(rom, [Embed("x", "w.weight"), Rows("y", "x")], "y")
    same(reference_of(rom, gathered, step(range(50))), w.dequantized())


@pytest.mark.parametrize("type", [kind.name for kind in BLOCK_TYPES.values() if kind.slow])
def test_raw_blocks_are_multiplied_and_gathered_as_the_reference_does(
    isa: str, pools: list[table.Workers], type: str
) -> None:
    rng = np.random.default_rng(25)
    x, tiles = awkward(rng, ROWS, 512), rng.integers(0, 256, tensor_bytes(type, 48, 512), np.uint8)
    rom = Rom(activations("x.weight", x) | one("w.weight", type, 48, 512, tiles.tobytes()))
    multiplied = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    expected = reference_of(rom, multiplied, step(range(ROWS)))
    assert np.isfinite(expected).any()
    for workers in pools:
        plan = native(rom, multiplied, isa, workers)
        for rows in (1, 5, ROWS):
            same(plan.forward(step(range(rows)), EMPTY), expected[:rows])
    gathered = program(rom, [Embed("x", "w.weight"), Rows("y", "x")], "y")
    same(
        native(rom, gathered, isa, pools[1]).forward(step(range(48)), EMPTY),
        reference_of(rom, gathered, step(range(48))),
    )


def test_a_norm_serves_readers_of_every_group_and_of_floats(isa: str, pools: list[table.Workers]) -> None:
    rng = np.random.default_rng(23)
    x, gain = awkward(rng, ROWS, 768), rng.standard_normal(768).astype(np.float32)
    wide, narrow = random_codes(rng, "Q6_K", 64, 768), random_codes(rng, "Q4_1", 64, 768)
    floats = (
        activations("x.weight", x)
        | vector("n.weight", gain)
        | one("float.weight", "F32", 64, 768, random_matrix(rng, "F32", 64, 768))
    )
    plain = Rom(floats)
    rom = Rom(
        floats
        | one("wide.weight", "Q6_K", 64, 768, wide.tiles())
        | one("narrow.weight", "Q4_1", 64, 768, narrow.tiles())
    )
    norm = [Embed("x", "x.weight"), RmsNorm("n", "x", "n.weight", 1e-6)]
    readers = {name: Linear(name, "n", f"{name}.weight") for name in ("wide", "narrow", "float")}
    normal = reference_of(plain, program(plain, norm, "n"), step(range(ROWS)))
    product = {
        "wide": wide.times(normal),
        "narrow": narrow.times(normal),
        "float": reference_of(plain, program(plain, [*norm, readers["float"]], "float"), step(range(ROWS))),
    }
    for first, second in itertools.permutations(readers, 2):
        last = dataclasses.replace(readers[second], residual=first)
        prog = program(rom, [*norm, readers[first], last], second)
        plan = native(rom, prog, isa, pools[1])
        assert not any(line.startswith("quantize") for line in plan.lines())  # the norm makes every record
        with np.errstate(all="ignore"):
            same(plan.forward(step(range(ROWS)), EMPTY), product[second] + product[first])


# ---------------------------------------------------------------- with pages


def attending(heads: int, kv_heads: int, head_dim: int, seed: int, **how: float) -> tuple[Rom, Program]:
    """Queries, keys and values straight from tables; the second of two layers is the one that is read."""
    rng = np.random.default_rng(seed)
    rom = Rom(
        activations("q.weight", rng.standard_normal((64, heads * head_dim)).astype(np.float32) * 2)
        | activations("k.weight", rng.standard_normal((64, kv_heads * head_dim)).astype(np.float32))
        | activations("v.weight", rng.standard_normal((64, kv_heads * head_dim)).astype(np.float32))
    )
    ops = [
        Embed("q", "q.weight"),
        Embed("k", "k.weight"),
        Embed("v", "v.weight"),
        KvWrite("k", "v", group=0, layer=1),
        Attention("y", "q", 0, 1, heads, kv_heads, head_dim, scale=0.3, **how),
    ]
    return rom, program(rom, ops, "y", [CacheGroup(2, kv_heads, head_dim, how.get("window"))])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 8), (4, 4, 64), (6, 3, 20), (6, 2, 128), (7, 1, 80), (12, 2, 32)]
)
def test_attention_over_pages_in_any_order(
    isa: str, pools: list[table.Workers], heads: int, kv_heads: int, head_dim: int, kv_type: str
) -> None:
    rom, prog = attending(heads, kv_heads, head_dim, heads)
    rng = np.random.default_rng(10)
    page = prog.groups[0].page_bytes(kv_type)
    pages = (rng.permutation(12).astype(np.int64) * page).reshape(3, 4)
    # What stood in a page before must not matter, least of all where it reads as NaN.
    pools_of = [np.full(12 * page, 0xFF, np.uint8) for _ in range(2)]
    twin = reference.ReferencePlan(prog, rom, kv_type=kv_type, max_rows=64, max_sequences=64)
    plan = native(rom, prog, isa, pools[2], kv_type)
    contexts = [0, 0, 0]
    for lengths in ([40, 1, 9], [1, 23, 7], [1, 1, 1], [31, 2, 16]):
        starts = np.cumsum([0, *lengths])
        args = step(rng.integers(0, 64, starts[-1]), starts[:-1].tolist(), contexts, [pages])
        got, want = plan.forward(args, pools_of[0]), twin.forward(args, pools_of[1])
        same(got, want)
        np.testing.assert_array_equal(pools_of[0], pools_of[1])
        contexts = [c + n for c, n in zip(contexts, lengths, strict=True)]


@pytest.mark.parametrize("kv_type", ["bf16", "f32"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 8), (4, 4, 64), (6, 3, 20), (8, 2, 32)])
@pytest.mark.parametrize("window", [1, 3, 16, 32, 33, 70])
def test_a_window_reads_nothing_behind_it(
    isa: str, pools: list[table.Workers], heads: int, kv_heads: int, head_dim: int, window: int, kv_type: str
) -> None:
    rom, prog = attending(heads, kv_heads, head_dim, heads, window=window, softcap=1.5)
    rng = np.random.default_rng(16)
    page = prog.groups[0].page_bytes(kv_type)
    places = (rng.permutation(10).astype(np.int64) * page).reshape(2, 5)
    pools_of = [np.full(10 * page, 0xFF, np.uint8) for _ in range(2)]
    twin = reference.ReferencePlan(prog, rom, kv_type=kv_type, max_rows=64, max_sequences=64)
    plan = native(rom, prog, isa, pools[1], kv_type)
    contexts = [0, 0]
    for lengths in ([40, 1], [1, 30], [23, 7], [1, 1], [31, 31], [1, 1], [30, 20]):
        starts = np.cumsum([0, *lengths])
        pages = places.copy()
        for sequence, context in enumerate(contexts):
            behind = max(0, context + 1 - window) // PAGE_TOKENS
            for pool in pools_of:  # NaNs now, and nobody knows where they are
                for gone in places[sequence, :behind]:
                    pool[gone : gone + page] = 0xFF
            pages[sequence, :behind] = -1
        args = step(rng.integers(0, 64, starts[-1]), starts[:-1].tolist(), contexts, [pages])
        got = plan.forward(args, pools_of[0])
        assert np.isfinite(got).all()
        same(got, twin.forward(args, pools_of[1]))
        contexts = [c + n for c, n in zip(contexts, lengths, strict=True)]


@pytest.mark.parametrize("how", [{}, {"softcap": 0.7}, {"window": 40}, {"window": 1100, "softcap": 2.0}])
def test_attention_adds_chunks_of_1024_from_position_0(pools: list[table.Workers], how: dict[str, float]) -> None:
    rom, prog = attending(4, 2, 16, 11, **how)
    page = prog.groups[0].page_bytes("bf16")
    pages = np.arange(72, dtype=np.int64)[None, ::-1] * page
    twin = reference.ReferencePlan(prog, rom, kv_type="bf16", max_rows=64, max_sequences=64)
    plans = [native(rom, prog, isa, pools[1]) for isa in table.isas()]  # all beside one twin, which is slow
    pool, *pools_of = [np.zeros(72 * page, np.uint8) for _ in [twin, *plans]]
    rng = np.random.default_rng(12)
    context = 0
    boundaries = {1024, 2048}
    while context < 72 * PAGE_TOKENS - 64:
        rows = 61 if not any(-64 < context - b < 8 for b in boundaries) else 3  # slowly over the boundaries
        args = step(rng.integers(0, 64, rows), context=[context], tables=[pages.copy()])
        found = [plan.forward(args, own) for plan, own in zip(plans, pools_of, strict=True)]
        if rows == 3 or context > 2200:
            expected = twin.forward(args, pool)
            for got in found:
                same(got, expected)
        else:
            pool[:] = pools_of[0]
        context += rows


def test_a_poisoned_row_does_not_reach_its_neighbours(isa: str, pools: list[table.Workers]) -> None:
    rom, prog = attending(8, 2, 16, 13)
    poison = np.frombuffer(rom.data, np.uint8).copy()
    stored, _ = rom.table.find("v.weight")
    poison[stored.offset :][: stored.bytes].view("<f4").reshape(-1, 2, 16, 16)[0, :, :, 5] = np.nan  # token 5
    poisoned = SimpleNamespace(table=rom.table, data=memoryview(poison))
    page = prog.groups[0].page_bytes("f32")
    pages = np.arange(4, dtype=np.int64).reshape(2, 2) * page
    args = step([1, 2, 5, 3, 1, 2, 3, 4], starts=[0, 4], context=[0, 0], tables=[pages])
    plans = [native(each, prog, isa, pools[1], "f32") for each in (rom, poisoned)]
    clean, dirty = (plan.forward(args, np.zeros(4 * page, np.uint8)).copy() for plan in plans)
    assert np.isnan(dirty[2:4]).all()
    same(dirty[[0, 1, 4, 5, 6, 7]], clean[[0, 1, 4, 5, 6, 7]])


# ---------------------------------------------------------------- experts


def logits_of(rng: np.random.Generator, rows: int, experts: int) -> Floats:
    """Among them rows with equals, with all equal, with infinities and with NaNs."""
    logits = (3 * rng.standard_normal((rows, experts))).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 1.5
    logits[3, experts // 2] = -np.inf
    logits[4, experts - 1] = np.inf
    logits[5, 0] = np.nan
    logits[6, experts - 1] = np.nan
    logits[7] = -np.inf
    logits[8] *= 1e30
    return logits


@pytest.mark.parametrize(("renormalize", "scale"), [(False, 1.0), (True, 1.0), (True, 2.5), (False, 0.7)])
@pytest.mark.parametrize(("experts", "used"), [(2, 1), (10, 3), (40, 40), (128, 8)])
def test_rows_go_to_their_experts_and_what_those_say_is_added_in_ascending_order(
    isa: str, pools: list[table.Workers], experts: int, used: int, renormalize: bool, scale: float
) -> None:
    rng = np.random.default_rng(experts)
    rom = Rom(
        activations("l.weight", logits_of(rng, ROWS, experts))
        | activations("x.weight", rng.standard_normal((ROWS, 32)).astype(np.float32))
        | activations("r.weight", rng.standard_normal((ROWS, 16)).astype(np.float32))
        | one("e.weight", "F32", 16 * experts, 32, random_matrix(rng, "F32", 16 * experts, 32))
    )
    ops = [
        Embed("l", "l.weight"),
        Embed("x", "x.weight"),
        Embed("r", "r.weight"),
        Route("chosen", "shares", "l", used, renormalize, scale),
        ExpertLinear("pieces", "x", "chosen", "e.weight", experts),
        ExpertSum("y", "pieces", "shares", residual="r"),
    ]
    prog = program(rom, ops, "y")
    expected = reference_of(rom, prog, step(range(ROWS)))
    assert np.isfinite(np.delete(expected, [4, 5, 6, 7], axis=0)).all()
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        for rows in (ROWS, 1, 7):
            tokens = (np.arange(rows) * 5 + 2 * rows) % ROWS
            same(plan.forward(step(tokens), EMPTY), expected[tokens])


@pytest.mark.parametrize(("width", "gate"), [(16, 16), (100, 37), (192, 2048)])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_added_is_as_much_as_the_gate_is_open(
    isa: str, pools: list[table.Workers], width: int, gate: int, in_place: bool
) -> None:
    rng = np.random.default_rng(gate)
    said = awkward(rng, ROWS, gate) / np.float32(4)
    said[10] *= 50  # a gate that is wide open, or shut
    rom = Rom(
        activations("x.weight", rng.standard_normal((ROWS, width)).astype(np.float32))
        | activations("g.weight", said)
        | activations("r.weight", awkward(rng, ROWS, width))
        | vector("w.weight", rng.standard_normal(gate).astype(np.float32))
    )
    ops = [
        Embed("x", "x.weight"),
        Embed("g", "g.weight"),
        Embed("r", "r.weight"),
        GatedAdd("z", "x", "g", "w.weight", residual="r"),
        *([] if in_place else [GatedAdd("y", "r", "g", "w.weight", residual="z")]),
    ]
    prog = program(rom, ops, "z" if in_place else "y")
    expected = reference_of(rom, prog, step(range(ROWS)))
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        for rows in (ROWS, 1, 7):
            tokens = (np.arange(rows) * 5 + 2 * rows) % ROWS
            same(plan.forward(step(tokens), EMPTY), expected[tokens])


def interleaved(gate: bytes, up: bytes, blocks: int) -> bytes:
    return np.stack([np.frombuffer(each, np.uint8).reshape(blocks, -1) for each in (gate, up)], axis=1).tobytes()


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [(type, type, type) for type in TYPES]
    + [("Q4_0", "Q8_0", "F16"), ("F32", "Q4_0", "Q8_0"), ("Q8_0", "Q8_0", "F32")],
)
def test_experts_are_the_same_fused_or_not_in_any_company(
    isa: str, pools: list[table.Workers], gate: str, up: str, down: str
) -> None:
    experts, used, inner, width = 6, 3, 32, 96
    rng = np.random.default_rng(6)
    g, u = (random_matrix(rng, type, experts * inner, width) for type in (gate, up))
    x = awkward(rng, ROWS, width)
    x[5] /= np.float32(2.0**110)  # the products of what is that large are no numbers
    tensors = activations("x.weight", x) | activations("l.weight", logits_of(rng, ROWS, experts))
    parts = tuple(Part(f"{name}.weight", experts * inner, i, 2) for i, name in enumerate(("gate", "up")))
    if gate == up:
        tensors["gate_up.weight"] = (gate, parts, width, interleaved(g, u, experts * inner // 16))
    else:
        tensors |= one("gate.weight", gate, experts * inner, width, g)
        tensors |= one("up.weight", up, experts * inner, width, u)
    tensors |= one("down.weight", down, experts * width, inner, random_matrix(rng, down, experts * width, inner))
    rom = Rom(tensors)
    ops = [
        Embed("x", "x.weight"),
        Embed("l", "l.weight"),
        Route("chosen", "shares", "l", used, True),
        ExpertLinear("g", "x", "chosen", "gate.weight", experts),
        ExpertLinear("u", "x", "chosen", "up.weight", experts),
        Glu("h", "g", "u", "silu"),
        ExpertLinear("d", "h", "chosen", "down.weight", experts),
        ExpertSum("y", "d", "shares", residual="x"),
    ]
    prog = program(rom, ops, "y")
    expected = reference_of(rom, prog, step(range(ROWS)))
    for workers in pools:
        plan = native(rom, prog, isa, workers)
        assert any(line.startswith("gated_experts") for line in plan.lines()) == (gate == up)
        for rows in (ROWS, 1, 2, 20):
            tokens = (np.arange(rows) * 7 + rows) % ROWS
            same(plan.forward(step(tokens), EMPTY), expected[tokens])


@pytest.mark.parametrize("type", ["Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1"])
def test_experts_of_the_other_types_are_rows_of_one_matrix(isa: str, pools: list[table.Workers], type: str) -> None:
    """With equal shares of all experts, the sum is that of plain linear layers over their parts of the matrix."""
    experts, rows, columns = 4, 32, 512
    rng = np.random.default_rng(7)
    coded = random_codes(rng, type, experts * rows, columns)
    parts = tuple(Part(f"{expert}.weight", rows, 2 * expert, 1) for expert in range(experts))
    x = activations("x.weight", rng.standard_normal((ROWS, columns)).astype(np.float32))
    whole = Rom(
        x
        | one("e.weight", type, experts * rows, columns, coded.tiles())
        | activations("l.weight", np.ones((ROWS, experts), np.float32))
    )
    ops = [
        Embed("x", "x.weight"),
        Embed("l", "l.weight"),
        Route("chosen", "shares", "l", experts, True),
        ExpertLinear("d", "x", "chosen", "e.weight", experts),
        ExpertSum("y", "d", "shares"),
    ]
    cut = Rom(x | {"e": (type, parts, columns, coded.tiles())})
    expected = np.zeros((ROWS, rows), np.float32)
    for expert in range(experts):
        alone = program(cut, [Embed("x", "x.weight"), Linear("y", "x", f"{expert}.weight")], "y")
        piece = native(cut, alone, isa, pools[0]).forward(step(range(ROWS)), EMPTY)
        expected = expected + np.float32(0.25) * piece
    same(native(whole, program(whole, ops, "y"), isa, pools[2]).forward(step(range(ROWS)), EMPTY), expected)
