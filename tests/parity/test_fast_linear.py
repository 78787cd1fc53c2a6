"""Linear layers in the fast kind: every implementation this machine has against the NumPy twin.

The portable one has the twin's bits, and so has AMX as Intel specifies it, which is emulated (test_emulated.py). A
processor may add in another order, so it is judged by how far two orders of additions can be apart; but a row's bits
are the same in any company, on any threads.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import _native, reference, table
from vai.kernels.ops import Embed, Glu, Linear, Op
from vai.kernels.program import Plan, Program, StepArgs
from vai.rom.image import BLOCK_TYPES, VECTOR, Part, tensor_bytes

from .test_native_ops import (
    CODED,
    EMPTY,
    Rom,
    activations,
    awkward,
    one,
    pack_float,
    program,
    random_codes,
    random_matrix,
    same,
    step,
    vector,
)

Floats = NDArray[np.float32]
TYPES = [name for name in BLOCK_TYPES if name not in ("F16", "F32")]
ROWS = 40
FASTS = ("portable", "amx") if platform.machine() == "x86_64" else ("portable",)
SMALLEST = 2.0**-126


@pytest.fixture(scope="module", params=table.fasts())
def fast(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pools() -> list[table.Workers]:
    """Thread pools of 1, 2 and 3 threads."""
    return [table.make_workers(threads) for threads in (1, 2, 3)]


def tiles(rng: np.random.Generator, type: str, rows: int, columns: int) -> bytes:
    """A matrix with every code, and scales that are zero, subnormal and large; of raw blocks any bytes at all."""
    if BLOCK_TYPES[type].slow:
        return rng.integers(0, 256, tensor_bytes(type, -(-rows // 16) * 16, columns), np.uint8).tobytes()
    return random_codes(rng, type, rows, columns).tiles() if type in CODED else random_matrix(rng, type, rows, columns)


def dequantized(rom: Rom, name: str) -> Floats:
    stored, part, data = rom.tensor(name)
    return reference.embed(reference.unpack(stored, part, data), np.arange(part.rows))


def lowered(rom: Rom, prog: Program, fast: str, workers: table.Workers) -> Plan:
    return table.lower(prog, rom, workers=workers, max_rows=64, max_sequences=64, fast=fast)


def fast_step(tokens: Iterable[int]) -> StepArgs:
    return dataclasses.replace(step(tokens, outputs=[]), kind="fast")


def forward(plan: Plan, tokens: Iterable[int]) -> Floats:
    return plan.forward(fast_step(tokens), EMPTY).copy()


def twin(rom: Rom, prog: Program, tokens: Iterable[int]) -> Floats:
    plan = reference.ReferencePlan(prog, rom, kv_type="bf16", max_rows=64, max_sequences=64, fast="portable")
    return plan.forward(fast_step(tokens), EMPTY)


@np.errstate(all="ignore")
def sizes(x: Floats, w: Floats) -> NDArray[np.float64]:
    """The sum of |a| |w| over the columns, for every output."""
    a, b = np.abs(reference.narrow(x)).astype(np.float64), np.abs(reference.narrow(w)).astype(np.float64)
    return np.stack([(a[m] * b).sum(axis=1) for m in range(len(a))])


@np.errstate(all="ignore")
def judge(fast: str, found: Floats, expected: Floats, x: Floats, w: Floats) -> None:
    """Two orders of n additions are apart by at most 2 n 2^-24 of the sum of the sizes, where nothing overflows."""
    if fast == "portable" or _native.emulated:
        same(found, expected)
        return
    size, additions = sizes(x, w), x.shape[1] + x.shape[1] // 32 + 4
    bound = 2 * additions * (2.0**-24 * size + SMALLEST)
    safe = size < 2.0**127
    assert (np.abs(found.astype(np.float64) - expected) <= bound)[safe].all()
    assert np.isfinite(expected)[safe].all()


def layer(rng: np.random.Generator, type: str, x: Floats, outputs: int) -> tuple[Rom, Program]:
    columns = x.shape[1]
    rom = Rom(activations("x.weight", x) | one("w.weight", type, outputs, columns, tiles(rng, type, outputs, columns)))
    return rom, program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")


@pytest.mark.parametrize("type", TYPES)
def test_a_row_has_its_twin_s_bits_in_any_company_on_any_threads(
    fast: str, pools: list[table.Workers], type: str
) -> None:
    rng = np.random.default_rng(1)
    x = awkward(rng, ROWS, 256 if BLOCK_TYPES[type].k == 256 else 160)
    rom, prog = layer(rng, type, x, 100)
    w = dequantized(rom, "w.weight")
    expected = reference.fast_linear(x, w)
    assert np.isnan(expected[6:9]).any() and np.isfinite(expected[11:]).any()
    plans = [lowered(rom, prog, fast, workers) for workers in pools]
    whole = forward(plans[0], range(ROWS))
    judge(fast, whole, expected, x, w)
    for rows in range(1, ROWS + 1):
        tokens = (np.arange(rows) * 7 + rows) % ROWS
        same(forward(plans[rows % 3], tokens), whole[tokens])


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("outputs", "columns"), [(20, 896), (33, 1536), (70, 96), (16, 544), (1, 32), (47, 2080)])
def test_depths_and_tails(fast: str, pools: list[table.Workers], type: str, outputs: int, columns: int) -> None:
    if BLOCK_TYPES[type].k == 256:
        columns = -(-columns // 256) * 256
    rng = np.random.default_rng(columns)
    x = awkward(rng, 35, columns)
    rom, prog = layer(rng, type, x, outputs)
    w = dequantized(rom, "w.weight")
    judge(fast, forward(lowered(rom, prog, fast, pools[1]), range(35)), reference.fast_linear(x, w), x, w)


@pytest.mark.parametrize("columns", [1, 3, 31, 33, 47, 513, 545])
def test_float_weights_may_have_any_number_of_columns(fast: str, pools: list[table.Workers], columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((20, columns)).astype(np.float32)
    rom, prog = layer(rng, "BF16", x, 40)
    w = dequantized(rom, "w.weight")
    judge(fast, forward(lowered(rom, prog, fast, pools[1]), range(20)), reference.fast_linear(x, w), x, w)


@pytest.mark.parametrize("type", TYPES)
def test_any_bytes_are_weights(fast: str, pools: list[table.Workers], type: str) -> None:
    """Scales that are infinite, or no numbers, among them."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((33, 512)).astype(np.float32)
    data = rng.integers(0, 256, tensor_bytes(type, 48, 512), np.uint8).tobytes()
    rom = Rom(activations("x.weight", x) | one("w.weight", type, 48, 512, data))
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    w = dequantized(rom, "w.weight")
    judge(fast, forward(lowered(rom, prog, fast, pools[1]), range(33)), reference.fast_linear(x, w), x, w)


def layer_with_all(rng: np.random.Generator, type: str) -> tuple[Rom, list[Op]]:
    rom = Rom(
        activations("x.weight", rng.standard_normal((ROWS, 512)).astype(np.float32))
        | one("w.weight", type, 100, 512, tiles(rng, type, 100, 512))
        | vector("w.bias", rng.standard_normal(100).astype(np.float32))
        | activations("r.weight", rng.standard_normal((ROWS, 100)).astype(np.float32))
        | activations("a.weight", rng.standard_normal((ROWS, 100)).astype(np.float32))
    )
    return rom, [Embed("x", "x.weight"), Embed("r", "r.weight"), Embed("a", "a.weight")]


def near(fast: str, found: Floats, expected: Floats) -> None:
    if fast == "portable" or _native.emulated:
        same(found, expected)
        return
    np.testing.assert_allclose(found, expected, rtol=2.0**-14, atol=float(np.nanmax(np.abs(expected))) * 2.0**-14)


@pytest.mark.parametrize("type", ["Q4_0", "Q6_K", "BF16"])
@pytest.mark.parametrize(
    "added",
    [
        {"bias": "w.bias"},
        {"residual": "r"},
        {"addend": "a"},
        {"softcap": 3.0},
        {"bias": "w.bias", "residual": "r", "addend": "a", "softcap": 2.0},
    ],
    ids=lambda added: "-".join(added),
)
def test_what_is_added_is_added_as_in_the_exact_kind(
    fast: str, pools: list[table.Workers], type: str, added: dict[str, Any]
) -> None:
    rom, ops = layer_with_all(np.random.default_rng(4), type)
    prog = program(rom, [*ops, Linear("y", "x", "w.weight", **added)], "y")
    expected = twin(rom, prog, range(ROWS))
    for workers in pools:
        near(fast, forward(lowered(rom, prog, fast, workers), range(ROWS)), expected)


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q4_K", "BF16", "Q3_K"])
@pytest.mark.parametrize(("bias", "act"), [(False, "silu"), (True, "silu"), (True, "gelu_tanh")])
def test_gate_and_up_are_one_layer(fast: str, pools: list[table.Workers], type: str, bias: bool, act: str) -> None:
    rng = np.random.default_rng(5)
    pairs = np.stack([np.frombuffer(tiles(rng, type, 40, 768), np.uint8).reshape(3, -1) for _ in range(2)], axis=1)
    biases = rng.standard_normal((2, 48)).astype("<f4")
    biases[:, 40:] = 0
    rom = Rom(
        activations("x.weight", rng.standard_normal((ROWS, 768)).astype(np.float32))
        | {"gate_up.weight": (type, (Part("gate.weight", 40, 0, 2), Part("up.weight", 40, 1, 2)), 768, pairs.tobytes())}
        | {
            "gate_up.bias": (
                VECTOR,
                (Part("gate.bias", 40, 0, 2), Part("up.bias", 40, 1, 2)),
                1,
                biases.reshape(2, 3, 16).transpose(1, 0, 2).tobytes(),
            )
        }
    )
    ops = [
        Embed("x", "x.weight"),
        Linear("g", "x", "gate.weight", bias="gate.bias" if bias else None),
        Linear("u", "x", "up.weight", bias="up.bias" if bias else None),
        Glu("y", "g", "u", act),
    ]
    prog = program(rom, ops, "y")
    expected = twin(rom, prog, range(ROWS))
    for workers in pools:
        near(fast, forward(lowered(rom, prog, fast, workers), range(ROWS)), expected)


# ---------------------------------------------------------------- the twin itself


def rounded(exact: Fraction) -> Fraction:
    """To 24 bits, half to even; below the smallest normal number, then, zero. Of what does not overflow."""
    if exact == 0:
        return exact
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    near = round(exact / unit) * unit  # Python's round is half to even
    return near if abs(near) >= Fraction(2) ** -126 else Fraction(0)


def in_fractions(a: Floats, w: Floats) -> float:
    out = Fraction(0)
    for group in range(0, len(a), 32):
        sums = [Fraction(0), Fraction(0)]
        for k in range(group, group + 32):
            sums[k % 2] = rounded(sums[k % 2] + Fraction(float(a[k])) * Fraction(float(w[k])))
        out = rounded(out + rounded(sums[0] + sums[1]))
    return float(out)


@pytest.mark.parametrize(("low", "high"), [(-2, 2), (-70, -56), (-64, -62), (-40, 40), (-63, 60)])
def test_every_product_joins_its_sum_in_one_rounding(
    fast: str, pools: list[table.Workers], low: int, high: int
) -> None:
    """Exponents of a and w lie between `low` and `high`: at -63 products are about the smallest normal number."""
    rng = np.random.default_rng(high - low)

    def narrow(rows: int) -> Floats:
        exponents = rng.integers(low, high + 1, (rows, 64))
        return np.ldexp(rng.integers(-255, 256, (rows, 64)) / 256.0, exponents).astype(np.float32)

    x, w = narrow(12), narrow(16)
    w[:, 40:] = np.roll(w[:, 8:32], 1, axis=0)  # cancellation
    x[:, 40:] = -x[:, 8:32]
    exact = np.array([[in_fractions(a, b) for b in w] for a in x], np.float32)
    found = reference.fast_linear(x, w)
    np.testing.assert_array_equal(found, exact)
    if high < 0:  # what was flushed is missing
        whole = np.array([[(a * b).sum() for b in w.astype(np.float64)] for a in x.astype(np.float64)])
        assert (np.abs(exact - whole) > 2.0**-140).any()
    rom = Rom(
        activations("x.weight", x)
        | one("w.weight", "BF16", 16, 64, pack_float((w.view(np.uint32) >> 16).astype(np.uint16), 32, 2))
    )
    prog = program(rom, [Embed("x", "x.weight"), Linear("y", "x", "w.weight")], "y")
    judge(fast, forward(lowered(rom, prog, fast, pools[0]), range(12)), found, x, w)


def test_bfloat16_rounds_to_even_flushes_and_keeps_nans() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x007FFFFF, 0x80000001], np.uint32)
    found = reference.narrow(bits.view(np.float32)).view(np.uint32)
    expected = [0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000, 0x7F800000, 0, 0x80000000]
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))
    assert np.isnan(reference.narrow(np.array([0x7F800001], np.uint32).view(np.float32))).all()


def test_what_is_used_passes_the_self_test_and_the_rest_ends_in_a_child() -> None:
    assert [name for name in FASTS if table.self_test(name) == ""] == table.fasts()
    assert table.refused_fasts() == []
