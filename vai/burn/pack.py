"""What an image of a checkpoint will hold, and its bytes: the plan of stored tensors, and the packing into tiles.

Layouts: docs/rom-format.md. Packing only permutes bits, vectors apart, which become binary32 (exact for fp16 and bf16).
Every tile is proved as soon as it is packed: its codes and scale bits are read back and compared with the source's,
lane by lane. Equal codes and scales dequantize to equal bits, so an image that was burned computes what the checkpoint
says.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vai.burn import _pack
from vai.burn.gguf import GgufFile, GgufTensor
from vai.errors import CorruptImage, MalformedFile, UnsupportedModel
from vai.models.spec import Spec, expected_tensors, expert_tensors, file_tensors
from vai.rom.image import BLOCK_ROWS, VECTOR, Part, StoredTensor, place, tensor_bytes

VECTOR_TYPES = ("F32", "F16", "BF16")

# Neighbours that become one stored tensor where their block types are equal, and whether their blocks of 16 rows
# alternate: gate and up do, so that one pass of a kernel sees both halves of the product.
_FUSIONS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "attn_qkv": (("attn_q", "attn_k", "attn_v"), False),
    "ffn_gate_up": (("ffn_gate", "ffn_up"), True),
    "ffn_gate_up_exps": (("ffn_gate_exps", "ffn_up_exps"), True),
    "ffn_gate_up_shexp": (("ffn_gate_shexp", "ffn_up_shexp"), True),
}
_MEMBER = re.compile(r"(blk\.\d+\.)(attn_[qkv]|ffn_(?:gate|up)(?:|_exps|_shexp))\.(weight|bias)")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")


class Source(NamedTuple):
    """`rows` rows of a checkpoint's tensor from `first` on (elements, of a vector)."""

    tensor: GgufTensor
    first: int
    rows: int

    def bytes(self) -> slice:
        """Where they are in the tensor's bytes."""
        row = self.tensor.bytes // self.tensor.shape[_is_vector(self.tensor)]
        return slice(self.first * row, (self.first + self.rows) * row)


Sources = tuple[Source, ...]  # of one tensor of the model: its rows in order, of one type


class StoredPart(NamedTuple):
    """A part of a stored tensor, or a piece of one, and the checkpoint's rows that it holds."""

    part: Part
    source: Source


class Planned(NamedTuple):
    """A stored tensor and where its parts come from."""

    stored: StoredTensor
    parts: tuple[StoredPart, ...]


class ImagePlan(NamedTuple):
    """The stored tensors in the order of the data area, and the bytes of that area."""

    tensors: tuple[Planned, ...]
    data_bytes: int

    def stored(self) -> tuple[StoredTensor, ...]:
        """What the image's tensor table lists."""
        return tuple(planned.stored for planned in self.tensors)

    def between(self, start: int, stop: int) -> Iterator[Planned]:
        """The tensors with bytes in [start, stop) of the data area, in order."""
        first = bisect_right(self.tensors, start, key=lambda planned: planned.stored.offset)
        for planned in self.tensors[max(first - 1, 0) :]:
            if planned.stored.offset >= stop:
                break
            if planned.stored.offset + planned.stored.bytes > start:
                yield planned


def plan_image(gguf: GgufFile, spec: Spec) -> ImagePlan:
    """Which tensors the image of this checkpoint has, and where. `spec` is that of `gguf`: its tensors are all there.

    The matrices of a layer's experts become one, each below the one before. Raises UnsupportedModel for a vector of a
    quantized type and for experts of different types, MalformedFile for a tensor with another number of dimensions or
    of experts than it should have.
    """
    sources = _sources(gguf, spec)
    groups = _fused(sources)
    shapes = [_shape(sources, names, interleaved, spec.experts) for _, names, interleaved in groups]
    sizes = [tensor_bytes(type_, rows, columns) for type_, rows, columns, _, _ in shapes]
    offsets, data_bytes = place(sizes)
    tensors = tuple(
        Planned(StoredTensor(name, type_, rows, columns, offset, size, parts), pieces)
        for (name, _, _), (type_, rows, columns, parts, pieces), offset, size in zip(
            groups, shapes, offsets, sizes, strict=True
        )
    )
    return ImagePlan(tensors, data_bytes)


def _sources(gguf: GgufFile, spec: Spec) -> dict[str, Sources]:
    """Where the checkpoint has each tensor of the model, in canonical order."""
    expected, sources = expected_tensors(spec), dict[str, Sources]()
    for name, parts in file_tensors(spec).items():
        if name not in gguf.tensors:
            sources[name] = _each_expert([gguf.tensors[piece] for piece in expert_tensors(name, spec.experts)])
            continue
        tensor, first = gguf.tensors[name], 0
        for part in parts:
            rows = expected[part][0] if len(parts) > 1 else tensor.shape[_is_vector(tensor)]
            sources[part] = (Source(tensor, first, rows),)
            first += rows
    return sources


def _each_expert(tensors: Sequence[GgufTensor]) -> Sources:
    for tensor in tensors:
        if tensor.type != tensors[0].type:
            raise UnsupportedModel(
                f"The tensor {tensor.name} is {tensor.type} and {tensors[0].name} is {tensors[0].type}; experts of one "
                "layer must have one type. Convert the original checkpoint again: that makes one tensor of them."
            )
    return tuple(Source(tensor, 0, tensor.shape[0]) for tensor in tensors)


def _fused(sources: Mapping[str, Sources]) -> list[tuple[str, tuple[str, ...], bool]]:
    """(stored name, logical names, interleaved) in canonical order; a fusion stands where its first member would."""
    groups: dict[str, tuple[str, tuple[str, ...], bool]] = {}
    for name in sources:
        fusion = _fusion(sources, name)
        if fusion is None:
            groups[name] = (name, (name,), False)
        else:
            groups.setdefault(fusion[0], fusion)
    return list(groups.values())


def _fusion(sources: Mapping[str, Sources], name: str) -> tuple[str, tuple[str, ...], bool] | None:
    """The fusion `name` is part of. Biases follow their matrices."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        return None
    block, member, kind = match.groups()
    for fused, (members, interleaved) in _FUSIONS.items():
        if member in members and len({sources[f"{block}{m}.weight"][0].tensor.type for m in members}) == 1:
            return f"{block}{fused}.{kind}", tuple(f"{block}{m}.{kind}" for m in members), interleaved
    return None


def _shape(
    sources: Mapping[str, Sources], names: Sequence[str], interleaved: bool, experts: int
) -> tuple[str, int, int, tuple[Part, ...], tuple[StoredPart, ...]]:
    """(stored type, stored rows, columns, parts, pieces of parts) of the logical tensors stored together."""
    tensors = [sources[name][0].tensor for name in names]
    vector = _is_vector(tensors[0])
    parts: list[Part] = []
    pieces: list[StoredPart] = []
    block = 0
    for index, (name, source) in enumerate(zip(names, tensors, strict=True)):
        if _EXPERTS.fullmatch(source.name):
            if len(source.dimensions) != 3 or source.dimensions[2] != experts:
                raise MalformedFile(f"The tensor {source.name} is not {experts} matrices, one for each expert.")
        elif len(source.dimensions) > 2:
            raise MalformedFile(f"The tensor {source.name} has {len(source.dimensions)} dimensions instead of two.")
        if vector and source.type not in VECTOR_TYPES:
            raise UnsupportedModel(
                f"The vector {source.name} has the type {source.type}; VAI takes {', '.join(VECTOR_TYPES)} for vectors."
            )
        first, step = (index, len(names)) if interleaved else (block, 1)
        part = Part(name, sum(piece.rows for piece in sources[name]), first, step)
        parts.append(part)
        block += part.blocks
        for piece in sources[name]:  # all but the last are whole blocks
            pieces.append(StoredPart(Part(name, piece.rows, first, step), piece))
            first += pieces[-1].part.blocks * step
    columns = 1 if vector else tensors[0].shape[1]
    return VECTOR if vector else tensors[0].type, block * BLOCK_ROWS, columns, tuple(parts), tuple(pieces)


def _is_vector(source: GgufTensor) -> bool:
    return len(source.dimensions) == 1


def pack_range(plan: ImagePlan, gguf: GgufFile, start: int, window: memoryview) -> None:
    """Write bytes [start, start + len(window)) of the data area into `window`, proving every tile.

    Any range may be written alone, by any thread. Raises CorruptImage where the proof fails: the memory or the
    processor is faulty, or the file changed meanwhile.
    """
    end, stop = start, start + len(window)
    for stored, parts in plan.between(start, stop):
        low, high = max(stored.offset, start), min(stored.offset + stored.bytes, stop)
        window[end - start : low - start] = bytes(low - end)
        for part, source in parts:
            with gguf.data(source.tensor.name) as whole, whole[source.bytes()] as data:
                proved = _pack.fill(
                    source.tensor.type,
                    stored.type == VECTOR,
                    data,
                    part.rows,
                    stored.columns,
                    part.first_block,
                    part.block_step,
                    low - stored.offset,
                    window[low - start : high - start],
                )
            if not proved:
                raise CorruptImage(
                    f"Packing {part.name} did not give back what the file says. Either the file changed while it was "
                    "read, or this machine's memory is faulty."
                )
        end = high
    window[end - start :] = bytes(stop - end)


def unpack(stored: StoredTensor, part: Part, source_type: str, data: memoryview) -> bytes:
    """The checkpoint's bytes of `part`, from the bytes `data` of the whole stored tensor: the inverse of packing."""
    return _pack.unpack(
        source_type, stored.type == VECTOR, data, part.rows, stored.columns, part.first_block, part.block_step
    )
