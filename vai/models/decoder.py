"""The plain decoder as a Program: pre-norm blocks of grouped-query attention with RoPE, and gated feed-forward."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence

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
from vai.kernels.program import CacheGroup, Program
from vai.models.spec import Spec, expected_tensors


def build(spec: Spec) -> Program:
    """The forward pass of `spec`, from token ids to logits.

    Llama: Touvron et al. 2023; Qwen 2: Yang et al. 2024; Qwen 3: Yang et al. 2025; Gemma 2 and 3: Gemma
    Team 2024, 2025; Mistral: Jiang et al. 2023; Mixtral: Jiang et al. 2024;
    Qwen 2 MoE: Yang et al. 2024.
    """
    frequencies = _frequencies(spec)
    local = rope_frequencies(spec.local_rope_base, spec.rope_dims, 1.0) if spec.local_rope_base else frequencies
    groups, places = _cache_groups(spec)
    ops: list[Op] = [Embed("embedding", "token_embd.weight", spec.embedding_scale)]
    x = "embedding"
    for layer, place in enumerate(places):
        ops += _block(spec, layer, x, local if spec.has_window(layer) else frequencies, place)
        x = f"blk.{layer}.output"
    ops += [
        # Only the rows that are asked for go through the final norm and the output projection.
        Rows("last", x),
        RmsNorm("last.norm", "last", "output_norm.weight", spec.norm_epsilon),
        Linear(
            "logits",
            "last.norm",
            "token_embd.weight" if spec.tied else "output.weight",
            softcap=spec.logit_softcap,
        ),
    ]
    return Program(
        ops=tuple(ops),
        groups=groups,
        outputs={"logits": "logits"},
        constants=expected_tensors(spec),
        width=spec.width,
        vocabulary=spec.vocabulary,
        context=spec.context,
    )


def _frequencies(spec: Spec) -> tuple[float, ...]:
    if spec.rope_scaling != "yarn":
        return rope_frequencies(spec.rope_base, spec.rope_dims, spec.rope_factor, spec.rope_divisors)
    return yarn_frequencies(
        spec.rope_base,
        spec.rope_dims,
        spec.rope_factor,
        spec.rope_original_context,
        spec.rope_beta_fast,
        spec.rope_beta_slow,
    )


def _magnitude(spec: Spec) -> float:
    """What the elements of queries and keys that are rotated are multiplied by. Where all are, scores get its square.

    YaRN's is 1 + 0.1 ln(factor), which sharpens attention over a longer context.
    """
    if spec.rope_scaling != "yarn":
        return spec.rope_magnitude
    with decimal.localcontext(decimal.Context(prec=50)):
        stretched = 1 + decimal.Decimal(max(1.0, spec.rope_factor)).ln() / 10
        return float(decimal.Decimal(spec.rope_magnitude) * stretched)


def _cache_groups(spec: Spec) -> tuple[tuple[CacheGroup, ...], list[tuple[int, int]]]:
    """The layers that see everything, then those with a window; and of each layer its group and its place there."""
    windows = [spec.window if spec.has_window(layer) else None for layer in range(spec.layers)]
    kinds = sorted(set(windows), key=lambda window: window is not None)
    groups = tuple(CacheGroup(windows.count(kind), spec.kv_heads, spec.head_dim, kind) for kind in kinds)
    places = [(kinds.index(window), windows[:layer].count(window)) for layer, window in enumerate(windows)]
    return groups, places


def _block(spec: Spec, layer: int, x: str, frequencies: tuple[float, ...], place: tuple[int, int]) -> list[Op]:
    """x + attention(norm(x)), then that plus feed_forward(norm of that); each part's result normalized or not."""
    b = f"blk.{layer}."
    bias = {name: f"{b}attn_{name}.bias" if spec.qkv_bias else None for name in "qkv"}
    q, k = b + "q", b + "k"
    magnitude = _magnitude(spec)
    rotated, scored = (1.0, magnitude**2) if spec.rope_dims == spec.head_dim else (magnitude, 1.0)
    normed: list[Op] = []
    if spec.qk_norm:
        normed = [
            HeadNorm(q + ".norm", q, b + "attn_q_norm.weight", spec.heads, spec.norm_epsilon),
            HeadNorm(k + ".norm", k, b + "attn_k_norm.weight", spec.kv_heads, spec.norm_epsilon),
        ]
        q, k = q + ".norm", k + ".norm"
    return [
        RmsNorm(b + "attn_norm", x, b + "attn_norm.weight", spec.norm_epsilon),
        Linear(b + "q", b + "attn_norm", b + "attn_q.weight", bias=bias["q"]),
        Linear(b + "k", b + "attn_norm", b + "attn_k.weight", bias=bias["k"]),
        Linear(b + "v", b + "attn_norm", b + "attn_v.weight", bias=bias["v"]),
        *normed,
        Rope(b + "q.rope", q, spec.heads, spec.head_dim, spec.pairing, frequencies, rotated),
        Rope(b + "k.rope", k, spec.kv_heads, spec.head_dim, spec.pairing, frequencies, rotated),
        KvWrite(b + "k.rope", b + "v", group=place[0], layer=place[1]),
        Attention(
            b + "attention",
            b + "q.rope",
            group=place[0],
            layer=place[1],
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            scale=(spec.attention_scale or 1.0 / math.sqrt(spec.head_dim)) * scored,
            window=spec.window if spec.has_window(layer) else 0,
            softcap=spec.attention_softcap,
        ),
        *_added(
            spec, b + "attn_output", b + "attention", b + "attn_output.weight", b + "post_attention_norm.weight", x
        ),
        RmsNorm(b + "ffn_norm", b + "attn_output", b + "ffn_norm.weight", spec.norm_epsilon),
        *(_experts(spec, b) if spec.experts else _feed_forward(spec, b)),
    ]


def _feed_forward(spec: Spec, b: str) -> list[Op]:
    return [
        Linear(b + "gate", b + "ffn_norm", b + "ffn_gate.weight"),
        Linear(b + "up", b + "ffn_norm", b + "ffn_up.weight"),
        Glu(b + "glu", b + "gate", b + "up", act=spec.act),
        *_added(spec, b + "output", b + "glu", b + "ffn_down.weight", b + "post_ffw_norm.weight", b + "attn_output"),
    ]


def _added(spec: Spec, output: str, x: str, weight: str, norm: str, residual: str) -> list[Op]:
    """residual + x times weight, that product normalized where the family does so."""
    if not spec.post_norms:
        return [Linear(output, x, weight, residual=residual)]
    return [
        Linear(output + ".plain", x, weight),
        RmsNorm(output, output + ".plain", norm, spec.norm_epsilon, residual=residual),
    ]


def _experts(spec: Spec, b: str) -> list[Op]:
    """Of many feed-forward layers, those that the router gives a row to (Shazeer et al. 2017), and the shared one."""
    chosen, output = b + "experts", b + ("routed" if spec.shared_ffn else "output")
    routed: list[Op] = [
        Linear(b + "router", b + "ffn_norm", b + "ffn_gate_inp.weight"),
        Route(chosen, b + "shares", b + "router", spec.experts_used, spec.renormalize, spec.expert_scale),
        ExpertLinear(b + "gate", b + "ffn_norm", chosen, b + "ffn_gate_exps.weight", spec.experts),
        ExpertLinear(b + "up", b + "ffn_norm", chosen, b + "ffn_up_exps.weight", spec.experts),
        Glu(b + "glu", b + "gate", b + "up", act=spec.act),
        ExpertLinear(b + "down", b + "glu", chosen, b + "ffn_down_exps.weight", spec.experts),
        ExpertSum(output, b + "down", b + "shares", residual=b + "attn_output"),
    ]
    if not spec.shared_ffn:
        return routed
    shared = b + "shared"
    return [
        *routed,
        Linear(shared + ".gate", b + "ffn_norm", b + "ffn_gate_shexp.weight"),
        Linear(shared + ".up", b + "ffn_norm", b + "ffn_up_shexp.weight"),
        Glu(shared + ".glu", shared + ".gate", shared + ".up", act=spec.act),
        Linear(shared, shared + ".glu", b + "ffn_down_shexp.weight"),
        GatedAdd(b + "output", shared, b + "ffn_norm", b + "ffn_gate_inp_shexp.weight", residual=output),
    ]


def rope_frequencies(base: float, dims: int, factor: float, divisors: Sequence[float] = ()) -> tuple[float, ...]:
    """Radians per token of each rotated pair i: base^(-2i / dims) / factor [/ divisors[i]], dims / 2 of them.

    In decimal, because the platforms' pow() disagree in the last bit and these numbers decide every logit.
    """
    with decimal.localcontext(decimal.Context(prec=50)):
        frequencies = [decimal.Decimal(base) ** (decimal.Decimal(-2 * i) / dims) for i in range(dims // 2)]
        scaled = [frequency / decimal.Decimal(factor) for frequency in frequencies]
        if divisors:
            scaled = [frequency / decimal.Decimal(each) for frequency, each in zip(scaled, divisors, strict=True)]
        return tuple(float(frequency) for frequency in scaled)


_TWO_PI = decimal.Decimal("6.2831853071795864769252867665590057683943387987502")


def yarn_frequencies(
    base: float, dims: int, factor: float, context: int, fast: float, slow: float
) -> tuple[float, ...]:
    """Radians per token of each rotated pair by YaRN (Peng et al. 2023), in decimal for the same reason.

    A pair that turns `fast` times or more within `context` tokens keeps the frequency it has by rope_frequencies, one
    that turns `slow` times or less has it divided by `factor`; between the indices of these two, the one rounded down
    and the other up, the share of each is linear.
    """
    with decimal.localcontext(decimal.Context(prec=50)):
        # base^(-2i / dims) context / 2 pi turns is `turns` at this i, as in the paper's equation 17
        ends = [
            dims * (context / (decimal.Decimal(turns) * _TWO_PI)).ln() / (2 * decimal.Decimal(base).ln())
            for turns in (fast, slow)
        ]
        low, high = max(0, math.floor(ends[0])), min(dims - 1, math.ceil(ends[1]))
        span = max(decimal.Decimal(high - low), decimal.Decimal("0.001"))  # at one index: a step
        frequencies = []
        for i in range(dims // 2):
            plain = decimal.Decimal(base) ** (decimal.Decimal(-2 * i) / dims)
            share = min(max((i - low) / span, decimal.Decimal(0)), decimal.Decimal(1))
            frequencies.append(float(plain / decimal.Decimal(factor) * share + plain * (1 - share)))
        return tuple(frequencies)
