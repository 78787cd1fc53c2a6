"""Synthetic checkpoints: GGUF files of any decoder shape with seeded random weights and a working vocabulary.

They cost what real ones cost, and they are sensitive: weights, norms and biases are scaled so that activations neither
vanish nor explode and every architecture flag moves the logits. The same arguments give the same file everywhere, so
only integers of the bit generator and tables with rounded entries decide, never a library's normal distribution.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vai.burn.gguf import FILE_TYPES, TENSOR_TYPES, GgufWriter, ValueType, tensor_bytes
from vai.errors import BadRequest
from vai.models.spec import (
    FAMILIES,
    LONG_DIVISORS,
    ROPE_DIVISORS,
    SHORT_DIVISORS,
    Spec,
    expected_tensors,
    file_tensors,
)
from vai.text.vocabulary import byte_level_bpe

SHAPES: Mapping[str, Spec] = {
    # For tests: small, odd, and with an epsilon large enough to matter.
    "tiny": Spec(
        architecture="llama",
        pairing="norm",
        layers=3,
        width=192,
        ffn=352,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=512,
        context=4096,
        norm_epsilon=0.25,
        rope_base=100_000.0,
        rope_dims=32,
        rope_scaling="linear",
        rope_factor=4.0,
    ),
    "tiny-qwen2": Spec(
        architecture="qwen2",
        pairing="neox",
        layers=2,
        width=160,
        ffn=416,
        heads=6,
        kv_heads=2,
        head_dim=48,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=48,
        tied=True,
        qkv_bias=True,
    ),
    "tiny-qwen3": Spec(
        architecture="qwen3",
        pairing="neox",
        layers=2,
        width=160,
        ffn=416,
        heads=6,
        kv_heads=2,
        head_dim=48,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=48,
        tied=True,
        qk_norm=True,
    ),
    # A layer with a window, one without, one with; caps that bite.
    "tiny-gemma2": Spec(
        architecture="gemma2",
        pairing="neox",
        layers=3,
        width=192,
        ffn=416,
        heads=6,
        kv_heads=2,
        head_dim=48,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=10_000.0,
        rope_dims=48,
        tied=True,
        window=20,
        full_every=2,
        attention_softcap=3.0,
        logit_softcap=4.0,
        post_norms=True,
        act="gelu_tanh",
        embedding_scale=math.sqrt(192),
    ),
    "tiny-gemma3": Spec(
        architecture="gemma3",
        pairing="neox",
        layers=4,
        width=192,
        ffn=416,
        heads=6,
        kv_heads=2,
        head_dim=48,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=48,
        rope_scaling="linear",
        rope_factor=8.0,
        tied=True,
        qk_norm=True,
        window=20,
        full_every=3,
        local_rope_base=10_000.0,
        post_norms=True,
        act="gelu_tanh",
        embedding_scale=math.sqrt(192),
    ),
    # As Mistral 7B of 2023: every layer with a window.
    "tiny-mistral": Spec(
        architecture="llama",
        pairing="norm",
        layers=3,
        width=192,
        ffn=352,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=512,
        context=4096,
        norm_epsilon=0.25,
        rope_base=10_000.0,
        rope_dims=32,
        window=17,
    ),
    # Phi 3 with a window, and rotating a part of each head, as Phi 4 mini does.
    "tiny-phi3": Spec(
        architecture="phi3",
        pairing="neox",
        layers=2,
        width=192,
        ffn=352,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=10_000.0,
        rope_dims=24,
        window=18,
    ),
    # And with LongRoPE.
    "tiny-longrope": Spec(
        architecture="phi3",
        pairing="neox",
        layers=2,
        width=192,
        ffn=352,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.25,
        rope_base=10_000.0,
        rope_dims=32,
        rope_magnitude=1.125,
        rope_divisors=tuple(1 + i / 4 for i in range(16)),
    ),
    # As Phi 4 mini: LongRoPE that rotates, and multiplies, a part of each head; the embedding projects.
    "tiny-phi4": Spec(
        architecture="phi3",
        pairing="neox",
        layers=2,
        width=192,
        ffn=352,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.25,
        rope_base=10_000.0,
        rope_dims=24,
        rope_magnitude=1.1875,
        rope_divisors=tuple(1 + i / 4 for i in range(12)),
        tied=True,
    ),
    # Experts whose number is no power of two, and columns for every block type.
    "tiny-qwen3moe": Spec(
        architecture="qwen3moe",
        pairing="neox",
        layers=2,
        width=256,
        ffn=256,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=32,
        qk_norm=True,
        experts=10,
        experts_used=3,
        renormalize=True,
    ),
    # As Mixtral 8x7B: experts of another width, no norm of heads.
    "tiny-mixtral": Spec(
        architecture="llama",
        pairing="norm",
        layers=2,
        width=192,
        ffn=224,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.25,
        rope_base=1_000_000.0,
        rope_dims=32,
        experts=6,
        experts_used=2,
        renormalize=True,
    ),
    # A shared expert wider than the others, and shares as they are.
    "tiny-qwen2moe": Spec(
        architecture="qwen2moe",
        pairing="neox",
        layers=2,
        width=192,
        ffn=160,
        heads=6,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=32,
        qkv_bias=True,
        experts=10,
        experts_used=4,
        shared_ffn=288,
    ),
    # Qwen 2 with its context extended by YaRN.
    "tiny-yarn": Spec(
        architecture="qwen2",
        pairing="neox",
        layers=2,
        width=160,
        ffn=416,
        heads=6,
        kv_heads=2,
        head_dim=48,
        vocabulary=523,
        context=2048,
        norm_epsilon=0.25,
        rope_base=10_000.0,
        rope_dims=48,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_context=512,
        tied=True,
        qkv_bias=True,
    ),
    # For block types of 256 columns, with an output matrix of its own and layers of both kinds in a mix.
    "tiny-256": Spec(
        architecture="qwen2",
        pairing="neox",
        layers=4,
        width=256,
        ffn=512,
        heads=8,
        kv_heads=2,
        head_dim=32,
        vocabulary=523,
        context=4096,
        norm_epsilon=0.0625,
        rope_base=1_000_000.0,
        rope_dims=32,
        qkv_bias=True,
    ),
    "qwen2-0.5b": Spec(
        architecture="qwen2",
        pairing="neox",
        layers=24,
        width=896,
        ffn=4864,
        heads=14,
        kv_heads=2,
        head_dim=64,
        vocabulary=151_936,
        context=32_768,
        norm_epsilon=1e-6,
        rope_base=1_000_000.0,
        rope_dims=64,
        tied=True,
        qkv_bias=True,
    ),
    "qwen3-0.6b": Spec(
        architecture="qwen3",
        pairing="neox",
        layers=28,
        width=1024,
        ffn=3072,
        heads=16,
        kv_heads=8,
        head_dim=128,
        vocabulary=151_936,
        context=40_960,
        norm_epsilon=1e-6,
        rope_base=1_000_000.0,
        rope_dims=128,
        tied=True,
        qk_norm=True,
    ),
    # Blocks of Qwen3-30B-A3B, and few of them: speed and memory for each layer are the large model's.
    "qwen3-30b-a3b-4-layers": Spec(
        architecture="qwen3moe",
        pairing="neox",
        layers=4,
        width=2048,
        ffn=768,
        heads=32,
        kv_heads=4,
        head_dim=128,
        vocabulary=151_936,
        context=40_960,
        norm_epsilon=1e-6,
        rope_base=1_000_000.0,
        rope_dims=128,
        qk_norm=True,
        experts=128,
        experts_used=8,
        renormalize=True,
    ),
    "deepseek-coder-1.3b": Spec(
        architecture="llama",
        pairing="norm",
        layers=24,
        width=2048,
        ffn=5504,
        heads=16,
        kv_heads=16,
        head_dim=128,
        vocabulary=32_256,
        context=16_384,
        norm_epsilon=1e-6,
        rope_base=100_000.0,
        rope_dims=128,
        rope_scaling="linear",
        rope_factor=4.0,
    ),
    "qwen2-1.5b": Spec(
        architecture="qwen2",
        pairing="neox",
        layers=28,
        width=1536,
        ffn=8960,
        heads=12,
        kv_heads=2,
        head_dim=128,
        vocabulary=151_936,
        context=32_768,
        norm_epsilon=1e-6,
        rope_base=1_000_000.0,
        rope_dims=128,
        tied=True,
        qkv_bias=True,
    ),
    "deepseek-coder-6.7b": Spec(
        architecture="llama",
        pairing="norm",
        layers=32,
        width=4096,
        ffn=11_008,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocabulary=32_256,
        context=16_384,
        norm_epsilon=1e-6,
        rope_base=100_000.0,
        rope_dims=128,
        rope_scaling="linear",
        rope_factor=4.0,
    ),
}

MAX_BYTES = 8 << 30
PIECE = 1 << 21  # weights made at a time
# What people's files hold: the type of most matrices. The output is Q6_K, and in the last two some layers are as well.
MIXES = {"Q4_0+Q6_K": "Q4_0", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
TYPES = {**FILE_TYPES, "Q4_0+Q6_K": FILE_TYPES["Q4_0"]}  # with general.file_type
# In a mix some layers have larger ones of these.
_LARGER = ("attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
_NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # in a mix, where columns are not whole blocks of 256

# ChatML with tools in Hermes' form, as Qwen2.5 has it: tools in the system turn, results in a turn of the user's.
_QWEN2_TEMPLATE = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nThese functions may be called:\\n<tools>\\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    "{{ '</tools>\\n\\nWrite each call as a JSON object with name and arguments:\\n<tool_call>\\n' }}"
    '{{ \'{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif message['tool_calls'] %}"
    "{{ '<|im_start|>assistant' }}"
    "{% if message['content'] %}{{ '\\n' + message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] %}"
    "{{ '\\n<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_DEEPSEEK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + '\\n<|EOT|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


def synthesize(path: Path, *, shape: str | Spec, type: str, seed: int = 0) -> int:
    """Write a checkpoint of `shape` (a name of SHAPES, or a Spec) with matrices of `type`; return its bytes.

    `type` is a key of TYPES: a block type, or a mix of them as llama.cpp makes it. Vectors are F32. Raises
    BadRequest for an unknown shape or type, a width that is not whole blocks, or a file over MAX_BYTES.
    """
    name, spec = (shape, shape_named(shape)) if isinstance(shape, str) else (f"{shape.architecture}-synthetic", shape)
    if type not in TYPES:
        raise BadRequest(f"'{type}' is not a type that can be synthesized; choose one of {', '.join(TYPES)}.")
    if not 0 <= seed < 1 << 63:
        raise BadRequest("The seed must be a whole number from 0 to 2^63 - 1.")
    parts = expected_tensors(spec)
    held = file_tensors(spec)
    tensors = {tensor: (sum(parts[part][0] for part in held[tensor]), parts[held[tensor][0]][1]) for tensor in held}
    types = {tensor: _matrix_type(type, tensor, columns, spec) for tensor, (_, columns) in tensors.items()}
    _check_size(name, types, tensors)
    divisors = _divisors(spec)
    with GgufWriter(path) as writer:
        _write_metadata(writer, name, spec, type)
        for tensor, (rows, columns) in tensors.items():
            if columns == 1:
                writer.declare(tensor, "F32", (rows,))
            else:
                writer.declare(tensor, types[tensor], _file_shape(tensor, rows, columns, spec))
        for tensor, values in divisors.items():
            writer.declare(tensor, "F32", values.shape)
        for tensor in tensors:
            for part in held[tensor]:
                rows, columns = parts[part]
                stream = _Stream(seed, part)
                if columns == 1:
                    writer.write(_vector(part, rows, stream).data)
                    continue
                make = _MAKERS[types[tensor]](_gain(part, spec) / math.sqrt(columns))
                for start in range(0, rows * columns, PIECE):
                    writer.write(make(min(PIECE, rows * columns - start), stream).data)
        for values in divisors.values():
            writer.write(values.data)
    return path.stat().st_size


def _divisors(spec: Spec) -> dict[str, NDArray[np.float32]]:
    values = np.array(spec.rope_divisors, "<f4")
    if not len(values):
        return {}
    if not FAMILIES[spec.architecture].longrope:
        return {ROPE_DIVISORS: values}
    return {LONG_DIVISORS: values, SHORT_DIVISORS: np.ones_like(values)}


def shape_named(name: str) -> Spec:
    """Raises BadRequest for a name that is none of SHAPES."""
    if name not in SHAPES:
        raise BadRequest(f"There is no shape '{name}'; choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def _file_shape(tensor: str, rows: int, columns: int, spec: Spec) -> tuple[int, ...]:
    """The matrices of a layer's experts are one tensor of three dimensions."""
    if tensor.endswith("_exps.weight"):
        return spec.experts, rows // spec.experts, columns
    return rows, columns


def _matrix_type(type: str, tensor: str, columns: int, spec: Spec) -> str:
    """The type of one matrix. In a mix it is that of llama.cpp's rule (llama_tensor_get_type); routers stay F32."""
    if tensor.endswith("ffn_gate_inp.weight"):
        return "F32"
    if type not in MIXES:
        return type
    chosen = MIXES[type]
    if tensor == ("token_embd.weight" if spec.tied else "output.weight"):
        chosen = "Q6_K"
    elif chosen != "Q4_0" and tensor.endswith("attn_qkv.weight"):
        chosen = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[chosen]
    elif chosen != "Q4_0" and tensor.endswith(_LARGER):
        layer, eighth = int(tensor.split(".")[1]), spec.layers // 8
        if layer < eighth or layer >= 7 * spec.layers // 8 or (layer - eighth) % 3 == 2:
            chosen = "Q6_K"
    return _NARROW.get(chosen, chosen) if columns % 256 else chosen


def _check_size(name: str, types: Mapping[str, str], tensors: Mapping[str, tuple[int, int]]) -> None:
    total = 0
    for tensor, (rows, columns) in tensors.items():
        type = types[tensor]
        if columns % TENSOR_TYPES[type].block and columns > 1:
            raise BadRequest(f"{tensor} has {columns} columns, not whole blocks of {type}; choose F32 or F16.")
        total += tensor_bytes(type, (rows, columns)) if columns > 1 else 4 * rows
    if total > MAX_BYTES:
        raise BadRequest(
            f"{name} would be {total / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:.1f} GB. Choose Q4_0 or Q8_0."
        )


def _gain(tensor: str, spec: Spec) -> float:
    """Standard deviation of an output over that of its normalized input."""
    if tensor == "token_embd.weight" and not spec.tied:
        return math.sqrt(spec.width)  # rows of unit variance
    if tensor in ("token_embd.weight", "output.weight"):
        return 3.0  # logits that are far from uniform
    if tensor.endswith("ffn_gate_inp.weight"):
        return 1.5  # experts that are clearly chosen, and leave the others something
    if tensor.endswith(("attn_q.weight", "attn_k.weight")):
        return 1.5  # attention that prefers some tokens
    return 1.0


class _Stream:
    """The random bits of one tensor, independent of every other's."""

    def __init__(self, seed: int, tensor: str) -> None:
        self._bits = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(tensor.encode())]))

    def words(self, count: int) -> NDArray[np.uint16]:
        """`count` uniform 16-bit numbers."""
        raw = self._bits.random_raw(-(-count // 4))
        return np.asarray(raw, dtype="<u8").view("<u2")[:count]


def _quantiles(count: int) -> NDArray[np.float64]:
    """The normal distribution at `count` equally likely points, rounded to 2^-12: the same on every platform."""
    normal = NormalDist()
    upper = [round(normal.inv_cdf((2 * i + 1) / (2 * count)) * 4096) / 4096 for i in range(count // 2, count)]
    half = np.array(upper)
    return np.concatenate([-half[::-1], half])


_NORMAL = _quantiles(1 << 16)
Make = Callable[[int, _Stream], NDArray[Any]]


def _vector(tensor: str, n: int, stream: _Stream) -> NDArray[np.float32]:
    if tensor.endswith("ffn_gate_inp_shexp.weight"):  # a gate that is seldom wide open or shut
        return (1.5 / math.sqrt(n) * _NORMAL[stream.words(n)]).astype("<f4")
    noise = 0.3 * _NORMAL[stream.words(n)]
    return (noise if tensor.endswith(".bias") else 1.0 + noise).astype("<f4")


def _float32(deviation: float) -> Make:
    table = (deviation * _NORMAL).astype("<f4")
    return lambda count, stream: table[stream.words(count)]


def _float16(deviation: float) -> Make:
    table = (deviation * _NORMAL).astype("<f2")
    return lambda count, stream: table[stream.words(count)]


def _bfloat16(deviation: float) -> Make:
    bits = (deviation * _NORMAL).astype("<f4").view("<u4").astype(np.uint64)
    table = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # round to nearest even
    return lambda count, stream: table[stream.words(count)]


def _scales(scale: float) -> NDArray[np.float16]:
    """256 block scales of both signs, from 3/4 to 5/4 of `scale`."""
    magnitudes = scale * (0.75 + 0.5 * np.arange(128) / 128)
    return np.concatenate([magnitudes, -magnitudes]).astype("<f2")


def _blocks(scales: NDArray[np.float16], codes: NDArray[np.uint8], stream: _Stream) -> NDArray[np.uint8]:
    """Blocks of 32 weights: an fp16 scale before each row of code bytes."""
    blocks = np.empty((len(codes), 2 + codes.shape[1]), np.uint8)
    blocks[:, :2] = scales[stream.words(len(codes)) & 0xFF].view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = codes
    return blocks


def _q4_0(deviation: float) -> Make:
    codes = np.clip(np.rint(2.75 * _quantiles(256)), -8, 7)
    scales = _scales(deviation / float(codes.std()))
    nibbles = (codes + 8).astype(np.uint8)
    pairs = np.bitwise_or.outer(nibbles << 4, nibbles).reshape(-1).astype(np.uint8)  # a 16-bit number: two weights

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        return _blocks(scales, pairs[stream.words(count // 2)].reshape(-1, 16), stream)

    return make


def _q8_0(deviation: float) -> Make:
    codes = np.rint(44.0 * _quantiles(256))
    codes[0] = -128  # no quantizer writes it, the format allows it, and kernels get it wrong
    scales = _scales(deviation / float(codes.std()))
    table = codes.astype(np.int8).view(np.uint8)

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        return _blocks(scales, table[stream.words(count // 2).view(np.uint8)].reshape(-1, 32), stream)

    return make


def _codes(deviation: float, bits: int) -> tuple[NDArray[np.uint8], float, float]:
    """256 equally likely codes of `bits` bits, normal around the middle; their mean and their standard deviation."""
    middle = 1 << (bits - 1)
    codes = np.clip(np.rint(deviation * _quantiles(256)) + middle, 0, 2 * middle - 1)
    return codes.astype(np.uint8), float(codes.mean()), float(codes.std())


def _bytes(halves: NDArray[np.float16]) -> NDArray[np.uint8]:
    return halves.view(np.uint8).reshape(-1, 2)


def _group32(bits: int, minimum: bool) -> Callable[[float], Make]:
    """Q4_1, Q5_0, Q5_1."""
    table, mean, spread = _codes(2.75 if bits == 4 else 5.5, bits)

    def maker(deviation: float) -> Make:
        scales = _scales(deviation / spread)

        def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
            codes = table[stream.words(count // 2).view(np.uint8)].reshape(-1, 32)
            words = stream.words(len(codes))
            d = scales[words & 0xFF]
            parts: list[NDArray[Any]] = [_bytes(d)]
            if minimum:  # off the middle by up to 7/16 of a step
                parts.append(_bytes((-d.astype(np.float64) * (mean + ((words >> 8) & 7) / 8 - 0.4375)).astype("<f2")))
            if bits == 5:
                parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
            parts.append((codes[:, :16] & 15) | codes[:, 16:] << 4)
            return np.concatenate(parts, axis=1)

        return make

    return maker


def _scaled256(bits: int) -> Callable[[float], Make]:
    """Q4_K, Q5_K: scales from 1 to 62, each with a minimum of about the same number."""
    table, mean, spread = _codes(2.75 if bits == 4 else 5.5, bits)

    def maker(deviation: float) -> Make:
        scales = _scales(deviation / (spread * math.sqrt((np.arange(1, 63) ** 2).mean())))

        def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
            codes = table[stream.words(count // 2).view(np.uint8)].reshape(-1, 8, 32)
            d = scales[stream.words(len(codes)) & 0xFF]
            words = stream.words(8 * len(codes)).reshape(-1, 8)
            sc = (1 + words % 62).astype(np.uint8)
            m = (sc + (words >> 8) % 3 - 1).astype(np.uint8)
            parts: list[NDArray[Any]] = [_bytes(d), _bytes((d.astype(np.float64) * mean).astype("<f2"))]
            parts += [each[:, :4] | each[:, 4:] >> 4 << 6 for each in (sc, m)]
            parts.append((sc[:, 4:] & 15) | m[:, 4:] << 4)
            if bits == 5:
                parts.append(np.packbits(codes >> 4, axis=1, bitorder="little").reshape(-1, 32))
            parts.append(((codes[:, 0::2] & 15) | codes[:, 1::2] << 4).reshape(-1, 128))
            return np.concatenate(parts, axis=1)

        return make

    return maker


def _q6_k(deviation: float) -> Make:
    """Scales of every int8 value."""
    table, _, spread = _codes(11.0, 6)
    scales = _scales(deviation / (spread * math.sqrt((np.arange(-128, 128) ** 2).mean())))

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        codes = table[stream.words(count // 2).view(np.uint8)].reshape(-1, 2, 4, 32)
        d = scales[stream.words(len(codes)) & 0xFF]
        sc = stream.words(8 * len(codes)).view(np.uint8).reshape(-1, 16)
        low = (codes[:, :, :2] & 15) | codes[:, :, 2:] << 4
        high = codes >> 4 << np.array([[0], [2], [4], [6]], np.uint8)
        high = high[:, :, 0] | high[:, :, 1] | high[:, :, 2] | high[:, :, 3]
        return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), sc, _bytes(d)], axis=1)

    return make


def _nearest(table: tuple[int, ...], deviation: float) -> tuple[NDArray[np.uint8], float]:
    """256 equally likely codes into `table`, those nearest to a normal distribution, and their values' deviation."""
    values = np.array(table, np.float64)
    codes = np.abs(deviation * _quantiles(256)[:, None] - values).argmin(axis=1)
    return codes.astype(np.uint8), float(values[codes].std())


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[Any]:
    """[..., 32] codes as [..., 16] bytes, the first 16 in the low halves."""
    return codes[..., :16] | codes[..., 16:] << 4


def _iq4_nl(deviation: float) -> Make:
    table, spread = _nearest(_IQ4, 44.0)
    scales = _scales(deviation / spread)

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        return _blocks(scales, _nibbles(table[stream.words(count // 2).view(np.uint8)].reshape(-1, 32)), stream)

    return make


def _iq4_xs(deviation: float) -> Make:
    """Scales of every 6-bit value."""
    table, spread = _nearest(_IQ4, 44.0)
    scales = _scales(deviation / (spread * math.sqrt((np.arange(-32, 32) ** 2).mean())))

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        codes = _nibbles(table[stream.words(count // 2).view(np.uint8)].reshape(-1, 8, 32)).reshape(-1, 128)
        d = scales[stream.words(len(codes)) & 0xFF]
        sc = (stream.words(8 * len(codes)).reshape(-1, 8) & 63).astype(np.uint8)
        high = sc >> 4 << np.array([0, 2, 4, 6] * 2, np.uint8)
        tops = high.reshape(-1, 2, 4).sum(axis=2, dtype=np.uint8)
        return np.concatenate([_bytes(d), tops, (sc[:, ::2] & 15) | sc[:, 1::2] << 4, codes], axis=1)

    return make


def _mxfp4(deviation: float) -> Make:
    """Scales of three neighbouring powers of two, codes as wide as it takes then."""
    fraction, exponent = math.frexp(deviation / math.sqrt((0.25 + 1 + 4) / 3))
    table, _ = _nearest(_MXFP4, 4 * fraction)
    table[table == 0] = np.arange((table == 0).sum()) % 2 * 8  # both zeros

    def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
        codes = _nibbles(table[stream.words(count // 2).view(np.uint8)].reshape(-1, 32))
        e = (128 + exponent - 2 - 1 + stream.words(len(codes)) % 3).astype(np.uint8)
        return np.concatenate([e[:, None], codes], axis=1)

    return make


# The formats without a quantizer here: bytes of a block, where its binary16 scale is, and the standard deviation of the
# weights of random blocks whose scale is 1.
_RAW: Mapping[str, tuple[int, int, float]] = {
    "Q2_K": (84, 80, 13.88),
    "Q3_K": (110, 108, 43.37),
    "IQ1_S": (50, 0, 7.201),
    "IQ1_M": (56, 48, 7.198),
    "IQ2_XXS": (66, 0, 53.41),
    "IQ2_XS": (74, 0, 55.89),
    "IQ2_S": (82, 0, 56.42),
    "IQ3_XXS": (98, 0, 142.4),
    "IQ3_S": (110, 0, 140),
    "TQ1_0": (54, 52, 0.8173),
    "TQ2_0": (66, 64, 0.7071),
}


def _raw(type: str) -> Callable[[float], Make]:
    """Random blocks, which are all valid: uniform bytes under a scale that fits."""
    size, place, spread = _RAW[type]

    def maker(deviation: float) -> Make:
        scales = _scales(deviation / spread)

        def make(count: int, stream: _Stream) -> NDArray[np.uint8]:
            number = count // 256
            blocks = stream.words(number * size // 2).view(np.uint8).reshape(number, size).copy()
            d = scales[stream.words(number) & 0xFF]
            if type == "IQ1_M":  # four bits in each of four words
                words = d.view("<u2")[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
                blocks[:, 49:56:2] = (blocks[:, 49:56:2] & 15) | words << 4
                return blocks
            blocks[:, place : place + 2] = _bytes(d)
            if type == "TQ2_0":  # no code 3: their mean would not be zero
                blocks[:, :64] ^= (blocks[:, :64] & blocks[:, :64] >> 1 & 0x55) << 1
            if type == "Q2_K":  # the minimum that makes their mean zero
                blocks[:, 82:84] = _bytes((1.5 * d.astype(np.float64)).astype("<f2"))
            return blocks

        return make

    return maker


_MAKERS: Mapping[str, Callable[[float], Make]] = {
    "F32": _float32,
    "F16": _float16,
    "BF16": _bfloat16,
    "Q4_0": _q4_0,
    "Q4_1": _group32(4, True),
    "Q5_0": _group32(5, False),
    "Q5_1": _group32(5, True),
    "Q8_0": _q8_0,
    "Q4_K": _scaled256(4),
    "Q5_K": _scaled256(5),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    **{type: _raw(type) for type in _RAW},
}


def _write_metadata(writer: GgufWriter, name: str, spec: Spec, type: str) -> None:
    prefix = spec.architecture
    writer.add("general.architecture", prefix, ValueType.STRING)
    writer.add("general.name", f"{name} (synthetic)", ValueType.STRING)
    writer.add("general.file_type", TYPES[type], ValueType.UINT32)
    writer.add("general.quantization_version", 2, ValueType.UINT32)
    for key, value in _integers(spec):
        writer.add(f"{prefix}.{key}", value, ValueType.UINT32)
    writer.add(f"{prefix}.attention.layer_norm_rms_epsilon", spec.norm_epsilon, ValueType.FLOAT32)
    writer.add(f"{prefix}.rope.freq_base", spec.rope_base, ValueType.FLOAT32)
    if spec.rope_scaling != "none":
        writer.add(f"{prefix}.rope.scaling.type", spec.rope_scaling, ValueType.STRING)
        writer.add(f"{prefix}.rope.scaling.factor", spec.rope_factor, ValueType.FLOAT32)
    if spec.rope_divisors and FAMILIES[prefix].longrope:  # for a short context the file has others
        writer.add(f"{prefix}.rope.scaling.original_context_length", spec.context // 2, ValueType.UINT32)
        writer.add(f"{prefix}.rope.scaling.attn_factor", spec.rope_magnitude, ValueType.FLOAT32)
    if spec.rope_scaling == "yarn":
        key = f"{prefix}.rope.scaling."
        writer.add(key + "original_context_length", spec.rope_original_context, ValueType.UINT32)
        writer.add(key + "yarn_beta_fast", spec.rope_beta_fast, ValueType.FLOAT32)
        writer.add(key + "yarn_beta_slow", spec.rope_beta_slow, ValueType.FLOAT32)
        writer.add(key + "attn_factor", spec.rope_magnitude, ValueType.FLOAT32)
    if spec.window:
        writer.add(f"{prefix}.attention.sliding_window", spec.window, ValueType.UINT32)
        if spec.full_every:
            writer.add(f"{prefix}.attention.sliding_window_pattern", spec.full_every, ValueType.UINT32)
        if spec.local_rope_base:
            writer.add(f"{prefix}.rope.freq_base_swa", spec.local_rope_base, ValueType.FLOAT32)
    if spec.expert_scale != 1:
        writer.add(f"{prefix}.expert_weights_scale", spec.expert_scale, ValueType.FLOAT32)
    for key, cap in (("attn", spec.attention_softcap), ("final", spec.logit_softcap)):
        if cap:
            writer.add(f"{prefix}.{key}_logit_softcapping", cap, ValueType.FLOAT32)
    _write_tokenizer(writer, spec)


def _integers(spec: Spec) -> Iterator[tuple[str, int]]:
    yield "vocab_size", spec.vocabulary
    yield "context_length", spec.context
    yield "embedding_length", spec.width
    yield "block_count", spec.layers
    yield "feed_forward_length", spec.ffn
    if spec.experts:
        if FAMILIES[spec.architecture].experts == "required":
            yield "expert_feed_forward_length", spec.ffn
        if spec.shared_ffn:
            yield "expert_shared_feed_forward_length", spec.shared_ffn
        yield "expert_count", spec.experts
        yield "expert_used_count", spec.experts_used
    yield "attention.head_count", spec.heads
    yield "attention.head_count_kv", spec.kv_heads
    yield "attention.key_length", spec.head_dim
    yield "attention.value_length", spec.head_dim
    yield "rope.dimension_count", spec.rope_dims


def _write_tokenizer(writer: GgufWriter, spec: Spec) -> None:
    """A byte-level BPE vocabulary with the special tokens, roles and template of the family's instruct models."""
    if spec.architecture.startswith("qwen"):
        pre, template, add_bos = "qwen2", _QWEN2_TEMPLATE, False
        bos, eos, pad, *others = "<|endoftext|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"
    elif spec.architecture.startswith("gemma"):  # whose own vocabularies are SentencePiece's
        pre, template, add_bos = "llama-bpe", _GEMMA_TEMPLATE, True
        bos, eos, pad, *others = "<bos>", "<end_of_turn>", "<pad>", "<start_of_turn>"
    elif spec.architecture == "phi3":  # Phi 3's own is SentencePiece's, that of Phi 4 mini is this one
        pre, template, add_bos = "gpt-4o", _PHI3_TEMPLATE, False
        bos, eos, pad, *others = "<|endoftext|>", "<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"
        others += ["<unk>", "<s>", "</s>"]  # llama.cpp looks for them where it reads this name
    else:
        pre, template, add_bos = "deepseek-coder", _DEEPSEEK_TEMPLATE, True
        bos, eos, pad, *others = "<｜begin▁of▁sentence｜>", "<|EOT|>", "<｜end▁of▁sentence｜>"
    specials = list(dict.fromkeys([bos, *others, eos, pad]))
    vocabulary = byte_level_bpe(spec.vocabulary, specials)
    key = "tokenizer.ggml."
    writer.add(key + "model", "gpt2", ValueType.STRING)
    writer.add(key + "pre", pre, ValueType.STRING)
    writer.add(key + "tokens", vocabulary.tokens, ValueType.STRING)
    writer.add(key + "token_type", vocabulary.types, ValueType.INT32)
    writer.add(key + "merges", vocabulary.merges, ValueType.STRING)
    for role, token in (("bos", bos), ("eos", eos), ("padding", pad)):
        writer.add(f"{key}{role}_token_id", vocabulary.tokens.index(token), ValueType.UINT32)
    writer.add(key + "add_bos_token", add_bos, ValueType.BOOL)
    writer.add("tokenizer.chat_template", template, ValueType.STRING)
