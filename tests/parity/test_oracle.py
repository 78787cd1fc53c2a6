"""The reference computes the models that others compute: transformers' logits on the same weights, as golden arrays.

Nothing here is tuned. Where weights and KV are floats, the only differences are roundings of binary32: a sum of K terms
of random sign errs by sqrt(K) * 2^-24 of its size (Higham and Mary 2019), and no path through the network has more than
6 sums a layer (projections, scores, mixing, output, gate, down) and one at the end, so the relative error of a row of
logits stays below (6 * layers + 1) * sqrt(K) * 2^-24 even if they all pull the same way.

Where activations are quantized to int8 or keys and values to bfloat16 or q8_0, each rounding moves a number by up to
half a step, evenly. `Ideal`, a decoder of its own in binary64, adds just that noise in the places where the reference
rounds and lets it travel to the logits, 16 times over; the reference is one more draw, so its error lies within 5
standard deviations of the draws' mean, on either side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from vai.burn.synth import SHAPES
from vai.kernels import reference
from vai.kernels.ops import HeadNorm, Linear
from vai.kernels.program import KV_GROUP, PAGE_TOKENS, Program, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.view import Image

Doubles = NDArray[np.float64]
Burned = Callable[[str, str], Image]
Checkpoint = Callable[[str, str], Path]

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = (
    "tiny",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-mistral",
    "tiny-phi3",
    "tiny-longrope",
    "tiny-phi4",
    "tiny-yarn",
    "tiny-qwen3moe",
    "tiny-mixtral",
    "tiny-qwen2moe",
)
ALIKE = ("tiny-mixtral", "tiny-qwen2moe", "tiny-phi4")  # what they quantize is what others do
DRAWS = 16
QUANTIZED = [("F32", "bf16"), ("F32", "q8_0"), ("Q8_0", "f32"), ("Q8_0", "bf16"), ("Q4_0", "bf16"), ("Q4_0", "q8_0")]


def golden(shape: str, type: str) -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN / f"{shape}-{type}.npz") as arrays:
        return dict(arrays)


class Runner:
    """One sequence through the reference, from position 0 on."""

    def __init__(self, program: Program, image: Image, kv_type: str, tokens: int) -> None:
        self._plan = reference.ReferencePlan(program, image, kv_type=kv_type, max_rows=tokens, max_sequences=tokens)
        pages = -(-tokens // PAGE_TOKENS)
        sizes = [group.page_bytes(kv_type) for group in program.groups]
        starts = np.cumsum([0, *(pages * size for size in sizes)])
        order = np.arange(pages, dtype=np.int64)[None, :]
        self._tables = tuple(start + order * size for start, size in zip(starts, sizes, strict=False))
        self._pool = np.zeros(starts[-1], np.uint8)
        self._position = 0

    def __call__(self, tokens: NDArray[np.int32]) -> Doubles:
        """Logits [tokens, vocabulary] of the next tokens."""
        n, start = len(tokens), self._position
        self._position += n
        step = StepArgs(
            tokens=tokens,
            positions=np.arange(start, start + n, dtype=np.int32),
            seq_start=np.array([0, n], np.int32),
            context=np.array([start], np.int32),
            block_tables=self._tables,
            output_rows=np.arange(n, dtype=np.int32),
        )
        return self._plan.forward(step, self._pool).astype(np.float64)


def nmse(x: Doubles, truth: Doubles) -> float:
    return float(((x - truth) ** 2).sum() / (truth**2).sum())


def project(x: Doubles, weight: Doubles) -> Doubles:
    """x times weight transposed; in pieces that BLAS computes with one thread, because more are slow on them."""
    pieces = -(-len(x) * weight.size // (1 << 18))
    return np.concatenate([x @ piece.T for piece in np.array_split(weight, pieces)], axis=1)


def capped(x: Doubles, cap: float) -> Doubles:
    return cap * np.tanh(x / cap) if cap else x


class Noise:
    """Rounding errors as chance: uniform over half a step to either side."""

    def __init__(self, seed: int, *, activations: bool, kv: str = "f32", group: int = 32) -> None:
        self._chance = np.random.default_rng(seed)
        self._activations, self._kv, self._group = activations, kv, group

    def activation(self, x: Doubles) -> Doubles:
        """int8 with one scale, max / 127, for a group of neighbours."""
        groups = x.reshape(len(x), -1, self._group)
        steps = np.abs(groups).max(axis=2, keepdims=True) / 127
        noisy = groups + steps * self._chance.uniform(-0.5, 0.5, groups.shape)
        return noisy.reshape(x.shape) if self._activations else x

    def stored(self, x: Doubles) -> Doubles:
        """bfloat16: 8 significant bits. q8_0: int8 with one scale, max / 127, for 32 neighbours of a head."""
        if self._kv == "f32":
            return x
        if self._kv == "bf16":
            steps = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
        else:
            starts = np.arange(0, x.shape[-1], KV_GROUP)
            largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
            steps = np.repeat(largest / 127, KV_GROUP, axis=-1)[..., : x.shape[-1]]
        return x + steps * self._chance.uniform(-0.5, 0.5, x.shape)


class Ideal:
    """The decoder in binary64, straight from the definition, on tensors dequantized by the `gguf` package.

    `chosen`: in the last run and each layer with experts, which each row went to.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        self.spec = spec
        self.chosen: list[NDArray[np.bool_]] = []
        self.tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in gguf.GGUFReader(path).tensors
        }
        for layer in range(spec.layers if spec.architecture == "phi3" else 0):
            q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            for fused, names, places in (
                ("attn_qkv", ("attn_q", "attn_k", "attn_v"), [q, q + kv]),
                ("ffn_up", ("ffn_gate", "ffn_up"), [spec.ffn]),
            ):
                pieces = np.split(self.tensors.pop(f"blk.{layer}.{fused}.weight"), places)
                for name, piece in zip(names, pieces, strict=True):
                    self.tensors[f"blk.{layer}.{name}.weight"] = piece

    def __call__(self, tokens: NDArray[np.int32], noise: Noise) -> Doubles:
        s, t = self.spec, self.tensors
        self.chosen = []
        x = t["token_embd.weight"][tokens] * s.embedding_scale
        for layer in range(s.layers):
            w = {name.split(".", 2)[2]: t[name] for name in t if name.startswith(f"blk.{layer}.")}
            mixed = noise.activation(self._attention(layer, w, self._norm(x, w["attn_norm.weight"]), noise))
            x = x + self._after(project(mixed, w["attn_output.weight"]), w, "post_attention_norm.weight")
            h = self._norm(x, w["ffn_norm.weight"])
            if s.experts:
                out = self._experts(w, h, noise)
            else:
                out = self._feed_forward(*(w[f"ffn_{n}.weight"] for n in ("gate", "up", "down")), h, noise)
            x = x + self._after(out, w, "post_ffw_norm.weight")
        head = t["token_embd.weight" if s.tied else "output.weight"]
        return capped(project(noise.activation(self._norm(x, t["output_norm.weight"])), head), s.logit_softcap)

    def _after(self, x: Doubles, w: dict[str, Doubles], name: str) -> Doubles:
        return self._norm(x, w[name]) if self.spec.post_norms else x

    def _feed_forward(self, gate: Doubles, up: Doubles, down: Doubles, x: Doubles, noise: Noise) -> Doubles:
        h = noise.activation(x)
        inner = project(h, gate)
        if self.spec.act == "silu":
            bent = inner / (1 + np.exp(-inner))
        else:
            bent = inner / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return project(noise.activation(bent * project(h, up)), down)

    def _experts(self, w: dict[str, Doubles], x: Doubles, noise: Noise) -> Doubles:
        """A softmax over the router's logits; each row's largest, made to sum to 1 or not, weigh what those say.

        Where there is an expert for every row, its result is weighed by a sigmoid.
        """
        scores = np.exp(project(x, w["ffn_gate_inp.weight"]))
        shares = scores / scores.sum(axis=1, keepdims=True)
        ranked = np.sort(shares, axis=1)
        shares[shares < ranked[:, [-self.spec.experts_used]]] = 0
        self.chosen.append(shares > 0)
        out = np.zeros_like(x)
        for expert in range(self.spec.experts):
            rows = np.flatnonzero(shares[:, expert])
            if len(rows):
                own = (w[f"ffn_{n}_exps.weight"][expert] for n in ("gate", "up", "down"))
                out[rows] += shares[rows, expert, None] * self._feed_forward(*own, x[rows], noise)
        if self.spec.renormalize:
            out = out / shares.sum(axis=1, keepdims=True)
        if self.spec.shared_ffn:
            shared = (w[f"ffn_{n}_shexp.weight"] for n in ("gate", "up", "down"))
            inverse = 1 + np.exp(-project(x, w["ffn_gate_inp_shexp.weight"][None]))
            out = out + self._feed_forward(*shared, x, noise) / inverse
        return out

    def _norm(self, x: Doubles, weight: Doubles) -> Doubles:
        scaled: Doubles = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.spec.norm_epsilon) * weight
        return scaled

    def _attention(self, layer: int, w: dict[str, Doubles], x: Doubles, noise: Noise) -> Doubles:
        s, h = self.spec, noise.activation(x)
        q, k, v = (project(h, w[f"attn_{n}.weight"]) + w.get(f"attn_{n}.bias", 0.0) for n in "qkv")
        if s.qk_norm:
            q = self._norm(q.reshape(len(x), s.heads, -1), w["attn_q_norm.weight"])
            k = self._norm(k.reshape(len(x), s.kv_heads, -1), w["attn_k_norm.weight"])
        near = s.window > 0 and (s.full_every == 0 or layer % s.full_every < s.full_every - 1)
        base, factor = (s.local_rope_base, 1.0) if near and s.local_rope_base else (s.rope_base, s.rope_factor)
        q, k = (self._rotate(each, heads, base, factor) for each, heads in ((q, s.heads), (k, s.kv_heads)))
        k = noise.stored(k)
        v = noise.stored(v.reshape(len(x), s.kv_heads, s.head_dim))
        out = np.empty_like(q)
        for head in range(s.heads):
            shared = head // (s.heads // s.kv_heads)
            scores = capped(project(q[:, head], k[:, shared]) / math.sqrt(s.head_dim), s.attention_softcap)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            if near:
                scores[np.tril_indices(len(x), -s.window)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = project(weights / weights.sum(axis=1, keepdims=True), v[:, shared].T)
        return out.reshape(len(x), -1)

    def _rotate(self, x: Doubles, heads: int, base: float, factor: float) -> Doubles:
        """Rotation of pairs as multiplication of complex numbers."""
        s, n = self.spec, self.spec.rope_dims
        divisors, magnitude = factor * np.array(s.rope_divisors or [1.0] * (n // 2)), s.rope_magnitude
        if s.rope_scaling == "yarn":
            turns = s.rope_original_context / 2 / math.pi * base ** (-np.arange(n) / n * 2)
            # The last pair of all that turns often enough keeps its frequency, the first that does not is divided.
            kept = max(int((turns >= s.rope_beta_fast).sum()) - 1, 0)
            divided = min(int((turns > s.rope_beta_slow).sum()), n - 1)
            divisors = 1 / np.interp(np.arange(n // 2), [kept, divided], [1, 1 / factor])
            magnitude *= 1 + 0.1 * math.log(factor)
        angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, n, 2) / n) / divisors
        x = x.reshape(len(x), heads, s.head_dim).copy()
        pairs = [(slice(0, n, 2), slice(1, n, 2)), (slice(0, n // 2), slice(n // 2, n))][s.pairing == "neox"]
        turned = (x[..., pairs[0]] + 1j * x[..., pairs[1]]) * (magnitude * np.exp(1j * angles))[:, None, :]
        x[..., pairs[0]], x[..., pairs[1]] = turned.real, turned.imag
        return x


def rounding_tolerance(spec: Spec) -> float:
    longest = max(spec.width, spec.ffn, spec.heads * spec.head_dim)
    return (6 * spec.layers + 1) * math.sqrt(longest) * 2.0**-24


@pytest.mark.parametrize("shape", MODELS)
def test_the_logits_of_a_float_model_are_those_of_transformers(shape: str, burned: Burned) -> None:
    spec, oracle = SHAPES[shape], golden(shape, "F32")
    logits = Runner(build(spec), burned(shape, "F32"), "f32", 40)(oracle["tokens"])[oracle["rows"]]
    for row, truth in zip(logits, oracle["logits"].astype(np.float64), strict=True):
        assert math.sqrt(nmse(row, truth)) < rounding_tolerance(spec) < 4e-5


@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("shape", MODELS)
def test_the_ideal_decoder_is_that_of_transformers(shape: str, type: str, checkpoint: Checkpoint) -> None:
    spec, oracle = SHAPES[shape], golden(shape, type)
    logits = Ideal(checkpoint(shape, type), spec)(oracle["tokens"], Noise(0, activations=False))
    # transformers' norms, angles and softmax are binary32
    assert math.sqrt(nmse(logits[oracle["rows"]], oracle["logits"].astype(np.float64))) < rounding_tolerance(spec)


@pytest.mark.parametrize(
    ("shape", "type", "kv_type"),
    [(s, *kinds) for s in MODELS for kinds in QUANTIZED if s not in ALIKE or kinds == ("Q8_0", "bf16")],
)
def test_quantized_arithmetic_errs_as_its_rounding_steps_allow(
    shape: str, type: str, kv_type: str, burned: Burned, checkpoint: Checkpoint
) -> None:
    spec, oracle = SHAPES[shape], golden(shape, type)
    ideal = Ideal(checkpoint(shape, type), spec)
    ideal(oracle["tokens"], Noise(0, activations=False))
    chosen, steady = ideal.chosen, np.ones(len(oracle["tokens"]), bool)
    noisy = []
    for seed in range(DRAWS):
        logits = ideal(oracle["tokens"], Noise(seed, activations=type != "F32", kv=kv_type))
        noisy.append(logits[oracle["rows"]])
        for mine, others in zip(ideal.chosen, chosen, strict=True):
            steady &= (mine == others).all(axis=1)
    # Where the noise makes another expert of a row's last one, what that does is no small noise any more, nor what rows
    # behind it see of it: then the row in the middle is judged, of those that keep their experts.
    kept = steady[oracle["rows"]]
    assert kept.sum() >= 4
    truth = oracle["logits"].astype(np.float64)[kept]

    def error(logits: Doubles) -> float:
        rows = [nmse(*pair) for pair in zip(logits, truth, strict=True)]
        return float(np.median(rows)) if chosen else nmse(logits, truth)

    draws = np.array([error(logits[kept]) for logits in noisy])
    logits = Runner(build(spec), burned(shape, type), kv_type, 40)(oracle["tokens"])[oracle["rows"]][kept]
    assert abs(error(logits) - draws.mean()) < 5 * draws.std() < 5e-4


@pytest.mark.parametrize(
    ("shape", "type", "group"),
    [("tiny-qwen2", type, 32) for type in ("Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")]
    + [("tiny-256", type, 256) for type in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_K_M")],
)
def test_other_types_err_as_the_rounding_steps_of_their_groups_allow(
    shape: str, type: str, group: int, burned: Burned, checkpoint: Checkpoint
) -> None:
    """Against the ideal decoder itself, which the types above hold to transformers."""
    spec = SHAPES[shape]
    ideal = Ideal(checkpoint(shape, type), spec)
    tokens = np.array([(61 * i * i + 17 * i + 7) % spec.vocabulary for i in range(40)], np.int32)
    truth = ideal(tokens, Noise(0, activations=False))
    draws = np.array([
        nmse(ideal(tokens, Noise(seed, activations=True, kv="bf16", group=group)), truth) for seed in range(DRAWS)
    ])  # fmt: skip
    logits = Runner(build(spec), burned(shape, type), "bf16", 40)(tokens)
    assert abs(nmse(logits, truth) - draws.mean()) < 5 * draws.std() < 5e-4


@pytest.mark.parametrize("shape", MODELS)
def test_greedy_tokens_from_the_cache_are_those_of_transformers(shape: str, burned: Burned) -> None:
    oracle = golden(shape, "F32")
    run = Runner(build(SHAPES[shape]), burned(shape, "F32"), "f32", 64)
    token = int(run(oracle["tokens"])[-1].argmax())
    for expected in oracle["greedy"]:
        assert token == expected
        token = int(run(np.array([token], np.int32))[0].argmax())


MUTATIONS = [
    ("tiny", {"norm_epsilon": 1e-5}),
    ("tiny", {"pairing": "neox"}),
    ("tiny", {"rope_scaling": "none", "rope_factor": 1.0}),
    ("tiny", {"rope_base": 10_000.0}),
    ("tiny", {"rope_dims": 16}),
    ("tiny", {"tied": True}),
    ("tiny-qwen2", {"norm_epsilon": 1e-5}),
    ("tiny-qwen2", {"pairing": "norm"}),
    ("tiny-qwen2", {"rope_base": 10_000.0}),
    ("tiny-qwen2", {"rope_scaling": "linear", "rope_factor": 4.0}),
    ("tiny-qwen2", {"qkv_bias": False}),
    ("tiny-qwen3", {"norm_epsilon": 1e-5}),
    ("tiny-qwen3", {"pairing": "norm"}),
    ("tiny-qwen3", {"rope_base": 10_000.0}),
    ("tiny-qwen3", {"qk_norm": False}),
    ("tiny-gemma2", {"window": 21}),
    ("tiny-gemma2", {"full_every": 3}),
    ("tiny-gemma2", {"attention_scale": 1 / math.sqrt(16)}),
    ("tiny-gemma2", {"attention_softcap": 0.0}),
    ("tiny-gemma2", {"logit_softcap": 0.0}),
    ("tiny-gemma2", {"post_norms": False}),
    ("tiny-gemma2", {"act": "silu"}),
    ("tiny-gemma2", {"embedding_scale": 1.0}),
    ("tiny-gemma3", {"window": 21}),
    ("tiny-gemma3", {"full_every": 2}),
    ("tiny-gemma3", {"local_rope_base": 0.0}),
    ("tiny-gemma3", {"rope_scaling": "none", "rope_factor": 1.0}),
    ("tiny-gemma3", {"qk_norm": False}),
    ("tiny-gemma3", {"act": "silu"}),
    ("tiny-mistral", {"window": 18}),
    ("tiny-mistral", {"full_every": 3}),
    ("tiny-phi3", {"window": 19}),
    ("tiny-phi3", {"pairing": "norm"}),
    ("tiny-phi3", {"rope_dims": 32}),
    ("tiny-longrope", {"rope_divisors": ()}),
    ("tiny-longrope", {"rope_magnitude": 1.0}),
    ("tiny-phi4", {"rope_divisors": ()}),
    ("tiny-phi4", {"rope_magnitude": 1.0}),
    ("tiny-phi4", {"rope_dims": 32, "rope_divisors": SHAPES["tiny-longrope"].rope_divisors}),
    ("tiny-yarn", {"rope_scaling": "linear", "rope_original_context": 0}),
    ("tiny-yarn", {"rope_scaling": "none", "rope_factor": 1.0, "rope_original_context": 0}),
    ("tiny-yarn", {"rope_original_context": 64}),
    ("tiny-yarn", {"rope_beta_fast": 8.0}),
    ("tiny-yarn", {"rope_beta_slow": 8.0}),
    ("tiny-yarn", {"rope_magnitude": 1.25}),
    ("tiny-qwen3moe", {"qk_norm": False}),
    ("tiny-qwen3moe", {"renormalize": False}),
    ("tiny-qwen3moe", {"experts_used": 2}),
    ("tiny-qwen3moe", {"experts_used": 4}),
    ("tiny-mixtral", {"renormalize": False}),
    ("tiny-mixtral", {"experts_used": 3}),
    ("tiny-mixtral", {"expert_scale": 1.5}),
    ("tiny-mixtral", {"pairing": "neox"}),
    ("tiny-qwen2moe", {"renormalize": True}),
    ("tiny-qwen2moe", {"experts_used": 3}),
    ("tiny-qwen2moe", {"shared_ffn": 0}),
    ("tiny-qwen2moe", {"qkv_bias": False}),
]


@pytest.mark.parametrize("type", ["F32", "Q4_0"])
@pytest.mark.parametrize(("shape", "changes"), MUTATIONS, ids=[f"{s}-{'-'.join(c)}" for s, c in MUTATIONS])
def test_every_flag_of_the_architecture_moves_the_logits(
    shape: str, changes: dict[str, object], type: str, burned: Burned
) -> None:
    oracle = golden(shape, type)
    mutant = msgspec.structs.replace(SHAPES[shape], **changes)
    logits = Runner(build(mutant), burned(shape, type), "bf16", 40)(oracle["tokens"])[oracle["rows"]]
    assert nmse(logits, oracle["logits"].astype(np.float64)) > 1e-3


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_each_bias_moves_the_logits(which: str, burned: Burned) -> None:
    oracle, program = golden("tiny-qwen2", "F32"), build(SHAPES["tiny-qwen2"])
    without = [
        dataclasses.replace(op, bias=None) if isinstance(op, Linear) and op.output.endswith(f".{which}") else op
        for op in program.ops
    ]
    mutant = dataclasses.replace(program, ops=tuple(without))
    logits = Runner(mutant, burned("tiny-qwen2", "F32"), "f32", 40)(oracle["tokens"])[oracle["rows"]]
    assert nmse(logits, oracle["logits"].astype(np.float64)) > 1e-3


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("changes", [{"heads": 1}, {"weight": "blk.0.attn_k_norm.weight"}], ids=["heads", "weight"])
def test_each_norm_of_heads_moves_the_logits(
    which: str, changes: dict[str, object], burned: Burned, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, program = golden("tiny-qwen3", "F32"), build(SHAPES["tiny-qwen3"])
    norm = reference.rms_norm
    monkeypatch.setattr(reference, "rms_norm", lambda x, w, e: norm(x, np.resize(w, x.shape[-1]), e))
    ops = [
        dataclasses.replace(op, **changes) if isinstance(op, HeadNorm) and op.x.endswith(f".{which}") else op
        for op in program.ops
    ]
    mutant = dataclasses.replace(program, ops=tuple(ops))
    logits = Runner(mutant, burned("tiny-qwen3", "F32"), "f32", 40)(oracle["tokens"])[oracle["rows"]]
    assert nmse(logits, oracle["logits"].astype(np.float64)) > 1e-3


@pytest.mark.parametrize("shape", MODELS)
def test_which_key_head_a_query_head_reads_moves_the_logits(
    shape: str, burned: Burned, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, attend = golden(shape, "F32"), reference.attend

    def interleaved(q, positions, k, v, scale, **how):  # head h reads h mod kv_heads
        repeats = (q.shape[1] // len(k), 1, 1)
        return attend(q, positions, np.tile(k, repeats), np.tile(v, repeats), scale, **how)

    monkeypatch.setattr(reference, "attend", interleaved)
    logits = Runner(build(SHAPES[shape]), burned(shape, "F32"), "f32", 40)(oracle["tokens"])[oracle["rows"]]
    assert nmse(logits, oracle["logits"].astype(np.float64)) > 1e-3
