"""Growing: a small trained model inside a large shape, where it computes what it did at the cost of a large one.

What is added to width, heads, feed-forward rows and layers is zero where it could reach the rest: columns of matrices
and norms for the new elements of the residual stream, rows and columns of new heads and of new feed-forward elements,
and the output and down projections of new layers (whose other matrices repeat those of the old ones, so that they are
read and multiplied like any). RMS norm divides by the width: its weight is scaled by sqrt(small / large) and epsilon by
small / large. Heads keep their length, since attention's scale depends on it; the large shape's heads are cut into as
many of that length. Family, vocabulary, RoPE and context stay the model's own.

Zeros behind what was there change no sum (docs/rom-format.md, kernels/ops.py), and where large / small is a power of 4
the scaling is exact as well: then every logit has the same bits. Otherwise the norms differ in their last bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from vai.burn.burn import preview
from vai.burn.gguf import TENSOR_TYPES, GgufFile, GgufTensor, GgufWriter, Scalar, ValueType, tensor_bytes
from vai.burn.quantize import decode
from vai.burn.synth import MAX_BYTES, shape_named
from vai.errors import BadRequest, UnsupportedModel
from vai.models.spec import ROPE_DIVISORS, Spec, expected_tensors

FAMILIES = ("llama", "qwen2")
PIECE = 4 << 20  # bytes of rows written at a time

# What the rows and columns of a matrix, or the elements of a vector, stand for.
_AXES: Mapping[str, tuple[str, ...]] = {
    "token_embd.weight": ("vocabulary", "width"),
    "output.weight": ("vocabulary", "width"),
    "output_norm.weight": ("width",),
    "attn_norm.weight": ("width",),
    "attn_q.weight": ("queries", "width"),
    "attn_k.weight": ("keys", "width"),
    "attn_v.weight": ("keys", "width"),
    "attn_q.bias": ("queries",),
    "attn_k.bias": ("keys",),
    "attn_v.bias": ("keys",),
    "attn_output.weight": ("width", "queries"),
    "ffn_norm.weight": ("width",),
    "ffn_gate.weight": ("ffn", "width"),
    "ffn_up.weight": ("ffn", "width"),
    "ffn_down.weight": ("width", "ffn"),
}
_CLOSED = ("attn_output.weight", "ffn_down.weight")  # zero in an added layer


class Grown(NamedTuple):
    """A grown model. bytes: of its file · exact: whether its logits have the bits of the small one's."""

    spec: Spec
    bytes: int
    exact: bool


class _Axis(NamedTuple):
    """How an axis grows: `size` elements, the old ones in runs (start, count, new start)."""

    size: int
    runs: tuple[tuple[int, int, int], ...]


class _Origin(NamedTuple):
    """A tensor of the grown model: the source's tensor, its axes, and whether it is all zeros."""

    tensor: GgufTensor
    axes: tuple[str, ...]
    empty: bool


def grow(source: Path, destination: Path, *, shape: str | Spec) -> Grown:
    """Write the GGUF file `source` grown to `shape` (a name of synth.SHAPES, or a Spec) to `destination`.

    Memory does not grow with the file. Raises BadRequest where the shape is smaller in some respect, where padding
    would cut quantized blocks, or for a file over synth.MAX_BYTES; UnsupportedModel for other families; and as burning
    the source would.
    """
    label, large = (shape, shape_named(shape)) if isinstance(shape, str) else ("a larger shape", shape)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise BadRequest("Source and destination are the same file; give the result another name.")
    small = preview(source).spec
    spec = _grown(small, large)
    axes = _axes(small, spec)
    with GgufFile(source) as gguf:
        plan = {name: _origin(gguf, name, small) for name in expected_tensors(spec)}
        for origin in plan.values():
            _check_blocks(origin, axes)
        _check_size(plan, axes)
        changes = _changes(gguf, spec, label)
        with GgufWriter(destination, alignment=gguf.alignment) as writer:
            for key in gguf.metadata:
                if key not in changes and key != "general.alignment":  # the writer's own
                    writer.add_encoded(key, gguf.encoded(key))
            for key, (value, kind) in changes.items():
                writer.add(key, value, kind)
            for name, origin in plan.items():
                shape_ = tuple(axes[axis].size for axis in origin.axes)
                writer.declare(name, origin.tensor.type if len(shape_) == 2 else "F32", shape_)
            if ROPE_DIVISORS in gguf.tensors:
                writer.declare(ROPE_DIVISORS, "F32", gguf.tensors[ROPE_DIVISORS].dimensions)
            factor = np.float32(math.sqrt(small.width / spec.width))
            for origin in plan.values():
                for piece in (
                    _matrix(gguf, origin, axes) if len(origin.axes) == 2 else _vector(gguf, origin, axes, factor)
                ):
                    writer.write(piece)
            if ROPE_DIVISORS in gguf.tensors:
                with gguf.data(ROPE_DIVISORS) as data:
                    writer.write(data)
    return Grown(spec, destination.stat().st_size, _is_power_of_4(spec.width, small.width))


def _is_power_of_4(large: int, small: int) -> bool:
    ratio, rest = divmod(large, small)
    return not rest and ratio.bit_count() == 1 and ratio.bit_length() % 2 == 1


def _grown(small: Spec, large: Spec) -> Spec:
    """`small` with the sizes of `large`. Raises BadRequest, UnsupportedModel."""
    unknown = [name for name in expected_tensors(small) if re.sub(r"^blk\.\d+\.", "", name) not in _AXES]
    if small.architecture not in FAMILIES or unknown:
        raise UnsupportedModel(
            f"A model of the family '{small.architecture}'{f' with {unknown[0]}' if unknown else ''} cannot be grown; "
            f"dense models of {' and '.join(FAMILIES)} can."
        )
    if large.head_dim % small.head_dim:
        raise BadRequest(f"Heads of {small.head_dim} do not fill those of {large.head_dim}; choose another shape.")
    pieces = large.head_dim // small.head_dim
    spec = msgspec.structs.replace(
        small,
        layers=large.layers,
        width=large.width,
        ffn=large.ffn,
        heads=large.heads * pieces,
        kv_heads=large.kv_heads * pieces,
        norm_epsilon=float(np.float32(small.norm_epsilon * small.width / large.width)),
    )
    for what, before, after in (
        ("layers", small.layers, spec.layers),
        ("elements of width", small.width, spec.width),
        ("feed-forward rows", small.ffn, spec.ffn),
        ("key-value heads", small.kv_heads, spec.kv_heads),
        ("query heads for each of keys and values", small.heads // small.kv_heads, spec.heads // spec.kv_heads),
    ):
        if after < before:
            raise BadRequest(f"The model has {before} {what}, the shape {after}; choose a larger shape.")
    return spec


def _axes(small: Spec, spec: Spec) -> dict[str, _Axis]:
    def padded(before: int, after: int) -> _Axis:
        return _Axis(after, ((0, before, 0),))

    length = small.head_dim
    before, after = small.heads // small.kv_heads * length, spec.heads // spec.kv_heads * length
    # Query heads stay with the keys and values that they share.
    shared = tuple((head * before, before, head * after) for head in range(small.kv_heads))
    return {
        "vocabulary": padded(small.vocabulary, spec.vocabulary),
        "width": padded(small.width, spec.width),
        "ffn": padded(small.ffn, spec.ffn),
        "queries": _Axis(spec.heads * length, shared),
        "keys": padded(small.kv_heads * length, spec.kv_heads * length),
    }


def _origin(gguf: GgufFile, name: str, small: Spec) -> _Origin:
    """Where a tensor of the grown model comes from; those of an added layer repeat the layers that were there."""
    if not name.startswith("blk."):
        return _Origin(gguf.tensors[name], _AXES[name], empty=False)
    _, number, member = name.split(".", 2)
    layer = int(number)
    tensor = gguf.tensors[f"blk.{layer % small.layers}.{member}"]
    return _Origin(tensor, _AXES[member], empty=layer >= small.layers and member in _CLOSED)


def _check_blocks(origin: _Origin, axes: Mapping[str, _Axis]) -> None:
    block = TENSOR_TYPES[origin.tensor.type].block
    axis = axes[origin.axes[-1]]
    if len(origin.axes) == 2 and (axis.size % block or any(place % block for run in axis.runs for place in run)):
        raise BadRequest(
            f"Growing {origin.tensor.name} would cut {origin.tensor.type} blocks of {block}; "
            "start from a file of floats, or choose another shape."
        )


def _check_size(plan: Mapping[str, _Origin], axes: Mapping[str, _Axis]) -> None:
    matrices = [origin for origin in plan.values() if len(origin.axes) == 2]
    total = sum(tensor_bytes(o.tensor.type, (axes[o.axes[0]].size, axes[o.axes[1]].size)) for o in matrices)
    if total > MAX_BYTES:
        raise BadRequest(
            f"The grown model would be {total / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:.1f} GB. Quantize it first."
        )


def _changes(gguf: GgufFile, spec: Spec, label: str) -> dict[str, tuple[Scalar, ValueType]]:
    """The metadata that differ from the source's."""
    prefix = spec.architecture
    sizes = {
        "embedding_length": spec.width,
        "block_count": spec.layers,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
    }
    name = gguf.metadata.get("general.name", "model")
    return {
        "general.name": (f"{name} grown to {label}", ValueType.STRING),
        **{f"{prefix}.{key}": (value, ValueType.UINT32) for key, value in sizes.items()},
        f"{prefix}.attention.layer_norm_rms_epsilon": (spec.norm_epsilon, ValueType.FLOAT32),
    }


def _vector(gguf: GgufFile, origin: _Origin, axes: Mapping[str, _Axis], factor: np.float32) -> Iterator[memoryview]:
    """A norm's weight, scaled, or a bias, as F32."""
    axis = axes[origin.axes[0]]
    grown = np.zeros(axis.size, "<f4")
    with gguf.data(origin.tensor.name) as data:
        values = decode(origin.tensor.type, np.frombuffer(data, np.uint8).copy())
    for start, count, place in axis.runs:
        grown[place : place + count] = values[start : start + count]
    if origin.tensor.name.endswith("norm.weight"):
        grown *= factor
    yield grown.data


def _matrix(gguf: GgufFile, origin: _Origin, axes: Mapping[str, _Axis]) -> Iterator[memoryview]:
    """The bytes of a grown matrix. In every block type zero bytes are weights of zero."""
    kind = TENSOR_TYPES[origin.tensor.type]
    rows, columns = (axes[axis] for axis in origin.axes)
    before = origin.tensor.shape[1] // kind.block * kind.bytes
    after = columns.size // kind.block * kind.bytes
    at_once = max(1, PIECE // after)
    position = 0

    def zeros(until: int) -> Iterator[memoryview]:
        for start in range(position, until, at_once):
            yield memoryview(bytes(after * min(at_once, until - start)))

    for start, count, place in () if origin.empty else rows.runs:
        yield from zeros(place)
        for first in range(start, start + count, at_once):
            number = min(at_once, start + count - first)
            grown = np.zeros((number, after), np.uint8)
            with gguf.data(origin.tensor.name) as data, data[first * before : (first + number) * before] as piece:
                old = np.frombuffer(piece, np.uint8).reshape(number, before).copy()
            for run in columns.runs:
                low, length, high = (each // kind.block * kind.bytes for each in run)
                grown[:, high : high + length] = old[:, low : low + length]
            yield grown.data
        position = place + count
    yield from zeros(rows.size)
