"""What a decoder is, in numbers: read from a checkpoint's metadata, stored in the image, turned into a Program.

Everything that comes from a file is checked here. What VAI does not compute is refused by name: a model that runs with
a feature ignored answers plausible nonsense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vai.errors import CorruptImage, MalformedFile, UnsupportedModel
from vai.models.families import gemma2, gemma3, llama, phi3, qwen2, qwen2moe, qwen3, qwen3moe
from vai.models.family import Act, Family, Pairing
from vai.rom.image import BLOCK_ROWS, canonical_json

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.architecture: module.FAMILY
    for module in (gemma2, gemma3, llama, phi3, qwen2, qwen2moe, qwen3, qwen3moe)
}
# Tensors that become part of the spec, not of the image: divisors of RoPE's frequencies.
ROPE_DIVISORS = "rope_freqs.weight"
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"

MAX_LAYERS, MAX_WIDTH, MAX_FFN, MAX_HEADS, MAX_HEAD_DIM = 1024, 1 << 16, 1 << 20, 1 << 10, 1 << 10
MAX_EXPERTS, MAX_EXPERT_SCALE = 1024, 1e6
MAX_VOCABULARY, MAX_CONTEXT = 1 << 24, 1 << 24
MAX_ROPE_BASE, MAX_ROPE_FACTOR, MAX_SOFTCAP = 1e15, 1e6, 1e6
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's, for Llama


# Fields that came after the first images: left out where they have their default, so that no digest changes.
_LATER = frozenset({
    "rope_original_context",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_magnitude",
    "qk_norm",
    "window",
    "full_every",
    "local_rope_base",
    "attention_scale",
    "attention_softcap",
    "logit_softcap",
    "post_norms",
    "act",
    "embedding_scale",
    "experts",
    "experts_used",
    "renormalize",
    "expert_scale",
    "shared_ffn",
})  # fmt: skip

Positive = Annotated[float, Meta(gt=0)]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder. Sizes in elements; `ffn` is the inner width of the gated feed-forward layer, or of each expert.

    context: longest sequence in tokens. rope_dims: leading elements of a head that RoPE rotates. rope_factor: positions
    are divided by it ("linear"; "yarn": for pairs that turn slowly); 1 for "none". rope_original_context,
    rope_beta_fast, rope_beta_slow: YaRN's context before it was extended, and how often a pair turns within it that
    keeps its frequency, or has it divided (see decoder.yarn_frequencies). rope_magnitude: what is
    rotated of queries and keys is multiplied by it, besides what YaRN says. rope_divisors: one for each pair, or empty.
    tied: the output projection is the token embedding. qk_norm: each query and key head is normalized before RoPE.
    window: tokens that a row sees, its own the last, in all layers but each `full_every`-th; 0: no layer has a window;
    full_every 0: all have. local_rope_base: RoPE's base in layers with a window, unscaled; 0: as in the others.
    attention_scale: what scores are multiplied by; 0: 1 / sqrt(head_dim). attention_softcap, logit_softcap: 0 for none.
    post_norms: what attention and feed-forward give is normalized before it is added.
    experts: how many a layer has, 0 for one plain feed-forward layer; experts_used: by each token; renormalize: their
    shares are made to sum to 1; expert_scale: and are then multiplied by this. shared_ffn: the inner width of the
    expert that every token goes to, times the sigmoid of a gate; 0: there is none.
    Raises ValueError where fields contradict one another.
    """

    architecture: str
    pairing: Pairing
    layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    ffn: Annotated[int, Meta(ge=1, le=MAX_FFN)]
    heads: Annotated[int, Meta(ge=1, le=MAX_HEADS)]
    kv_heads: Annotated[int, Meta(ge=1, le=MAX_HEADS)]
    head_dim: Annotated[int, Meta(ge=2, le=MAX_HEAD_DIM)]
    vocabulary: Annotated[int, Meta(ge=1, le=MAX_VOCABULARY)]
    context: Annotated[int, Meta(ge=1, le=MAX_CONTEXT)]
    norm_epsilon: Annotated[float, Meta(gt=0, le=1)]
    rope_base: Annotated[float, Meta(gt=1, le=MAX_ROPE_BASE)]
    rope_dims: Annotated[int, Meta(ge=2, le=MAX_HEAD_DIM)]
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    rope_factor: Annotated[float, Meta(gt=0, le=MAX_ROPE_FACTOR)] = 1.0
    rope_original_context: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] = 0
    rope_beta_fast: Annotated[float, Meta(gt=0, le=MAX_ROPE_FACTOR)] = BETA_FAST
    rope_beta_slow: Annotated[float, Meta(gt=0, le=MAX_ROPE_FACTOR)] = BETA_SLOW
    rope_magnitude: Annotated[float, Meta(gt=0, le=MAX_ROPE_FACTOR)] = 1.0
    rope_divisors: tuple[Positive, ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Annotated[int, Meta(ge=0, le=MAX_CONTEXT)] = 0
    full_every: Annotated[int, Meta(ge=0, le=MAX_LAYERS)] = 0
    local_rope_base: Annotated[float, Meta(ge=0, le=MAX_ROPE_BASE)] = 0.0
    attention_scale: Annotated[float, Meta(ge=0, le=1)] = 0.0
    attention_softcap: Annotated[float, Meta(ge=0, le=MAX_SOFTCAP)] = 0.0
    logit_softcap: Annotated[float, Meta(ge=0, le=MAX_SOFTCAP)] = 0.0
    post_norms: bool = False
    act: Act = "silu"
    embedding_scale: Annotated[float, Meta(gt=0, le=MAX_WIDTH)] = 1.0
    experts: Annotated[int, Meta(ge=0, le=MAX_EXPERTS)] = 0
    experts_used: Annotated[int, Meta(ge=0, le=MAX_EXPERTS)] = 0
    renormalize: bool = False
    expert_scale: Annotated[float, Meta(gt=0, le=MAX_EXPERT_SCALE)] = 1.0
    shared_ffn: Annotated[int, Meta(ge=0, le=MAX_FFN)] = 0

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise ValueError(f"architecture '{self.architecture}' is not one of {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise ValueError(f"RoPE over {self.rope_dims} elements does not fit heads of {self.head_dim}")
        if self.rope_scaling == "none" and self.rope_factor != 1.0:
            raise ValueError("a RoPE factor needs a scaling type")
        if self.rope_scaling == "yarn" and self.rope_divisors:
            raise ValueError("YaRN has no divisors beside its own")
        if (self.rope_scaling == "yarn") != (self.rope_original_context > 0):
            raise ValueError("YaRN, and it alone, needs the context that it extends")
        if self.rope_beta_slow >= self.rope_beta_fast:
            raise ValueError(f"turning {self.rope_beta_fast:g} times is not faster than {self.rope_beta_slow:g} times")
        if self.rope_divisors and len(self.rope_divisors) != self.rope_dims // 2:
            raise ValueError(f"{len(self.rope_divisors)} RoPE divisors for {self.rope_dims // 2} pairs")
        if (self.full_every or self.local_rope_base) and not self.window:
            raise ValueError("layers without a window differ from others only where those have one")
        if self.local_rope_base and self.local_rope_base <= 1:
            raise ValueError("the RoPE base of layers with a window must be above 1")
        if self.experts_used > self.experts or (self.experts_used == 0) != (self.experts == 0):
            raise ValueError(f"{self.experts_used} of {self.experts} experts cannot be used")
        if not self.experts and (self.renormalize or self.expert_scale != 1.0 or self.shared_ffn):
            raise ValueError("shares, and an expert for every token, are of models with experts")
        if self.experts and (self.ffn % BLOCK_ROWS or self.width % BLOCK_ROWS):
            raise ValueError(f"experts of {self.ffn} x {self.width} are no whole blocks of {BLOCK_ROWS} rows")

    def has_window(self, layer: int) -> bool:
        return self.window > 0 and (self.full_every == 0 or (layer + 1) % self.full_every != 0)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal specs give equal bytes."""
        fields = msgspec.to_builtins(self)
        for field in msgspec.structs.fields(Spec):
            if field.name in _LATER and fields[field.name] == field.default:
                del fields[field.name]
        return canonical_json(fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> Spec:
        """The spec section of an image. Raises CorruptImage."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise CorruptImage(f"The image's spec section cannot be read: {error}. Burn the model again.") from None


def spec_from_gguf(
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[int, int]],
    *,
    rope_divisors: Sequence[float] = (),
) -> Spec:
    """The spec of a GGUF checkpoint, and proof that its tensors are the ones that spec needs.

    tensors: name -> (rows, columns) as burn.gguf gives them, a vector of n as (1, n). rope_divisors: the values of
    the tensor that `rope_divisors_tensor` names. Raises UnsupportedModel for what VAI does not compute,
    MalformedFile for what contradicts itself.
    """
    architecture = _Keys(metadata, "general").text("architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModel(
            f"The architecture '{architecture}' is not supported; VAI runs {', '.join(sorted(FAMILIES))}."
        )
    keys = _Keys(metadata, architecture)
    divisors = rope_divisors_tensor(metadata, tensors)
    _refuse_what_is_not_computed(keys, family, divisors)
    layers = keys.integer("block_count", 1, MAX_LAYERS)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS, per_layer=layers)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, default=width // heads)
    if keys.integer("attention.value_length", 2, MAX_HEAD_DIM, default=head_dim) != head_dim:
        raise UnsupportedModel("Keys and values of different lengths (attention.value_length) are not supported.")
    context = keys.integer("context_length", 1, MAX_CONTEXT)
    rope_dims = keys.integer("rope.dimension_count", 2, MAX_HEAD_DIM, default=head_dim)
    spec_fields = {
        "architecture": architecture,
        "pairing": family.pairing,
        "layers": layers,
        "width": width,
        **_widths(keys, family, layers),
        "heads": heads,
        "kv_heads": keys.integer("attention.head_count_kv", 1, MAX_HEADS, default=heads, per_layer=layers),
        "head_dim": head_dim,
        "vocabulary": _vocabulary(keys, tensors),
        "context": context,
        "norm_epsilon": keys.number("attention.layer_norm_rms_epsilon", 1.0),
        "rope_base": keys.number("rope.freq_base", MAX_ROPE_BASE, default=10_000.0),
        "rope_dims": rope_dims,
        **_rope_scaling(keys, family, context, divisors),
        "rope_divisors": _rope_divisors(family, divisors, tensors, rope_divisors),
        "tied": "output.weight" not in tensors,
        "qkv_bias": _qkv_bias(family, tensors),
        "qk_norm": family.qk_norm,
        "post_norms": family.post_norms,
        "act": family.act,
        "embedding_scale": math.sqrt(width) if family.scaled_embedding else 1.0,
        "attention_scale": 1.0 / math.sqrt(width / heads) if layers == family.wide_scale_layers else 0.0,
        **_windows(keys, family, layers),
        **_softcaps(keys, family),
        **_experts(keys, family),
    }
    try:
        spec = msgspec.convert(spec_fields, Spec)
    except msgspec.ValidationError as error:
        raise MalformedFile(f"The checkpoint contradicts itself: {error}.") from None
    _check_tensors(spec, tensors)
    return spec


def rope_divisors_tensor(metadata: Mapping[str, object], tensors: Container[str]) -> str | None:
    """Which of a checkpoint's tensors divides RoPE's frequencies: Llama 3's, or one of LongRoPE's two.

    Of the two it is the long context's where the file's context is longer than the original one. Not the length that a
    sequence has come to: that would change what is in its cache already. Raises MalformedFile.
    """
    if LONG_DIVISORS not in tensors and SHORT_DIVISORS not in tensors:
        return ROPE_DIVISORS if ROPE_DIVISORS in tensors else None
    keys = _Keys(metadata, _Keys(metadata, "general").text("architecture"))
    context = keys.integer("context_length", 1, MAX_CONTEXT)
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context)
    return LONG_DIVISORS if context > original else SHORT_DIVISORS


def expected_tensors(spec: Spec) -> dict[str, tuple[int, int]]:
    """Every tensor of the model in canonical order: GGUF name -> (rows, columns); a vector of n is (n, 1)."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    tensors = {"token_embd.weight": (spec.vocabulary, spec.width)}
    for layer in range(spec.layers):
        block = {
            "attn_norm.weight": (spec.width, 1),
            "attn_q.weight": (q, spec.width),
            "attn_k.weight": (kv, spec.width),
            "attn_v.weight": (kv, spec.width),
            "attn_output.weight": (spec.width, q),
            "ffn_norm.weight": (spec.width, 1),
            **_feed_forward(spec),
        }
        if spec.post_norms:
            block |= {"post_attention_norm.weight": (spec.width, 1), "post_ffw_norm.weight": (spec.width, 1)}
        if spec.qkv_bias:
            block |= {"attn_q.bias": (q, 1), "attn_k.bias": (kv, 1), "attn_v.bias": (kv, 1)}
        if spec.qk_norm:
            block |= {"attn_q_norm.weight": (spec.head_dim, 1), "attn_k_norm.weight": (spec.head_dim, 1)}
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors["output_norm.weight"] = (spec.width, 1)
    if not spec.tied:
        tensors["output.weight"] = (spec.vocabulary, spec.width)
    return tensors


# The model's tensors that families with fused ones store in one, each below the one before.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "ffn_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
}


def file_tensors(spec: Spec) -> dict[str, tuple[str, ...]]:
    """Every tensor of the model's GGUF file in canonical order, and those of expected_tensors whose rows it holds."""
    if not FAMILIES[spec.architecture].fused_tensors:
        return {name: (name,) for name in expected_tensors(spec)}
    fused = {part: (name, parts) for name, parts in _FUSED.items() for part in parts}
    tensors: dict[str, tuple[str, ...]] = {}
    for name in expected_tensors(spec):
        block = next(iter(re.findall(r"^blk\.\d+\.", name)), "")
        member = name.removeprefix(block)
        file_name, parts = fused.get(member, (member, (member,)))
        tensors[block + file_name] = tuple(block + part for part in parts)
    return tensors


def expert_tensors(name: str, experts: int) -> tuple[str, ...]:
    """What files of before April 2024 have in place of the tensor `name` of all experts: one for each."""
    return tuple(name.replace("_exps.", f".{expert}.") for expert in range(experts))


def _stacked(spec: Spec, tensors: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]]:
    """The tensors of a file, with those of each expert replaced by what they make together."""
    found = dict(tensors)
    for name, (rows, columns) in expected_tensors(spec).items():
        pieces = expert_tensors(name, spec.experts) if "_exps." in name and name not in tensors else ()
        if not any(piece in tensors for piece in pieces):
            continue
        for piece in pieces:
            shape = rows // spec.experts, columns
            if found.pop(piece, None) != shape:
                raise MalformedFile(f"The tensor {piece} is missing or is no matrix of {shape[0]} x {shape[1]}.")
        found[name] = rows, columns
    return found


def _feed_forward(spec: Spec) -> dict[str, tuple[int, int]]:
    """The matrices of one layer's feed-forward part; those of experts stand one below the other."""
    inner, outer = (spec.ffn, spec.width), (spec.width, spec.ffn)
    if not spec.experts:
        return {"ffn_gate.weight": inner, "ffn_up.weight": inner, "ffn_down.weight": outer}
    all_inner, all_outer = ((spec.experts * rows, columns) for rows, columns in (inner, outer))
    experts = {
        "ffn_gate_inp.weight": (spec.experts, spec.width),
        "ffn_gate_exps.weight": all_inner,
        "ffn_up_exps.weight": all_inner,
        "ffn_down_exps.weight": all_outer,
    }
    if not spec.shared_ffn:
        return experts
    return experts | {
        "ffn_gate_inp_shexp.weight": (spec.width, 1),
        "ffn_gate_shexp.weight": (spec.shared_ffn, spec.width),
        "ffn_up_shexp.weight": (spec.shared_ffn, spec.width),
        "ffn_down_shexp.weight": (spec.width, spec.shared_ffn),
    }


class _Keys:
    """The metadata of one architecture, each value checked as it is read."""

    def __init__(self, metadata: Mapping[str, object], prefix: str) -> None:
        self.metadata = metadata
        self.prefix = prefix

    def get(self, key: str) -> object:
        return self.metadata.get(f"{self.prefix}.{key}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self._present(key, default)
        if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isprintable():
            raise MalformedFile(f"{self.prefix}.{key} must be a short text.")
        return value

    def integer(self, key: str, low: int, high: int, *, default: int | None = None, per_layer: int = 0) -> int:
        """`per_layer`: the value may also be an array with one entry a layer, which must all be equal."""
        value = self._present(key, default)
        if per_layer and isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != per_layer:
                raise MalformedFile(f"{self.prefix}.{key} has {len(value)} entries for {per_layer} layers.")
            if any(entry != value[0] for entry in value):
                raise UnsupportedModel(f"{self.prefix}.{key} differs between layers, which is not supported.")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise MalformedFile(f"{self.prefix}.{key} must be a whole number from {low:,} to {high:,}.")
        return value

    def number(self, key: str, high: float, *, default: float | None = None) -> float:
        """A number above 0 and up to `high`."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise MalformedFile(f"{self.prefix}.{key} must be a number above 0 and up to {high:g}.")
        return float(value)

    def _present(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise MalformedFile(f"The checkpoint lacks {self.prefix}.{key}.")
        return value


# Keys that change the computation, with the value that means "no change": anything else is refused by name.
_NEUTRAL: Mapping[str, object] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "expert_group_count": 0,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "pooling_type": 0,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 0.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def _refuse_what_is_not_computed(keys: _Keys, family: Family, divisors: str | None) -> None:
    computed = {"attention.sliding_window"} if family.windows else set[str]()
    if family.softcaps is not None:
        computed |= {"attn_logit_softcapping", "final_logit_softcapping"}
    if _has_experts(keys, family):
        computed |= {"expert_count", "expert_used_count"}
        computed |= {"expert_weights_scale"} if family.experts == "optional" else set()
    if family.longrope and divisors in (LONG_DIVISORS, SHORT_DIVISORS):
        computed |= {"rope.scaling.attn_factor"}
    neutrals = dict(_NEUTRAL)
    if keys.get("rope.scaling.type") == "yarn":
        computed |= {"rope.scaling.attn_factor"}
        neutrals["rope.scaling.yarn_ext_factor"] = 1.0  # pairs that turn often enough keep all of their frequency
    for key, neutral in neutrals.items():
        if key in computed:
            continue
        value = keys.get(key)
        if value is not None and value != neutral:
            raise UnsupportedModel(f"{keys.prefix}.{key} is set, and VAI does not compute that yet.")


def _rope_scaling(keys: _Keys, family: Family, context: int, divisors: str | None) -> dict[str, object]:
    """divisors: the tensor of them that counts."""
    # Files of 2023 call the linear factor `rope.scale_linear`.
    key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = keys.number(key, MAX_ROPE_FACTOR, default=1.0)
    scaling = keys.text("rope.scaling.type", "linear")
    if family.longrope and divisors in (LONG_DIVISORS, SHORT_DIVISORS):  # whose files need not name it
        if factor != 1.0 or scaling not in ("none", "linear", "longrope"):
            raise UnsupportedModel(f"LongRoPE beside RoPE scaling by {factor:g} of type '{scaling}' is not supported.")
        return {"rope_magnitude": keys.number("rope.scaling.attn_factor", MAX_ROPE_FACTOR)}
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"RoPE scaling of type '{scaling}' is not supported; VAI computes 'linear' and 'yarn'.")
    if scaling == "yarn" and (divisors or family.local_rope_base):
        raise UnsupportedModel("YaRN beside frequencies of another kind is not supported.")
    fields: dict[str, object] = {}
    if scaling == "yarn":
        fields["rope_magnitude"] = keys.number("rope.scaling.attn_factor", MAX_ROPE_FACTOR, default=1.0)
    if scaling == "none" or factor == 1.0:
        return fields
    fields |= {"rope_scaling": scaling, "rope_factor": factor}
    if scaling == "linear":
        return fields
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context)
    return fields | {
        "rope_original_context": original,
        "rope_beta_fast": keys.number("rope.scaling.yarn_beta_fast", MAX_ROPE_FACTOR, default=BETA_FAST),
        "rope_beta_slow": keys.number("rope.scaling.yarn_beta_slow", MAX_ROPE_FACTOR, default=BETA_SLOW),
    }


def _windows(keys: _Keys, family: Family, layers: int) -> dict[str, object]:
    if not family.windows:
        return {}
    window = family.window
    if window == 0 or keys.get("attention.sliding_window") is not None:
        default = None if family.full_every else 0
        window = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, default=default)
    if window == 0:
        return {}
    return {
        "window": window,
        "full_every": _full_every(keys, family, layers),
        "local_rope_base": keys.number("rope.freq_base_swa", MAX_ROPE_BASE, default=family.local_rope_base)
        if family.local_rope_base
        else 0.0,
    }


def _full_every(keys: _Keys, family: Family, layers: int) -> int:
    """In a file a number, or for each layer whether it has a window."""
    key = "attention.sliding_window_pattern"
    value = keys.get(key)
    if isinstance(value, Sequence) and not isinstance(value, str):
        for every in range(min(layers, MAX_LAYERS) + 1):
            if list(value) == [every == 0 or (layer + 1) % every != 0 for layer in range(layers)]:
                return every
        raise UnsupportedModel(
            f"{keys.prefix}.{key} has a pattern that is not supported; VAI computes every n-th layer."
        )
    return keys.integer(key, 0, MAX_LAYERS, default=family.full_every)


def _softcaps(keys: _Keys, family: Family) -> dict[str, object]:
    if family.softcaps is None:
        return {}
    scores, logits = family.softcaps
    return {
        "attention_softcap": keys.number("attn_logit_softcapping", MAX_SOFTCAP, default=scores),
        "logit_softcap": keys.number("final_logit_softcapping", MAX_SOFTCAP, default=logits),
    }


def _has_experts(keys: _Keys, family: Family) -> bool:
    """Where that is optional, a file says so by their number."""
    return family.experts == "required" or (family.experts == "optional" and keys.get("expert_count") not in (None, 0))


def _widths(keys: _Keys, family: Family, layers: int) -> dict[str, object]:
    """Of a plain feed-forward layer or of each expert, and of the shared one.

    Files of Qwen 1.5 MoE's time may not say it: then the experts that a token uses are together as wide as a plain
    layer is said to be, and the shared one is, too.
    """
    plain = None
    if family.experts != "required" or (family.shared_expert and keys.get("feed_forward_length") is not None):
        plain = keys.integer("feed_forward_length", 1, MAX_FFN, per_layer=layers)
    if family.experts != "required":
        return {"ffn": plain}
    default = plain and plain // keys.integer("expert_used_count", 1, MAX_EXPERTS)
    ffn = keys.integer("expert_feed_forward_length", 1, MAX_FFN, default=default, per_layer=layers)
    widths: dict[str, object] = {"ffn": ffn}
    if family.shared_expert:
        widths["shared_ffn"] = keys.integer("expert_shared_feed_forward_length", 1, MAX_FFN, default=plain)
    return widths


def _experts(keys: _Keys, family: Family) -> dict[str, object]:
    if not _has_experts(keys, family):
        return {}
    return {
        "experts": keys.integer("expert_count", 1, MAX_EXPERTS),
        "experts_used": keys.integer("expert_used_count", 1, MAX_EXPERTS),
        "renormalize": family.renormalize,
        "expert_scale": keys.number("expert_weights_scale", MAX_EXPERT_SCALE, default=1.0),
    }


def _vocabulary(keys: _Keys, tensors: Mapping[str, tuple[int, int]]) -> int:
    if "token_embd.weight" not in tensors:
        raise MalformedFile("The checkpoint lacks the tensor token_embd.weight.")
    rows = tensors["token_embd.weight"][0]
    if keys.integer("vocab_size", 1, MAX_VOCABULARY, default=rows) != rows:
        raise MalformedFile(f"{keys.prefix}.vocab_size contradicts the {rows:,} rows of token_embd.weight.")
    return rows


def _rope_divisors(
    family: Family, name: str | None, tensors: Mapping[str, tuple[int, int]], values: Sequence[float]
) -> tuple[float, ...]:
    if name is None:
        return ()
    if name not in tensors:
        raise MalformedFile(f"The checkpoint lacks the tensor {name}.")
    computed = family.rope_divisors if name == ROPE_DIVISORS else family.longrope
    if not computed or len(values) != math.prod(tensors[name]):
        raise UnsupportedModel(f"The tensor {name} is not supported in this checkpoint.")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise MalformedFile(f"{name} must hold finite numbers above 0.")
    return tuple(float(value) for value in values)


def _qkv_bias(family: Family, tensors: Mapping[str, tuple[int, int]]) -> bool:
    present = "blk.0.attn_q.bias" in tensors
    if family.qkv_bias == "optional":
        return present
    return family.qkv_bias == "required"


def _check_tensors(spec: Spec, tensors: Mapping[str, tuple[int, int]]) -> None:
    expected, file, tensors = expected_tensors(spec), file_tensors(spec), _stacked(spec, tensors)
    divisors = {LONG_DIVISORS, SHORT_DIVISORS} if FAMILIES[spec.architecture].longrope else {ROPE_DIVISORS}
    for name, parts in file.items():
        rows, columns = sum(expected[part][0] for part in parts), expected[parts[0]][1]
        if name not in tensors:
            raise MalformedFile(f"The checkpoint lacks the tensor {name}.")
        shape = (rows, columns) if columns > 1 else (1, rows)
        if tensors[name] != shape:
            raise MalformedFile(f"The tensor {name} has shape {tensors[name]}; the metadata asks for {shape}.")
    for name in tensors:
        if name not in file and name not in divisors:
            raise UnsupportedModel(
                f"The tensor {name[:80]!r} has no place in a '{spec.architecture}' model as VAI computes it."
            )
