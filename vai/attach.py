"""`vai.attach("m")`: a model's tensors in this process, over the shared bytes that every engine reads.

>>> weights = vai.attach("m")
>>> weights["blk.0.attn_q.weight"].numpy().shape
(1536, 1536)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vai import config
from vai.errors import Unavailable
from vai.rom import segment
from vai.rom.image import BLOCK_ROWS, BLOCK_TYPES, VECTOR, Part, StoredTensor
from vai.rom.registry import Registry
from vai.rom.view import Image

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Tensor:
    """One logical tensor of an image. shape: (rows, columns), or (n,) for a vector; type: its stored block type."""

    def __init__(self, stored: StoredTensor, part: Part, data: memoryview) -> None:
        """`data`: the bytes of the whole stored tensor, which other tensors may share."""
        self.name = part.name
        self.type = stored.type
        self.shape: tuple[int, ...] = (part.rows,) if stored.type == VECTOR else (part.rows, stored.columns)
        self._stored, self._part, self._data = stored, part, data

    @property
    def packed(self) -> Bytes:
        """The stored bytes, zero copy, read-only: [blocks of 16 rows, blocks of k columns, bytes of a block].

        The layout of a block is in docs/rom-format.md. A tensor that is interleaved with another is a strided view. A
        vector is [blocks of 16 elements, 64 bytes].
        """
        columns = 1 if self.type == VECTOR else -(-self._stored.columns // BLOCK_TYPES[self.type].k)
        blocks = np.frombuffer(self._data, np.uint8).reshape(self._stored.rows // BLOCK_ROWS, columns, -1)
        first, step, count = self._part.first_block, self._part.block_step, self._part.blocks
        mine = blocks[first : first + (count - 1) * step + 1 : step]
        return mine[:, 0] if self.type == VECTOR else mine

    def numpy(self) -> Float32:
        """The values in natural order as binary32: a copy, except that a vector with its elements in a row is a
        read-only view. They are the checkpoint's own values: what GGUF's definition of the type gives in binary32.
        """
        if self.type == VECTOR:
            return _vector(self.packed)[: self._part.rows]
        values = _unpacked(self.type, self.packed)  # [blocks, column blocks, 16 rows, k]
        blocks, column_blocks, rows, k = values.shape
        whole = values.transpose(0, 2, 1, 3).reshape(blocks * rows, column_blocks * k)
        return np.ascontiguousarray(whole[: self._part.rows, : self._stored.columns])

    def __repr__(self) -> str:
        return f"<{self.name}: {self.type} {' x '.join(map(str, self.shape))}>"


class Weights(Mapping[str, Tensor]):
    """The tensors of an attached image by their names in the checkpoint. Holds a lease until closed; a context manager.

    What was taken from it stays readable after `close`; without a lease `vai rm` no longer knows of it.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._names = [part.name for stored in image.table.tensors for part in stored.parts]

    @property
    def digest(self) -> str:
        """The image's identity, 64 hex digits."""
        return self._image.digest

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return Tensor(*self._image.tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Give the lease back."""
        self._image.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def attach(name: str, *, root: Path | str | None = None, names: Path | str | None = None) -> Weights:
    """The weights behind a name, a digest, or its first 8 digits. Takes milliseconds and no memory for weights.

    root, names: default to the configuration of this process. Raises ModelNotFound, Unavailable where it is not
    resident, CorruptImage.
    """
    settings = config.load()
    directory = settings.root if root is None else Path(root)
    registry = Registry(directory, settings.names if names is None else Path(names))
    digest = registry.find(name)
    if not registry.is_resident(digest):
        raise Unavailable(f"The model '{name[:128]}' is not resident. Load it: vai load FILE")
    return Weights(segment.attach(directory, digest))


def _vector(blocks: Bytes) -> Float32:
    """[n, 64] bytes -> [16 n] values; a view where the blocks lie one behind the other."""
    return blocks.view("<f4").reshape(-1)


def _halves(blocks: Bytes, start: int, count: int) -> Float32:
    """`count` binary16 numbers a row from byte `start` of each block on: [..., bytes] -> [..., 16 rows, count]."""
    halves = np.ascontiguousarray(blocks[..., start : start + 32 * count]).view("<f2")
    return halves.reshape(*blocks.shape[:-1], count, BLOCK_ROWS).swapaxes(-1, -2).astype(np.float32)


def _codes(blocks: Bytes, start: int, columns: int, bits: int) -> NDArray[Any]:
    """Codes of `bits` bits in lines of 64 bytes from byte `start` on: [..., bytes] -> [..., 16 rows, columns].

    The lowest bits of a row's four bytes in a line are four columns, the next bits the four after them, and so on.
    """
    size = 2 * columns * bits
    lines = blocks[..., start : start + size].reshape(*blocks.shape[:-1], size // 64, BLOCK_ROWS, 1, 4)
    fields = (lines >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]) & ((1 << bits) - 1)
    return fields.swapaxes(-3, -4).reshape(*blocks.shape[:-1], BLOCK_ROWS, columns)


def _scaled(codes: NDArray[Any], zero: int, scales: Float32, minimums: Float32 | None = None) -> Float32:
    """(codes [..., 16, k] - zero) * scales [..., 16, n] + minimums [..., 16, n], each for k / n columns."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(zero)
    grouped = grouped * scales[..., None]
    if minimums is not None:
        grouped = grouped + minimums[..., None]
    return grouped.reshape(codes.shape)


def _q4_0(blocks: Bytes) -> Float32:
    return _scaled(_codes(blocks, 64, 64, 4), 8, _halves(blocks, 0, 2))


def _q4_1(blocks: Bytes) -> Float32:
    return _scaled(_codes(blocks, 128, 64, 4), 0, _halves(blocks, 0, 2), _halves(blocks, 64, 2))


def _q5_0(blocks: Bytes) -> Float32:
    return _scaled(_codes(blocks, 64, 64, 4) | _codes(blocks, 576, 64, 1) << 4, 16, _halves(blocks, 0, 2))


def _q5_1(blocks: Bytes) -> Float32:
    codes = _codes(blocks, 128, 64, 4) | _codes(blocks, 640, 64, 1) << 4
    return _scaled(codes, 0, _halves(blocks, 0, 2), _halves(blocks, 64, 2))


def _q8_0(blocks: Bytes) -> Float32:
    return _scaled(_codes(blocks, 64, 64, 8), 128, _halves(blocks, 0, 2))


def _q4_k(blocks: Bytes) -> Float32:
    return _six_bits(blocks, _codes(blocks, 256, 256, 4))


def _q5_k(blocks: Bytes) -> Float32:
    return _six_bits(blocks, _codes(blocks, 256, 256, 4) | _codes(blocks, 2304, 256, 1) << 4)


def _six_bits(blocks: Bytes, codes: NDArray[Any]) -> Float32:
    """Q4_K and Q5_K: 6-bit scales of scales and minimums of 32 columns each."""
    low = blocks[..., 64:192].reshape(*blocks.shape[:-1], 8, BLOCK_ROWS).swapaxes(-1, -2)
    high = blocks[..., 192:256].reshape(*blocks.shape[:-1], 4, BLOCK_ROWS).swapaxes(-1, -2)
    high = np.concatenate([high & 15, high >> 4], axis=-1)
    scales = _halves(blocks, 0, 1) * ((low & 15) | (high & 3) << 4)
    return _scaled(codes, 0, scales, -_halves(blocks, 32, 1) * (low >> 4 | high >> 2 << 4))


def _q6_k(blocks: Bytes) -> Float32:
    codes = _codes(blocks, 320, 256, 4) | _codes(blocks, 2368, 256, 2) << 4
    factors = np.ascontiguousarray(blocks[..., 64:320]).view(np.int8)
    scales = factors.reshape(*blocks.shape[:-1], 16, BLOCK_ROWS).swapaxes(-1, -2)
    return _scaled(codes, 32, _halves(blocks, 0, 1) * scales)


# ggml's kvalues_iq4nl and kvalues_mxfp4.
_IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
_MXFP4 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)


def _iq4_nl(blocks: Bytes) -> Float32:
    return _scaled(_IQ4[_codes(blocks, 64, 64, 4)], 0, _halves(blocks, 0, 2))


def _iq4_xs(blocks: Bytes) -> Float32:
    low = blocks[..., 64:128].reshape(*blocks.shape[:-1], 4, BLOCK_ROWS).swapaxes(-1, -2)
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    high = blocks[..., 32:64].reshape(*blocks.shape[:-1], 2, BLOCK_ROWS).swapaxes(-1, -2)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    return _scaled(_IQ4[_codes(blocks, 128, 256, 4)], 0, _halves(blocks, 0, 1) * scales)


def _mxfp4(blocks: Bytes) -> Float32:
    exponents = blocks[..., :32].reshape(*blocks.shape[:-1], 2, BLOCK_ROWS).swapaxes(-1, -2).astype(np.int32)
    return _scaled(_MXFP4[_codes(blocks, 32, 64, 4)], 0, np.ldexp(np.float32(1), exponents - 128))


def _f16(blocks: Bytes) -> Float32:
    return _pairs(blocks, np.dtype("<f2")).astype(np.float32)


def _bf16(blocks: Bytes) -> Float32:
    return (_pairs(blocks, np.dtype("<u2")).astype(np.uint32) << 16).view(np.float32)


def _pairs(blocks: Bytes, kind: np.dtype[np.generic]) -> NDArray[np.generic]:
    """[k / 2][16 rows][2] two-byte values -> [..., 16 rows, k]."""
    values = np.ascontiguousarray(blocks).view(kind).reshape(*blocks.shape[:-1], 16, BLOCK_ROWS, 2)
    return values.swapaxes(-2, -3).reshape(*blocks.shape[:-1], BLOCK_ROWS, 32)


def _f32(blocks: Bytes) -> Float32:
    return np.ascontiguousarray(blocks).view("<f4").reshape(*blocks.shape[:-1], 16, BLOCK_ROWS).swapaxes(-1, -2)


_UNPACK = {
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
    "F16": _f16,
    "BF16": _bf16,
    "F32": _f32,
}


def _unpacked(type: str, blocks: Bytes) -> Float32:
    if type in _UNPACK:
        return _UNPACK[type](blocks)
    from vai.kernels.codebooks import dequantize  # their tables take time, and few files have such blocks

    return dequantize(type, blocks)


class _CallableModule(ModuleType):
    """Importing `vai.attach` binds that name in `vai` to this module, so the module has to be callable itself."""

    def __call__(self, name: str, *, root: Path | str | None = None, names: Path | str | None = None) -> Weights:
        return attach(name, root=root, names=names)


sys.modules[__name__].__class__ = _CallableModule
