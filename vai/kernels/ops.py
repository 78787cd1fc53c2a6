"""The operation set: what a Program may say, one signature and one contract each.

Operations are *semantic*: they say what is computed, not how. Values are named float32 arrays whose first axis is the
step's flattened rows M (R after `Rows`). Weights are logical tensor names of the image. All arithmetic is IEEE-754
binary32, each operation rounded on its own (DESIGN section 5), in the order written here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Embed:
    """output [M, width] = rows `tokens` of `weight` [vocabulary, width], dequantized; each operation is rounded.

    code * d; where the format has minimums code * d + m; with factors of 6 or 8 bits (d * sc) * code - (dmin * m). In
    IQ4_NL, IQ4_XS and MXFP4 the code stands for an entry of a table (docs/rom-format.md). What a raw block holds:
    codebooks.py. A `scale` that is not 1 multiplies the result.
    """

    output: str
    weight: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """output[m] = (x[m] * r) * weight, r = 1 / sqrt(ss / n + epsilon), ss = sum of squares in the R16 order.

    R16: 16 partial sums, element i goes to p[i mod 16] in ascending order; then p[j] += p[j+8], +4, +2, +1.
    The division by n, the addition, sqrt and the reciprocal are four operations, each rounded. Then + residual.
    """

    output: str
    x: str
    weight: str
    epsilon: float
    residual: str | None = None


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RmsNorm over the `head_dim` columns of each head of x [M, heads * head_dim] on its own, all with `weight`."""

    output: str
    x: str
    weight: str
    heads: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class Linear:
    """output [M, N] = x [M, K] times `weight` [N, K] transposed = acc; then + addend, + bias, + residual.

    With a `softcap` that is not 0, last of all softcap * tanh(y / softcap).

    In the exact kind block types quantize x to int8 per row and group (rom.image.BlockType.group); acc = +0, then for
    each group in ascending order acc = acc + (float(isum) * (dw * da)), isum being the exact sum of the codes'
    products, times their factors where there are (Q6_K, IQ4_XS); a code of IQ4_NL, IQ4_XS or MXFP4 counts as its
    table's entry, and MXFP4's dw is 2^(e - 128). Q4_1, Q5_1: acc = acc + (float(isum) * (dw * da) + float(asum) * (m *
    da)), asum being the sum of x's codes. Q4_K, Q5_K: acc = acc + (float(isum) * (dw * da) - float(asum) * (dmin *
    da)), asum being that times the minimums' factors. Float types, and raw blocks dequantized: acc = acc + (x[k] * w[n,
    k]) for ascending k.

    In the fast kind F16 and F32 are multiplied as in the exact one. Any other weight is dequantized as Embed does it,
    and it and x are rounded to bfloat16, half to even. acc = +0, then for each group of 32 columns in ascending order
    acc = acc + (e + o), e being the sum of x[k] * w[n, k] over its even columns and o over its odd ones, from +0 in
    ascending order, each product joining its sum in one rounding. Columns past K are zeros. Whatever is subnormal,
    before or after a step of this, is a zero of its sign. So Intel's TDPBF16PS has it.
    """

    output: str
    x: str
    weight: str
    bias: str | None = None
    addend: str | None = None
    residual: str | None = None
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of x [M, heads * head_dim] by each row's position.

    Pair i of a head rotates by the angle a = position * frequencies[i] (binary64 product): x0' = x0*c - x1*s,
    x1' = x0*s + x1*c, where c and s are cos(a), sin(a) computed in binary64 (see reference.py) and rounded to binary32.
    pairing "norm": (2i, 2i+1); "neox": (i, i + n/2) with n = 2 * len(frequencies). Columns from n on pass unchanged.
    A `magnitude` that is not 1 multiplies c and s, in binary32.
    """

    output: str
    x: str
    heads: int
    head_dim: int
    pairing: str
    frequencies: tuple[float, ...]
    magnitude: float = 1.0


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Store k and v [M, kv_heads * head_dim] of every row at its position, in `layer` of cache group `group`.

    The KV type is the Plan's: "bf16" (round to nearest even), "f32", or "q8_0": of every row and head, KV_GROUP
    elements (the last of a head may be fewer) share the scale d = bf16(a / 127), a being their largest magnitude, and
    have the codes rint(x * (1 / d)), half to even. Where a is below 2^-100, d and codes are 0; where an element is not
    finite, d is NaN and the codes are 0. An element is then read as code * d, which binary32 holds exactly.
    """

    k: str
    v: str
    group: int
    layer: int


@dataclass(frozen=True, slots=True)
class Attention:
    """output [M, heads * head_dim]: causal grouped-query attention over the pages as stored, own rows included.

    Query head h reads KV head h // (heads / kv_heads). Per row and head, for the tokens t = 0..position, with a
    `window` for the last `window` of them only: s[t] = (sum over ascending d of q[d] * k[t][d], multiply and add
    rounded apart) * scale; with a `softcap` then s[t] = softcap * tanh(s[t] / softcap); m = max s;
    e[t] = exp(s[t] - m). In chunks of 1,024 tokens counted from position 0: l_c = R16 sum of e, with token t in partial
    sum t mod 16, o_c[d] = sum over ascending t of e[t] * v[t][d], both from +0. Then l and o are the sums of l_c and
    o_c over ascending chunks, from the first chunk with such a token on, and output[d] = o[d] / l.

    `window`, `softcap`: 0 for none. A group with a window of its own has no layer that looks further back.
    """

    output: str
    q: str
    group: int
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Glu:
    """output = act(gate) * up, each operation rounded.

    "silu": g / (1 + exp(-g)). "gelu_tanh": (0.5 * g) * (1 + tanh(0.7978846 * (g + 0.044715 * ((g * g) * g)))).
    """

    output: str
    gate: str
    up: str
    act: str


@dataclass(frozen=True, slots=True)
class Route:
    """Which experts each row goes to: chosen [M, used] (int32, ascending ids) and shares [M, used], what each counts.

    p = e / t for e[i] = exp(logits[i] - max logits) and t their sum in the R16 order. Chosen are the `used` largest p,
    of equals the lower id; shares are their p, with `renormalize` each divided by the sum of the row's shares, added
    from +0 in ascending id; a `scale` that is not 1 multiplies them last of all. A row with a NaN, or with no finite
    largest logit, has the first experts and shares NaN.
    """

    chosen: str
    shares: str
    logits: str
    used: int
    renormalize: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertLinear:
    """output [M, used * N]: for each expert that a row chose, in that order, x times the expert's matrix, as in Linear.

    `weight` [experts * N, K] has the experts' matrices one below the other. x is [M, K], which all of a row's experts
    read, or [M, used * K], a piece for each.
    """

    output: str
    x: str
    chosen: str
    weight: str
    experts: int


@dataclass(frozen=True, slots=True)
class ExpertSum:
    """output [M, n] = the sum over a row's experts of share * x[expert's piece], from +0 in ascending id; + residual.

    x is [M, used * n]; each product and each sum is rounded.
    """

    output: str
    x: str
    shares: str
    residual: str | None = None


@dataclass(frozen=True, slots=True)
class GatedAdd:
    """output [M, n] = x * s + residual, s = 1 / (1 + exp(-g)) being one number a row, each operation rounded.

    g is the sum in the R16 order of gate * weight: gate [M, K], `weight` a vector of K. How an expert that every row
    reads joins what the chosen ones gave (Qwen 2 MoE).
    """

    output: str
    x: str
    gate: str
    weight: str
    residual: str


@dataclass(frozen=True, slots=True)
class Rows:
    """output [R, n] = the rows `output_rows` of x: what the caller asked results for."""

    output: str
    x: str


Op = (
    Embed
    | RmsNorm
    | HeadNorm
    | Linear
    | Rope
    | KvWrite
    | Attention
    | Glu
    | Route
    | ExpertLinear
    | ExpertSum
    | GatedAdd
    | Rows
)
