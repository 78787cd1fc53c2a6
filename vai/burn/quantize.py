"""Quantizing: a checkpoint of float matrices becomes one of narrower blocks. By name and never behind anyone's back.

A block of 32 weights gets its scale from its largest magnitude (Q4_0, Q5_0, Q8_0) or from its range (Q4_1, Q5_1), as
ggml's reference does it, bit for bit: no search, no calibration text, so a matrix's bytes depend on its weights alone.
Every operation is one binary32 operation, rounded, so they are the same on every machine. Layout of the blocks:
csrc/burn/pack.cc. Vectors, and routers of experts, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.burn.gguf import FILE_TYPES, TENSOR_TYPES, GgufFile, GgufTensor, GgufWriter, ValueType, tensor_bytes
from vai.errors import BadRequest, MalformedFile

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32
PIECE = 1 << 20  # weights quantized at a time
FLOATS = ("F32", "F16", "BF16")
FILE_TYPE, VERSION = "general.file_type", "general.quantization_version"
_ROUTER = "ffn_gate_inp.weight"  # a few rows that decide which experts run


class Quantized(NamedTuple):
    """What was written: bytes of the file, and of the matrices before and after; `types` of every matrix by name."""

    bytes: int
    matrices_before: int
    matrices_after: int
    types: Mapping[str, str]


def quantize(
    source: Path,
    destination: Path,
    *,
    type: str,
    keep: Sequence[tuple[str, str]] = (),
    allow_requantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write `source` (GGUF) to `destination` with matrices of `type`, a key of ENCODERS; metadata are copied.

    keep: (pattern, type) pairs; a matrix whose name matches a pattern (`*` and `?` as in file names) gets the type of
    the first that does. allow_requantize: also read matrices that are quantized already; what they lost stays lost.
    progress: called with bytes of the source done and in all. Memory does not grow with the file.

    Raises BadRequest (unknown type, a pattern without a match, columns that are not whole blocks, a quantized source, a
    weight too large for the type), MalformedFile (also for weights that are not finite), ModelNotFound.
    """
    for name in (type, *(wanted for _, wanted in keep)):
        if name not in ENCODERS:
            raise BadRequest(f"'{name}' is not a type VAI quantizes to; choose one of {', '.join(ENCODERS)}.")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise BadRequest("Source and destination are the same file; give the result another name.")
    with GgufFile(source) as gguf:
        types = _types(gguf, type, keep)
        for name, wanted in types.items():
            _check(gguf.tensors[name], wanted, allow_requantize)
        with GgufWriter(destination, alignment=gguf.alignment) as writer:
            _copy_metadata(gguf, writer, type)
            for tensor in gguf.tensors.values():
                writer.declare(tensor.name, types.get(tensor.name, tensor.type), tensor.dimensions[::-1])
            done, total = 0, sum(tensor.bytes for tensor in gguf.tensors.values())
            for tensor in gguf.tensors.values():
                for piece in converted(gguf, tensor, types.get(tensor.name, tensor.type)):
                    writer.write(piece)
                done += tensor.bytes
                if progress is not None:
                    progress(done, total)
        matrices = [gguf.tensors[name] for name in types]
        after = sum(tensor_bytes(types[tensor.name], tensor.shape) for tensor in matrices)
        before = sum(tensor.bytes for tensor in matrices)
    return Quantized(destination.stat().st_size, before, after, types)


def matrices(gguf: GgufFile) -> Iterator[GgufTensor]:
    """The tensors that can be quantized."""
    return (t for t in gguf.tensors.values() if len(t.dimensions) > 1 and not t.name.endswith(_ROUTER))


def _types(gguf: GgufFile, type: str, keep: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The type of every matrix. Raises BadRequest for a pattern that matches none: it is misspelled."""
    names = [tensor.name for tensor in matrices(gguf)]
    for pattern, _ in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadRequest(f"No matrix of the file has a name like '{pattern}'; `vai show` lists them.")
    return {name: next((wanted for pattern, wanted in keep if fnmatchcase(name, pattern)), type) for name in names}


def _check(tensor: GgufTensor, wanted: str, allow_requantize: bool) -> None:
    if tensor.type == wanted:
        return
    if tensor.shape[1] % TENSOR_TYPES[wanted].block:
        raise BadRequest(
            f"{tensor.name} has {tensor.shape[1]} columns, not whole {wanted} blocks of {TENSOR_TYPES[wanted].block}; "
            f"give it another type: --keep '{tensor.name}=F16'."
        )
    if tensor.type not in FLOATS and not allow_requantize:
        raise BadRequest(
            f"{tensor.name} is {tensor.type} already, and what that lost stays lost; start from a file of floats, "
            "or say --allow-requantize."
        )
    if tensor.type not in DECODERS:
        raise BadRequest(f"{tensor.name} is {tensor.type}, which VAI does not quantize again; start from floats.")


def _copy_metadata(gguf: GgufFile, writer: GgufWriter, type: str) -> None:
    written = {FILE_TYPE: FILE_TYPES[type], VERSION: 2}
    for key in gguf.metadata:
        if key not in written and key != "general.alignment":  # the writer's own
            writer.add_encoded(key, gguf.encoded(key))
    for key, value in written.items():
        writer.add(key, value, ValueType.UINT32)


def converted(gguf: GgufFile, tensor: GgufTensor, type: str) -> Iterator[memoryview]:
    """The bytes of a tensor as `type`, in pieces; those of the file where it has that type already."""
    with gguf.data(tensor.name) as data:
        if tensor.type == type:
            yield data
            return
        kind = TENSOR_TYPES[tensor.type]
        step = PIECE // kind.block * kind.bytes
        for start in range(0, len(data), step):
            with data[start : start + step] as piece:
                weights = decode(tensor.type, np.frombuffer(piece, np.uint8).copy())
            if not np.isfinite(weights).all():
                raise MalformedFile(f"{tensor.name} has weights that are not finite numbers; the file is damaged.")
            try:
                encoded = encode(type, weights)
            except OverflowError:
                raise BadRequest(f"{tensor.name} has weights too large for {type}; keep it BF16 or F32.") from None
            yield encoded.data


def encode(type: str, weights: Floats) -> Bytes:
    """Finite weights, whole blocks of them, as bytes of `type`. Raises OverflowError where fp16 cannot hold a scale."""
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        return ENCODERS[type](weights)


def decode(type: str, data: Bytes) -> Floats:
    """The weights that bytes of `type` stand for, in binary32."""
    return DECODERS[type](data)


def _half(values: Floats) -> Bytes:
    """Rows of fp16 bytes. Raises OverflowError where one is too large."""
    halves = values.astype("<f2")
    if np.isinf(halves).any():
        raise OverflowError
    return halves.view(np.uint8).reshape(len(values), -1)


def _inverse(scales: Floats) -> Floats:
    """1 / scale; 0 where that is no finite number: such a scale is 0 in fp16, and the codes do not count."""
    inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _packed(codes: Bytes, bits: int) -> list[Bytes]:
    """Code bytes of blocks: the fifth bits of all, then nibbles, the second half of a block above the first."""
    nibbles = (codes[:, :16] & np.uint8(15)) | (codes[:, 16:] << np.uint8(4))
    return [np.packbits(codes >> 4, axis=1, bitorder="little"), nibbles] if bits == 5 else [nibbles]


def _codes(data: Bytes, bits: int) -> Floats:
    """The inverse of _packed, for rows that end with those bytes."""
    nibbles = data[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if bits == 5:
        codes |= np.unpackbits(data[:, -20:-16], axis=1, bitorder="little") << 4
    return codes.astype(np.float32)


def _scale(data: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(data[:, at : at + 2]).view("<f2").astype(np.float32)


def _encode_signed(bits: int) -> Callable[[Floats], Bytes]:
    """Q4_0, Q5_0: the weight of the largest magnitude gets the code farthest from the middle, whatever its sign."""
    middle = 1 << (bits - 1)

    def encode(weights: Floats) -> Bytes:
        blocks = weights.reshape(-1, BLOCK)
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
        scales = largest / np.float32(-middle)
        codes = np.trunc(blocks * _inverse(scales) + np.float32(middle + 0.5))
        codes = np.minimum(codes, np.float32(2 * middle - 1)).astype(np.uint8)
        return np.concatenate([_half(scales), *_packed(codes, bits)], axis=1)

    return encode


def _decode_signed(bits: int) -> Callable[[Bytes], Floats]:
    def decode(data: Bytes) -> Floats:
        blocks = data.reshape(-1, 2 + 4 * bits)
        return _scale(blocks, 0) * (_codes(blocks, bits) - np.float32(1 << (bits - 1)))

    return decode


def _encode_ranged(bits: int) -> Callable[[Floats], Bytes]:
    """Q4_1, Q5_1: steps of equal size from the smallest weight to the largest."""
    top = np.float32((1 << bits) - 1)

    def encode(weights: Floats) -> Bytes:
        blocks = weights.reshape(-1, BLOCK)
        low = blocks.min(axis=1, keepdims=True)
        scales = (blocks.max(axis=1, keepdims=True) - low) / top
        codes = np.trunc((blocks - low) * _inverse(scales) + np.float32(0.5))
        return np.concatenate(
            [_half(scales), _half(low), *_packed(np.minimum(codes, top).astype(np.uint8), bits)], axis=1
        )

    return encode


def _decode_ranged(bits: int) -> Callable[[Bytes], Floats]:
    def decode(data: Bytes) -> Floats:
        blocks = data.reshape(-1, 4 + 4 * bits)
        return _scale(blocks, 0) * _codes(blocks, bits) + _scale(blocks, 2)

    return decode


def _encode_q8_0(weights: Floats) -> Bytes:
    blocks = weights.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    steps = blocks * _inverse(scales)
    whole = np.floor(np.abs(steps))
    rounded = whole + np.floor(np.float32(2) * (np.abs(steps) - whole))  # halves away from zero
    return np.concatenate([_half(scales), np.copysign(rounded, steps).astype(np.int8).view(np.uint8)], axis=1)


def _decode_q8_0(data: Bytes) -> Floats:
    blocks = data.reshape(-1, 34)
    return _scale(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _encode_bf16(weights: Floats) -> Bytes:
    bits = weights.reshape(-1).view(np.uint32).astype(np.uint64)
    halves = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
    if ((halves & 0x7FFF) == 0x7F80).any():
        raise OverflowError
    return halves.view(np.uint8)


ENCODERS: Mapping[str, Callable[[Floats], Bytes]] = {
    "Q4_0": _encode_signed(4),
    "Q4_1": _encode_ranged(4),
    "Q5_0": _encode_signed(5),
    "Q5_1": _encode_ranged(5),
    "Q8_0": _encode_q8_0,
    "F32": lambda weights: weights.astype("<f4", copy=False).reshape(-1).view(np.uint8),
    "F16": lambda weights: _half(weights.reshape(1, -1)),
    "BF16": _encode_bf16,
}
DECODERS: Mapping[str, Callable[[Bytes], Floats]] = {
    "F32": lambda data: data.view("<f4"),
    "F16": lambda data: data.view("<f2").astype(np.float32),
    "BF16": lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_signed(4),
    "Q4_1": _decode_ranged(4),
    "Q5_0": _decode_signed(5),
    "Q5_1": _decode_ranged(5),
}
