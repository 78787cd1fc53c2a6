"""The NumPy reference: runs a Program itself over the bytes of an image, bit for bit as ops.py and this file say.

It is the twin every native kernel is measured against, so it shares no helper with native code and uses nothing whose
bits depend on the machine: no libm, no float sum, no float matrix product.
Floats are IEEE-754 binary32 unless said otherwise, each operation rounded on its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vai.errors import BadRequest, CorruptImage
from vai.kernels.codebooks import dequantize
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
from vai.kernels.program import (
    ATTENTION_CHUNK,
    KV_GROUP,
    PAGE_TOKENS,
    Adjustments,
    CacheGroup,
    PlanLine,
    Program,
    SampleArgs,
    Sampled,
    StepArgs,
)
from vai.request import MAX_LOGPROBS
from vai.rom.image import BLOCK_TYPES, VECTOR

if TYPE_CHECKING:
    from vai.rom.image import Part, StoredTensor
    from vai.rom.view import Image

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]

LANES = 16  # rows of a stored block, and partial sums of the R16 order
ATTENTION_ROWS = 64  # at a time, so that their scores stay in the processor's cache; no bit depends on it
_F = np.float32


# ---------------------------------------------------------------- elementary functions

_EXP = np.array(
    [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1], np.float32
)


@np.errstate(all="ignore")
def exp(x: Floats) -> Floats:
    """e^x in binary32, maximum error 0.97 ulp: 0 below -87.3, clamped above 88.3, NaN passes (Cephes' polynomial)."""
    clamped = np.where(x > _F(88.3), _F(88.3), x)
    n = np.rint(clamped * _F(1.44269504))
    r = (clamped - n * _F(0.693359375)) - n * _F(-2.12194440e-4)
    p = np.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    t = (p * (r * r) + r) + _F(1)
    usable = x >= _F(-87.3)
    power = np.where(usable, n, _F(0)).astype(np.int32) << 23
    scaled = (t.view(np.int32) + power).view(np.float32)
    return np.where(usable, scaled, np.where(np.isnan(x), x, _F(0)))


_TANH = np.array(
    [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1], np.float32
)


@np.errstate(all="ignore")
def tanh(x: Floats) -> Floats:
    """Hyperbolic tangent in binary32, maximum error 1.4 ulp: from 0.625 on by exp, NaN passes (Cephes' polynomial)."""
    z = x * x
    p = np.full_like(x, _TANH[0])
    for coefficient in _TANH[1:]:
        p = p * z + coefficient
    size = np.abs(x)
    far = _F(1) - _F(2) / (exp(size + size) + _F(1))
    return np.where(size >= _F(0.625), np.copysign(far, x), (p * z) * x + x)


_PIO2_1, _PIO2_2, _PIO2_3 = 1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21
_SIN = (  # S6 .. S1 of fdlibm's __kernel_sin
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
_COS = (  # C6 .. C1 of fdlibm's __kernel_cos
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)


def _horner(z: Doubles, coefficients: tuple[float, ...]) -> Doubles:
    value = np.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        value = coefficient + z * value
    return value


def sin_cos(angle: Doubles) -> tuple[Doubles, Doubles]:
    """Sine and cosine in binary64 of angles up to some 10^6, reduced by a three-part pi/2."""
    n = np.rint(angle * 0.6366197723675814)
    r = ((angle - n * _PIO2_1) - n * _PIO2_2) - n * _PIO2_3
    z = r * r
    sine = r + (r * z) * _horner(z, _SIN)
    cosine = (1.0 - 0.5 * z) + (z * z) * _horner(z, _COS)
    quadrant = n.astype(np.int64) & 3
    swapped = (quadrant & 1).astype(bool)
    s, c = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(quadrant >= 2, -s, s), np.where((quadrant == 1) | (quadrant == 2), -c, c)


def log(x: float) -> float:
    """Natural logarithm in binary64 of a normal number above 0, by the series of artanh."""
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    t = (mantissa - 1.0) / (mantissa + 1.0)
    z = t * t
    series = 1.0 / 21.0
    for odd in range(19, 1, -2):
        series = 1.0 / odd + z * series
    return exponent * 0.6931471805599453 + (2.0 * t) * (1.0 + z * series)


@np.errstate(all="ignore")
def sum_r16(x: Floats) -> Floats:
    """Sum over the last axis in the R16 order: element i joins partial sum i mod 16, then +8, +4, +2, +1."""
    partial = np.zeros((*x.shape[:-1], LANES), np.float32)
    for start in range(0, x.shape[-1], LANES):
        piece = x[..., start : start + LANES]
        partial[..., : piece.shape[-1]] += piece
    for half in (8, 4, 2, 1):
        partial = partial[..., :half] + partial[..., half : 2 * half]
    return partial[..., 0]


# ---------------------------------------------------------------- stored tensors


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [N, K] in natural order: float values, or integer codes with what they are scaled by.

    G columns share a scale, and the activations one in exact arithmetic; F columns share a factor. A weight is
    (scale * factor) * code + (minimum * minimum_factor), where what there is not is left out.
    """

    values: NDArray[Any]  # float32 or int16 [N, K]
    scales: Floats | None = None  # [N, K / G], None for float values
    factors: NDArray[np.int16] | None = None  # [N, K / F]
    minimums: Floats | None = None  # [N, K / G]
    minimum_factors: NDArray[np.int16] | None = None  # [N, K / F]

    def part(self, index: int, count: int) -> Matrix:
        """One of `count` matrices that stand one below the other."""
        n = len(self.values) // count

        def cut(x: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if x is None else x[index * n : (index + 1) * n]

        values = self.values[index * n : (index + 1) * n]
        return Matrix(values, cut(self.scales), cut(self.factors), cut(self.minimums), cut(self.minimum_factors))


def _float_tiles(blocks: Bytes, dtype: str, interleave: int) -> NDArray[Any]:
    """Blocks of [k / interleave][16 rows][interleave] values as [rows, columns]."""
    down, across, _ = blocks.shape
    tiles = np.ascontiguousarray(blocks).view(dtype).reshape(down, across, -1, LANES, interleave)
    return tiles.transpose(0, 3, 1, 2, 4).reshape(down * LANES, -1)


def _widen_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _f32(blocks: Bytes) -> Matrix:
    return Matrix(_float_tiles(blocks, "<f4", 1))


def _f16(blocks: Bytes) -> Matrix:
    return Matrix(_float_tiles(blocks, "<f2", 2).astype(np.float32))


def _bf16(blocks: Bytes) -> Matrix:
    return Matrix(_widen_bf16(_float_tiles(blocks, "<u2", 2)))


def _by_row(fields: NDArray[Any]) -> NDArray[Any]:
    """[down, across, n, 16 rows] as [rows, across * n]."""
    down, across, n, _ = fields.shape
    return fields.transpose(0, 3, 1, 2).reshape(down * LANES, across * n)


def _halves(blocks: Bytes, start: int, count: int) -> Floats:
    """`count` binary16 numbers of each row of a block, from byte `start` on, as [rows, across * count]."""
    down, across, _ = blocks.shape
    halves = np.ascontiguousarray(blocks[:, :, start : start + 32 * count]).view("<f2")
    return _by_row(halves.reshape(down, across, count, LANES)).astype(np.float32)


def _fields(blocks: Bytes, start: int, lines: int, bits: int) -> NDArray[np.int16]:
    """Numbers of `bits` bits in lines of 64 bytes from byte `start` on, as [rows, columns].

    A row has four bytes of each line; the lowest bits of each are the first four columns, the next the four after them.
    """
    down, across, _ = blocks.shape
    bytes_ = blocks[:, :, start : start + 64 * lines].reshape(down, across, lines, LANES, 1, 4)
    fields = (bytes_ >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]) & ((1 << bits) - 1)
    return fields.transpose(0, 3, 1, 2, 4, 5).reshape(down * LANES, -1).astype(np.int16)


def _q4_0(blocks: Bytes) -> Matrix:
    return Matrix(_fields(blocks, 64, 8, 4) - 8, _halves(blocks, 0, 2))


def _q4_1(blocks: Bytes) -> Matrix:
    return Matrix(_fields(blocks, 128, 8, 4), _halves(blocks, 0, 2), minimums=_halves(blocks, 64, 2))


def _q5_0(blocks: Bytes) -> Matrix:
    codes = _fields(blocks, 64, 8, 4) | _fields(blocks, 576, 2, 1) << 4
    return Matrix(codes - 16, _halves(blocks, 0, 2))


def _q5_1(blocks: Bytes) -> Matrix:
    codes = _fields(blocks, 128, 8, 4) | _fields(blocks, 640, 2, 1) << 4
    return Matrix(codes, _halves(blocks, 0, 2), minimums=_halves(blocks, 64, 2))


def _q8_0(blocks: Bytes) -> Matrix:
    return Matrix(_fields(blocks, 64, 16, 8) - 128, _halves(blocks, 0, 2))


def _scaled256(blocks: Bytes, codes: NDArray[np.int16]) -> Matrix:
    """Q4_K and Q5_K: 6-bit factors of 32 columns; what is subtracted, dmin * m, is added with its sign changed."""
    down, across, _ = blocks.shape
    low = blocks[:, :, 64:192].reshape(down, across, 8, LANES)
    high = blocks[:, :, 192:256].reshape(down, across, 4, LANES)
    high = np.concatenate([high & 15, high >> 4], axis=2)
    factors, minimum_factors = (low & 15) | (high & 3) << 4, low >> 4 | high >> 2 << 4
    return Matrix(
        codes,
        _halves(blocks, 0, 1),
        _by_row(factors).astype(np.int16),
        -_halves(blocks, 32, 1),
        _by_row(minimum_factors).astype(np.int16),
    )


def _q4_k(blocks: Bytes) -> Matrix:
    return _scaled256(blocks, _fields(blocks, 256, 32, 4))


def _q5_k(blocks: Bytes) -> Matrix:
    return _scaled256(blocks, _fields(blocks, 256, 32, 4) | _fields(blocks, 2304, 8, 1) << 4)


def _q6_k(blocks: Bytes) -> Matrix:
    codes = _fields(blocks, 320, 32, 4) | _fields(blocks, 2368, 16, 2) << 4
    down, across, _ = blocks.shape
    factors = np.ascontiguousarray(blocks[:, :, 64:320]).view(np.int8).reshape(down, across, 16, LANES)
    return Matrix(codes - 32, _halves(blocks, 0, 1), _by_row(factors).astype(np.int16))


# What a code of four bits stands for: ggml's kvalues_iq4nl, and twice the values of OCP's E2M1.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)


def _iq4_nl(blocks: Bytes) -> Matrix:
    return Matrix(_IQ4[_fields(blocks, 64, 8, 4)], _halves(blocks, 0, 2))


def _iq4_xs(blocks: Bytes) -> Matrix:
    down, across, _ = blocks.shape
    low = blocks[:, :, 64:128].reshape(down, across, 4, LANES)
    low = np.concatenate([low & 15, low >> 4], axis=2)
    pairs = blocks[:, :, 32:64].reshape(down, across, 1, 2, LANES)
    high = (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & 3).reshape(down, across, 8, LANES)
    factors = _by_row(low | high << 4).astype(np.int16) - 32
    return Matrix(_IQ4[_fields(blocks, 128, 32, 4)], _halves(blocks, 0, 1), factors)


def _mxfp4(blocks: Bytes) -> Matrix:
    """The scale of exponent e is 2^(e - 128), half of what OCP's E8M0 says, as the codes are doubled."""
    down, across, _ = blocks.shape
    exponents = _by_row(blocks[:, :, :32].reshape(down, across, 2, LANES)).astype(np.int32)
    return Matrix(_E2M1[_fields(blocks, 32, 8, 4)], np.ldexp(_F(1), exponents - 128))


_UNPACK: dict[str, Callable[[Bytes], Matrix]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


def _raw(type: str) -> Callable[[Bytes], Matrix]:
    def unpacked(blocks: Bytes) -> Matrix:
        down, across, _ = blocks.shape
        return Matrix(dequantize(type, blocks).transpose(0, 2, 1, 3).reshape(down * LANES, across * 256))

    return unpacked


_UNPACK |= {kind.name: _raw(kind.name) for kind in BLOCK_TYPES.values() if kind.slow}


def _part_blocks(part: Part) -> slice:
    """The blocks of 16 stored rows that are this part's."""
    return slice(part.first_block, part.first_block + (part.blocks - 1) * part.block_step + 1, part.block_step)


def unpack(tensor: StoredTensor, part: Part, data: memoryview) -> Matrix:
    """One logical matrix out of the bytes of the stored tensor that holds it."""
    kind = BLOCK_TYPES[tensor.type]
    blocks = np.frombuffer(data, np.uint8).reshape(tensor.rows // LANES, -1, kind.bytes)[_part_blocks(part)]
    whole = _UNPACK[tensor.type](blocks)
    values = whole.values[: part.rows, : tensor.columns]
    if whole.scales is None:
        return Matrix(values)
    groups, across = -(-tensor.columns // kind.group), whole.scales.shape[1]

    def cut(x: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if x is None else x[: part.rows, : groups * (x.shape[1] // across)]

    scales = whole.scales[: part.rows, :groups]
    return Matrix(values, scales, cut(whole.factors), cut(whole.minimums), cut(whole.minimum_factors))


def unpack_vector(part: Part, data: memoryview) -> Floats:
    """One logical norm or bias."""
    vector: Floats = np.frombuffer(data, "<f4").reshape(-1, LANES)[_part_blocks(part)].reshape(-1)[: part.rows]
    return vector


# ---------------------------------------------------------------- operations


def _spread(scales: Floats, factors: NDArray[np.int16] | None, columns: int) -> Floats:
    """What each of `columns` columns is scaled by."""
    if factors is not None:
        scales = np.repeat(scales, factors.shape[1] // scales.shape[1], axis=1) * factors.astype(np.float32)
    spread: Floats = np.repeat(scales, columns // scales.shape[1], axis=1)
    return spread


@np.errstate(all="ignore")
def embed(weight: Matrix, tokens: NDArray[np.integer[Any]]) -> Floats:
    """Rows of the table as binary32, dequantized as the checkpoint's format says, each operation rounded."""
    rows: Floats = weight.values[tokens].astype(np.float32)
    if weight.scales is None:
        return rows
    factors = None if weight.factors is None else weight.factors[tokens]
    rows = _spread(weight.scales[tokens], factors, rows.shape[1]) * rows
    if weight.minimums is None:
        return rows
    factors = None if weight.minimum_factors is None else weight.minimum_factors[tokens]
    return rows + _spread(weight.minimums[tokens], factors, rows.shape[1])


@np.errstate(all="ignore")
def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    mean = sum_r16(x * x) / _F(x.shape[-1])
    r = _F(1) / np.sqrt(mean + _F(epsilon))
    scaled: Floats = (x * r[..., None]) * weight
    return scaled


@np.errstate(all="ignore")
def quantize(x: Floats, group: int = 32) -> tuple[NDArray[np.int8], Floats]:
    """Activation codes [M, K] and scales [M, K / group]: da = max|x| / 127, q = rint(x * (127 / max|x|)), half to even.

    A group below 2^-100 becomes zeros (127 / max would overflow); one with a non-finite value gets scale NaN and zeros,
    so that every output of its row is NaN.
    """
    groups = x.reshape(len(x), x.shape[1] // group, group)
    largest = np.abs(groups).max(axis=2)  # NaN where there is one
    usable = np.isfinite(largest) & (largest >= _F(2.0**-100))
    inverse = np.where(usable, _F(127) / largest, _F(0))
    codes = np.where(usable[..., None], np.rint(groups * inverse[..., None]), _F(0)).astype(np.int8)
    scales = np.where(usable, largest / _F(127), np.where(np.isfinite(largest), _F(0), _F(np.nan)))
    return codes.reshape(x.shape), scales


def _integer_sums(codes: NDArray[np.integer[Any]], weights: NDArray[np.integer[Any]]) -> Floats:
    """Sums over one group: [M, n] x [N, n] -> [M, N], exact in int32 (at most 133,169,152: Q6_K), then rounded once."""
    sums: NDArray[np.int32] = np.einsum("mk,nk->mn", codes.astype(np.int32), weights.astype(np.int32))
    return sums.astype(np.float32)


def _of_group(x: NDArray[Any], group: int, groups: int) -> NDArray[Any]:
    """The columns of `x` [N, n * groups] that belong to one group: [N, n]."""
    n = x.shape[1] // groups
    return x[:, group * n : (group + 1) * n]


def _per_column(factors: NDArray[np.int16], columns: int) -> NDArray[np.int16]:
    return np.repeat(factors, columns // factors.shape[1], axis=1)


@np.errstate(all="ignore")
def linear(x: Floats, weight: Matrix) -> Floats:
    """x [M, K] times weight [N, K] transposed in the exact kind: one accumulator an output, ascending."""
    acc = np.zeros((len(x), len(weight.values)), np.float32)
    if weight.scales is None:
        for k in range(x.shape[1]):
            acc += x[:, k, None] * weight.values[:, k]
        return acc
    groups = weight.scales.shape[1]
    columns = x.shape[1] // groups
    codes, scales = quantize(x, columns)
    for group in range(groups):
        mine, da = _of_group(codes, group, groups), scales[:, group, None]
        weights = _of_group(weight.values, group, groups).astype(np.int32)
        if weight.factors is not None:
            weights = weights * _per_column(_of_group(weight.factors, group, groups), columns)
        term = _integer_sums(mine, weights) * (weight.scales[:, group] * da)
        if weight.minimums is not None:
            factors = np.ones((1, columns), np.int16)
            if weight.minimum_factors is not None:
                factors = _per_column(_of_group(weight.minimum_factors, group, groups), columns)
            term = term + _integer_sums(mine, factors) * (weight.minimums[:, group] * da)
        acc += term
    return acc


@np.errstate(all="ignore")
def narrow(x: Floats) -> Floats:
    """Rounded to bfloat16, half to even; what is subnormal becomes a zero of its sign, a NaN stays one."""
    bits = x.view(np.uint32)
    halfway = np.uint32(0x7FFF) + (bits >> 16 & 1)
    rounded = ((bits + halfway) & np.uint32(0xFFFF0000)).view(np.float32)
    tiny = np.abs(x) < _F(2.0**-126)
    return np.where(np.isnan(x), _F(np.nan), np.where(tiny, np.copysign(_F(0), x), rounded))


def _flushed_sum(a: Floats, b: Floats) -> Floats:
    """a + b; below the smallest normal number, where it is exact, a zero of its sign."""
    total = a + b
    return np.where(np.abs(total) < _F(2.0**-126), np.copysign(_F(0), total), total)


def _fused(total: Floats, a: Floats, b: Floats) -> Floats:
    """total + a * b of narrow a and b, rounded once; below the smallest normal number, then, a zero of its sign.

    Binary64 holds a * b, and the sum as well as the rounding to binary32 needs it. From 2^-126 (1 - 2^-25) on the sum
    rounds to the smallest normal number.
    """
    exact = total.astype(np.float64) + a.astype(np.float64) * b.astype(np.float64)
    tiny = np.abs(exact) < 2.0**-126 * (1 - 2.0**-25)
    return np.where(tiny, np.copysign(0.0, exact), exact).astype(np.float32)


@np.errstate(all="ignore")
def fast_linear(x: Floats, weights: Floats) -> Floats:
    """x [M, K] times weights [N, K] (dequantized) transposed in the fast kind: [M, N].

    Both are narrowed. Of every 32 columns the even ones and the odd ones are summed apart, each product joining its sum
    in one rounding; then the two are added, and what that gives to the output (Intel's TDPBF16PS).
    """
    columns = -(-x.shape[1] // 32) * 32
    a = np.pad(narrow(x), ((0, 0), (0, columns - x.shape[1])))[:, None, :]
    w = np.pad(narrow(weights), ((0, 0), (0, columns - x.shape[1])))
    out = np.zeros((len(x), len(weights)), np.float32)
    for group in range(0, columns, 32):
        even, odd = np.zeros_like(out), np.zeros_like(out)
        for k in range(group, group + 32, 2):
            even = _fused(even, a[..., k], w[:, k])
            odd = _fused(odd, a[..., k + 1], w[:, k + 1])
        out = _flushed_sum(out, _flushed_sum(even, odd))
    return out


@np.errstate(all="ignore")
def rope(x: Floats, positions: NDArray[np.int32], op: Rope) -> Floats:
    """Rotate pairs of x [M, heads * head_dim]; angles, sines and cosines in binary64, the rotation in binary32."""
    angle = positions.astype(np.float64)[:, None] * np.array(op.frequencies)
    sine, cosine = (each.astype(np.float32)[:, None, :] for each in sin_cos(angle))
    if op.magnitude != 1:
        sine, cosine = sine * _F(op.magnitude), cosine * _F(op.magnitude)
    pairs = len(op.frequencies)
    out = x.reshape(len(x), op.heads, op.head_dim).copy()
    if op.pairing == "norm":
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    x0, x1 = out[:, :, first].copy(), out[:, :, second].copy()
    out[:, :, first] = x0 * cosine - x1 * sine
    out[:, :, second] = x0 * sine + x1 * cosine
    return out.reshape(x.shape)


@np.errstate(all="ignore")
def attend(
    q: Floats,
    positions: NDArray[np.int32],
    k: Floats,
    v: Floats,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    first: int = 0,
    fast: bool = False,
) -> Floats:
    """Causal attention of one sequence: q [M, heads, d] at ascending positions, k and v [kv_heads, tokens, d].

    Those tokens begin at position `first`, a multiple of 16. `fast`: scores and mixtures are products as `fast_linear`
    sums them, mixtures over the tokens of a chunk from its first on; `first` then is a multiple of 32.
    """
    rows, heads, head_dim = q.shape
    shared = np.arange(heads) // (heads // len(k))  # the KV head of each query head
    k, v = k[shared], v[shared]
    if fast:
        scores = np.stack([fast_linear(q[:, head], k[head]) for head in range(heads)])
    else:
        scores = np.zeros((heads, rows, k.shape[1]), np.float32)
        for d in range(head_dim):
            scores += q[:, :, d].T[:, :, None] * k[:, None, :, d]
    scores *= _F(scale)
    if softcap:
        scores = softcapped(scores, softcap)
    tokens, reach = first + np.arange(k.shape[1]), window or math.inf
    visible = (tokens <= positions[:, None]) & (tokens > positions[:, None] - reach)
    top = np.where(visible, scores, _F(-np.inf)).max(axis=2)
    # The weight +0 of a token that is not visible changes no sum.
    weights = np.where(visible, exp(scores - top[:, :, None]), _F(0))
    total, out = np.zeros((heads, rows), np.float32), np.zeros((heads, rows, head_dim), np.float32)
    chunks = tokens // ATTENTION_CHUNK
    for chunk in np.unique(chunks):
        mine = chunks == chunk
        if fast:
            mixed = np.stack([fast_linear(weights[head][:, mine], v[head][mine].T) for head in range(heads)])
        else:
            mixed = np.zeros_like(out)
            for t in np.flatnonzero(mine):
                seeing = slice(*np.searchsorted(positions, (tokens[t], tokens[t] + reach)))  # the rows that see it
                mixed[:, seeing] += weights[:, seeing, t, None] * v[:, None, t]
        total += sum_r16(weights[:, :, mine])
        out += mixed
    return (out / total[:, :, None]).transpose(1, 0, 2)


@np.errstate(all="ignore")
def silu_glu(gate: Floats, up: Floats) -> Floats:
    return (gate / (_F(1) + exp(-gate))) * up


@np.errstate(all="ignore")
def gelu_tanh_glu(gate: Floats, up: Floats) -> Floats:
    cube = (gate * gate) * gate
    bent = tanh(_F(0.7978846) * (gate + _F(0.044715) * cube))
    return ((_F(0.5) * gate) * (_F(1) + bent)) * up


_GLU: dict[str, Callable[[Floats, Floats], Floats]] = {"silu": silu_glu, "gelu_tanh": gelu_tanh_glu}


@np.errstate(all="ignore")
def softcapped(x: Floats, cap: float) -> Floats:
    return _F(cap) * tanh(x / _F(cap))


@np.errstate(all="ignore")
def route(logits: Floats, used: int, renormalize: bool, scale: float = 1.0) -> tuple[NDArray[np.int32], Floats]:
    """The chosen experts [M, used] of each row, ascending, and their shares."""
    e = exp(logits - logits.max(axis=1, keepdims=True))
    p = e / sum_r16(e)[:, None]
    chosen = np.sort(np.argsort(-p, axis=1, kind="stable")[:, :used], axis=1).astype(np.int32)
    shares = np.take_along_axis(p, chosen, axis=1)
    if renormalize:
        total = np.zeros(len(p), np.float32)
        for slot in range(used):
            total = total + shares[:, slot]
        shares = shares / total[:, None]
    return chosen, shares if scale == 1 else shares * _F(scale)


def expert_linear(x: Floats, chosen: NDArray[np.int32], weight: Matrix, experts: int) -> Floats:
    """x [M, K] or [M, used * K] times the chosen experts' matrices: [M, used * N]."""
    rows, used = chosen.shape
    pieces = np.broadcast_to(x.reshape(rows, -1, weight.values.shape[1]), (rows, used, weight.values.shape[1]))
    out = np.empty((rows, used, len(weight.values) // experts), np.float32)
    for expert in np.unique(chosen):
        mine = chosen == expert
        out[mine] = linear(pieces[mine], weight.part(int(expert), experts))
    return out.reshape(rows, -1)


@np.errstate(all="ignore")
def expert_sum(x: Floats, shares: Floats) -> Floats:
    rows, used = shares.shape
    pieces = x.reshape(rows, used, -1)
    acc = np.zeros_like(pieces[:, 0])
    for slot in range(used):
        acc = acc + shares[:, slot, None] * pieces[:, slot]
    return acc


@np.errstate(all="ignore")
def gated_add(x: Floats, gate: Floats, weight: Floats, residual: Floats) -> Floats:
    shares = _F(1) / (_F(1) + exp(-sum_r16(gate * weight)))
    added: Floats = x * shares[:, None] + residual
    return added


# ---------------------------------------------------------------- pages


def narrow_bf16(x: Floats) -> NDArray[np.uint16]:
    """Round to nearest even; a NaN stays one (quiet)."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x0040, rounded).astype(np.uint16)


@np.errstate(all="ignore")
def quantize_q8_0(x: Floats) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Codes [heads, head_dim] and scales [heads, head_dim / 32, rounded up], bfloat16; see ops.KvWrite."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % KV_GROUP))).reshape(len(x), -1, KV_GROUP)
    largest = np.abs(groups).max(axis=2)  # NaN where there is one
    usable = np.isfinite(largest) & (largest >= _F(2.0**-100))
    scales = narrow_bf16(np.where(usable, largest / _F(127), np.where(np.isfinite(largest), _F(0), _F(np.nan))))
    inverse = _F(1) / _widen_bf16(scales)
    codes = np.where(usable[..., None], np.rint(groups * inverse[..., None]), _F(0)).astype(np.int8)
    return codes.reshape(len(x), -1)[:, : x.shape[1]], scales


class _Pages:
    """K and V planes of one layer of one cache group inside the pool."""

    def __init__(self, pool: Bytes, group: CacheGroup, layer: int, kv_type: str) -> None:
        self._pool = pool
        self._group = group
        self._dtype = np.dtype({"bf16": "<u2", "f32": "<f4", "q8_0": "i1"}[kv_type])
        self._plane = group.layer_bytes(kv_type) // 2
        self._start = layer * group.layer_bytes(kv_type)
        self._scales = -(-group.head_dim // KV_GROUP) if kv_type == "q8_0" else 0

    def keys(self, page: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """Views [kv_heads, 2, head_dim, 16] of the page at byte `page`, and [kv_heads, 2, scales, 16] of its scales."""
        heads, halves = self._group.kv_heads, PAGE_TOKENS // LANES
        elements, scales = self._views(page + self._start, heads * halves)
        return elements.reshape(heads, halves, -1, LANES), scales.reshape(heads, halves, self._scales, LANES)

    def values(self, page: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """Views [kv_heads, 32, head_dim] of the page at byte `page`, and [kv_heads, 32, scales] of its scales."""
        heads = self._group.kv_heads
        elements, scales = self._views(page + self._start + self._plane, heads)
        return elements.reshape(heads, PAGE_TOKENS, -1), scales.reshape(heads, PAGE_TOKENS, self._scales)

    def write(self, page: int, slot: int, k: Floats, v: Floats) -> None:
        """Store k and v [kv_heads, head_dim] of one token."""
        keys, key_scales = self.keys(page)
        values, value_scales = self.values(page)
        half, lane = divmod(slot, LANES)
        keys[:, half, :, lane], key_scales[:, half, :, lane] = self._stored(k)
        values[:, slot], value_scales[:, slot] = self._stored(v)

    def read(self, pages: NDArray[np.int64], tokens: int) -> tuple[Floats, Floats]:
        """k and v [kv_heads, tokens, head_dim] as stored."""
        keys, values = [], []
        for page in pages.tolist():
            elements, scales = (each.transpose(0, 1, 3, 2) for each in self.keys(page))
            keys.append(self._loaded(elements, scales).reshape(self._group.kv_heads, PAGE_TOKENS, -1))
            values.append(self._loaded(*self.values(page)))
        return np.concatenate(keys, axis=1)[:, :tokens], np.concatenate(values, axis=1)[:, :tokens]

    def _views(self, start: int, blocks: int) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """The elements of one plane, block by block, and the scales that stand before those of each block."""
        plane = self._pool[start : start + self._plane].reshape(blocks, -1)
        bytes_ = 2 * self._scales * self._group.kv_heads * PAGE_TOKENS // blocks
        return plane[:, bytes_:].view(self._dtype), plane[:, :bytes_].view("<u2")

    def _stored(self, x: Floats) -> tuple[NDArray[Any], NDArray[np.uint16]]:
        """Elements and scales of x [kv_heads, head_dim]."""
        if self._scales:
            return quantize_q8_0(x)
        return narrow_bf16(x) if self._dtype.itemsize == 2 else x, np.zeros((len(x), 0), np.uint16)

    @np.errstate(all="ignore")
    def _loaded(self, x: NDArray[Any], scales: NDArray[np.uint16]) -> Floats:
        if self._scales:
            spread = np.repeat(_widen_bf16(scales), KV_GROUP, axis=-1)[..., : x.shape[-1]]
            return x.astype(np.float32) * spread
        return _widen_bf16(x) if self._dtype.itemsize == 2 else x


# ---------------------------------------------------------------- the plan


class ReferencePlan:
    """A Program and the unpacked weights of one image. Implements program.Plan; for tests and small models.

    A step has at most `max_rows` rows, of which at most `max_sequences` give results. `fast`: the name of its fast
    kind, which has the bits of "portable". Raises CorruptImage where the image does not hold what the Program needs.
    """

    def __init__(
        self,
        program: Program,
        image: Image,
        *,
        kv_type: str,
        max_rows: int,
        max_sequences: int,
        fast: str | None = None,
    ) -> None:
        self.kv_type = kv_type
        self.fast = fast
        self._wide: set[str] = set()  # matrices of types that have no fast kind
        self._program = program
        self._max_rows, self._max_sequences = max_rows, max_sequences
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, Floats] = {}
        for name, shape in program.constants.items():
            self._load(image, name, shape)
        self._widths = _value_widths(program)
        self.workspace_bytes = 4 * max_rows * sum(self._widths.values())

    def forward(self, step: StepArgs, pool: Bytes, seconds: Doubles | None = None) -> Floats:
        """See program.Plan. Raises BadRequest for a step larger than the plan, or of a kind that is not built."""
        rows, results = len(step.tokens), len(step.output_rows)
        kinds = ["exact"] if self.fast is None else ["exact", "fast"]
        if rows > self._max_rows or results > self._max_sequences or step.kind not in kinds:
            raise BadRequest(
                f"A step of {rows} rows, {results} results and kind '{step.kind}' does not fit this plan "
                f"of {self._max_rows}, {self._max_sequences} and {' or '.join(kinds)}."
            )
        values: dict[str, Any] = {}  # float32, and int32 for the chosen experts
        for index, op in enumerate(self._program.ops):
            began = time.perf_counter()
            self._run(op, values, step, pool)
            if seconds is not None:
                seconds[index] += time.perf_counter() - began
        logits: Floats = values[self._program.outputs["logits"]]
        return logits

    def describe(self, kind: str = "exact") -> list[PlanLine]:
        """An operation each, the same for every kind; what they read is not told apart."""
        kinds = [type(op).__name__.lower() for op in self._program.ops]
        return [PlanLine(kind, "", (line,), 0, 0, 0, "f32", False) for line, kind in enumerate(kinds, 1)]

    def lines(self) -> list[str]:
        return [str(op) for op in self._program.ops]

    def _load(self, image: Image, name: str, shape: tuple[int, int]) -> None:
        tensor, part, data = image.tensor(name)
        if (part.rows, tensor.columns) != shape or (tensor.type == VECTOR) != (shape[1] == 1):
            raise CorruptImage(f"The image's tensor {name} is {part.rows} x {tensor.columns}; the model needs {shape}.")
        if tensor.type == VECTOR:
            self._vectors[name] = unpack_vector(part, data)
        else:
            self._matrices[name] = unpack(tensor, part, data)
            if tensor.type in ("F16", "F32"):
                self._wide.add(name)

    def _run(self, op: Op, values: dict[str, Any], step: StepArgs, pool: Bytes) -> None:
        match op:
            case Embed():
                rows = embed(self._matrices[op.weight], step.tokens)
                values[op.output] = rows if op.scale == 1 else rows * _F(op.scale)
            case RmsNorm():
                normal = rms_norm(values[op.x], self._vectors[op.weight], op.epsilon)
                values[op.output] = normal if op.residual is None else normal + values[op.residual]
            case HeadNorm():
                heads = values[op.x].reshape(len(step.tokens), op.heads, -1)
                values[op.output] = rms_norm(heads, self._vectors[op.weight], op.epsilon).reshape(len(heads), -1)
            case Linear():
                values[op.output] = self._linear(op, values, fast=step.kind == "fast")
            case Rope():
                values[op.output] = rope(values[op.x], step.positions, op)
            case KvWrite():
                self._write(op, values, step, pool)
            case Attention():
                values[op.output] = self._attention(op, values[op.q], step, pool)
            case Glu():
                values[op.output] = _GLU[op.act](values[op.gate], values[op.up])
            case Route():
                found = route(values[op.logits], op.used, op.renormalize, op.scale)
                values[op.chosen], values[op.shares] = found
            case ExpertLinear():
                weight = self._matrices[op.weight]
                values[op.output] = expert_linear(values[op.x], values[op.chosen], weight, op.experts)
            case ExpertSum():
                out = expert_sum(values[op.x], values[op.shares])
                values[op.output] = out if op.residual is None else out + values[op.residual]
            case GatedAdd():
                opening = values[op.gate], self._vectors[op.weight]
                values[op.output] = gated_add(values[op.x], *opening, values[op.residual])
            case Rows():
                values[op.output] = values[op.x][step.output_rows]

    @np.errstate(all="ignore")
    def _linear(self, op: Linear, values: dict[str, Floats], *, fast: bool) -> Floats:
        weight = self._matrices[op.weight]
        if fast and op.weight not in self._wide:
            out = fast_linear(values[op.x], embed(weight, np.arange(len(weight.values))))
        else:
            out = linear(values[op.x], weight)
        if op.addend is not None:
            out = out + values[op.addend]
        if op.bias is not None:
            out = out + self._vectors[op.bias]
        if op.residual is not None:
            out = out + values[op.residual]
        return softcapped(out, op.softcap) if op.softcap else out

    def _write(self, op: KvWrite, values: dict[str, Floats], step: StepArgs, pool: Bytes) -> None:
        group = self._program.groups[op.group]
        pages = _Pages(pool, group, op.layer, self.kv_type)
        k = values[op.k].reshape(-1, group.kv_heads, group.head_dim)
        v = values[op.v].reshape(-1, group.kv_heads, group.head_dim)
        for sequence, table in enumerate(step.block_tables[op.group]):
            for row in range(step.seq_start[sequence], step.seq_start[sequence + 1]):
                page, slot = divmod(int(step.positions[row]), PAGE_TOKENS)
                pages.write(int(table[page]), slot, k[row], v[row])

    def _attention(self, op: Attention, q: Floats, step: StepArgs, pool: Bytes) -> Floats:
        pages = _Pages(pool, self._program.groups[op.group], op.layer, self.kv_type)
        heads = q.reshape(len(q), op.heads, op.head_dim)
        out = np.empty_like(heads)
        fast = step.kind == "fast" and self.kv_type != "f32"
        for sequence, table in enumerate(step.block_tables[op.group]):
            first, end = int(step.seq_start[sequence]), int(step.seq_start[sequence + 1])
            tokens = int(step.context[sequence]) + end - first
            behind = _behind(op.window, int(step.context[sequence]))
            k, v = pages.read(table[behind // PAGE_TOKENS : -(-tokens // PAGE_TOKENS)], tokens - behind)
            for start in range(first, end, ATTENTION_ROWS):
                rows = slice(start, min(start + ATTENTION_ROWS, end))
                positions = step.positions[rows]
                begin = _behind(op.window, int(positions[0]))
                seen = slice(begin - behind, int(positions[-1]) + 1 - behind)
                out[rows] = attend(
                    heads[rows],
                    positions,
                    k[:, seen],
                    v[:, seen],
                    op.scale,
                    window=op.window,
                    softcap=op.softcap,
                    first=begin,
                    fast=fast,
                )
        return out.reshape(q.shape)


def _behind(window: int, position: int) -> int:
    """How many tokens stand in pages that a row at `position` has wholly behind its window."""
    return max(0, position + 1 - window) // PAGE_TOKENS * PAGE_TOKENS if window else 0


def _value_widths(program: Program) -> dict[str, int]:
    """Columns of every named value."""
    widths: dict[str, int] = {}
    for op in program.ops:
        match op:
            case Embed():
                widths[op.output] = program.constants[op.weight][1]
            case Linear():
                widths[op.output] = program.constants[op.weight][0]
            case RmsNorm() | HeadNorm() | Rope() | GatedAdd() | Rows():
                widths[op.output] = widths[op.x]
            case Attention():
                widths[op.output] = widths[op.q]
            case Glu():
                widths[op.output] = widths[op.gate]
            case Route():
                widths[op.chosen] = widths[op.shares] = op.used
            case ExpertLinear():
                widths[op.output] = widths[op.chosen] * (program.constants[op.weight][0] // op.experts)
            case ExpertSum():
                widths[op.output] = widths[op.x] // widths[op.shares]
            case KvWrite():
                pass
    return widths


# ---------------------------------------------------------------- sampling

NO_TOKEN = -1  # the row cannot be sampled: a logit is NaN, or none is finite
_MASK32 = 0xFFFFFFFF


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words for a key and a counter."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The 53-bit number in [0, 1) that decides one token."""
    r0, r1, _, _ = philox((seed & _MASK32, seed >> 32), (position, choice, 0, 0))
    return ((r0 >> 5) * 67108864 + (r1 >> 6)) * 2.0**-53


def _sum_of(p: Floats) -> float:
    """The binary64 sum of a row's probabilities, in the R16 order."""
    lines = np.zeros((-(-len(p) // LANES), LANES))
    lines.reshape(-1)[: len(p)] = p
    partial = np.add.accumulate(lines)[-1]
    for half in (8, 4, 2, 1):
        partial = partial[:half] + partial[half : 2 * half]
    return float(partial[0])


def _running(x: NDArray[Any]) -> Doubles:
    """Running binary64 sums, one addition after the other (which `accumulate` is by definition, unlike `sum`)."""
    return np.add.accumulate(x.astype(np.float64))


@np.errstate(all="ignore")
def draw(logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """One token from logits [vocabulary]: filters in the order top_k, top_p, min_p; ties go to the lower id."""
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return NO_TOKEN
    if temperature == 0:
        return int(logits.argmax())
    z = logits / _F(temperature)
    p = exp(z - z.max())
    if np.isnan(p).any():  # the temperature is so small that z overflows
        return NO_TOKEN
    order = np.argsort(-p, kind="stable")
    if 0 < top_k < len(order):
        order = order[:top_k]
    total = float(_running(p[np.sort(order)])[-1]) if len(order) < len(p) else _sum_of(p)
    kept = len(order)
    if top_p < 1:
        reached = _running(p[order]) >= float(_F(top_p)) * total
        kept = int(reached.argmax()) + 1 if reached.any() else kept
    if min_p > 0:
        kept = int((p[order[:kept]] >= _F(min_p) * p[order[0]]).sum())
    running = _running(p[order[:kept]])
    if kept < len(p):
        total = float(running[-1])
    chosen = running > u * total
    possible = np.flatnonzero(p[order[:kept]] > 0)  # the last of them, should rounding leave nothing over
    return int(order[int(chosen.argmax()) if chosen.any() else int(possible[-1])])


@np.errstate(all="ignore")
def adjusted(logits: Floats, row: int, adjustments: Adjustments) -> Floats:
    """The logits [vocabulary] of `row` that are drawn from; see Adjustments."""
    z = logits.copy()
    first, end = adjustments.bias_start[row : row + 2]
    for id, bias in zip(adjustments.bias_ids[first:end], adjustments.biases[first:end], strict=True):
        z[id] = z[id] + bias
    first, end = adjustments.seen_start[row : row + 2]
    seen, made = adjustments.seen_ids[first:end], adjustments.made[first:end]
    repetition = adjustments.repetition[row]
    z[seen] = np.where(z[seen] > 0, z[seen] / repetition, z[seen] * repetition)
    answer, times = seen[made > 0], made[made > 0].astype(np.float32)
    z[answer] = z[answer] - adjustments.frequency[row] * times
    z[answer] = z[answer] - adjustments.presence[row]
    return z


def masked(logits: Floats, bits: NDArray[np.uint8]) -> Floats:
    """The logits [vocabulary] that are drawn from under a mask; see Masks."""
    allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
    return np.where(allowed | np.isnan(logits), logits, _F(-np.inf))


@np.errstate(all="ignore")
def log_probabilities(logits: Floats, ids: NDArray[np.int64]) -> Floats:
    """Natural logarithms of the probabilities of `ids` before temperature and filters."""
    top = logits.max()
    norm = float(top) + log(_sum_of(exp(logits - top)))
    return (logits[ids].astype(np.float64) - norm).astype(np.float32)


def sample_reference(logits: Floats, args: SampleArgs) -> Sampled:
    """Draw a token for every row of logits [R, vocabulary]; a row that cannot be sampled gets NO_TOKEN."""
    rows = len(logits)
    tokens = np.full(rows, NO_TOKEN, np.int32)
    logprob = np.full(rows, np.nan, np.float32)
    top_ids = np.full((rows, MAX_LOGPROBS), NO_TOKEN, np.int32)
    top_logprobs = np.full((rows, MAX_LOGPROBS), np.nan, np.float32)
    for row in range(rows):
        u = uniform(int(args.seed[row]), int(args.choice[row]), int(args.position[row]))
        z = logits[row] if args.adjustments is None else adjusted(logits[row], row, args.adjustments)
        if args.masks is not None and args.masks.of[row] >= 0:
            z = masked(z, args.masks.bits[args.masks.of[row]])
        tokens[row] = draw(
            z,
            float(args.temperature[row]),
            int(args.top_k[row]),
            float(args.top_p[row]),
            float(args.min_p[row]),
            u,
        )
        if args.logprobs[row] < 0 or tokens[row] == NO_TOKEN:
            continue
        best = np.argsort(-logits[row], kind="stable")[: args.logprobs[row]]
        found = log_probabilities(logits[row], np.array([tokens[row], *best]))
        logprob[row] = found[0]
        top_ids[row, : len(best)], top_logprobs[row, : len(best)] = best, found[1:]
    return Sampled(tokens, logprob, top_ids, top_logprobs)
