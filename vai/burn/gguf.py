"""GGUF, the checkpoint format of llama.cpp: a reader that trusts nothing in the file, and a streaming writer.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. A file is magic "GGUF", version,
two counts, typed key-value metadata, tensor descriptions, padding to `general.alignment`, and the tensors' bytes.

Every count, length, type, offset and extent is checked against the file's size and against the limits below before
anything is allocated for it, so reading a hostile file costs time and memory in proportion to its size at most.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from vai.burn import _pack
from vai.errors import BadRequest, MalformedFile, ModelNotFound, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits far above any real file (the largest known: about 3,000 tensors, 1.5 million array elements, 30 MB of header).
MAX_METADATA_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 22
MAX_STRING_BYTES = 16 << 20
MAX_KEY_BYTES = 65535  # the specification's own limit
MAX_NAME_BYTES = 64  # the specification's own limit
MAX_DIMENSIONS = 4
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 16
MAX_ELEMENTS_OF_TENSOR = 1 << 48


class ValueType(IntEnum):
    """The types of metadata values, with the format's numbers."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS: dict[int, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class TensorType(NamedTuple):
    """A tensor type: its number in the file, elements of a block, bytes of a block."""

    number: int
    block: int
    bytes: int


# What can be burned. The order of bytes and bits within the quantized blocks: csrc/burn/pack.cc.
TENSOR_TYPES: dict[str, TensorType] = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q4_K": TensorType(12, 256, 144),
    "Q5_K": TensorType(13, 256, 176),
    "Q6_K": TensorType(14, 256, 210),
    "IQ4_NL": TensorType(20, 32, 18),
    "IQ4_XS": TensorType(23, 256, 136),
    "Q2_K": TensorType(10, 256, 84),
    "Q3_K": TensorType(11, 256, 110),
    "IQ1_S": TensorType(19, 256, 50),
    "IQ1_M": TensorType(29, 256, 56),
    "IQ2_XXS": TensorType(16, 256, 66),
    "IQ2_XS": TensorType(17, 256, 74),
    "IQ2_S": TensorType(22, 256, 82),
    "IQ3_XXS": TensorType(18, 256, 98),
    "IQ3_S": TensorType(21, 256, 110),
    "TQ1_0": TensorType(34, 256, 54),
    "TQ2_0": TensorType(35, 256, 66),
    "BF16": TensorType(30, 1, 2),
    "MXFP4": TensorType(39, 32, 17),
}
_USABLE = {kind.number: name for name, kind in TENSOR_TYPES.items()}
FILE_TYPES = {  # general.file_type: what most matrices are
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "MXFP4": 38,
    "Q2_K": 10,
    "Q3_K": 11,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ3_XXS": 23,
    "IQ3_S": 26,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
}
# The rest of what the format has numbers for, so that a refusal says the name people know.
_OTHER_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip

Scalar = int | float | bool | str
Value = Scalar | list[int] | list[float] | list[bool] | list[str]


class GgufTensor(NamedTuple):
    """One tensor of a file. shape = (rows, columns): columns is the format's first dimension, the contiguous one, and
    rows the product of the others, so a vector of n elements is (1, n). offset and bytes: its extent in the file."""

    name: str
    type: str
    shape: tuple[int, int]
    dimensions: tuple[int, ...]  # as in the file, contiguous one first
    offset: int
    bytes: int


def tensor_bytes(type_name: str, shape: tuple[int, int]) -> int:
    """Bytes of a tensor of (rows, columns); columns must be whole blocks. Raises ValueError."""
    kind = TENSOR_TYPES[type_name]
    rows, columns = shape
    if columns % kind.block:
        raise ValueError(f"{columns} columns are not whole {type_name} blocks of {kind.block}")
    return rows * (columns // kind.block) * kind.bytes


def _printable(raw: bytes) -> str:
    """Text for an error message out of bytes nobody should trust."""
    return repr(raw[:80].decode("utf-8", "backslashreplace"))[1:-1]


class _Cursor:
    """A bounded walk over the header's bytes. Every read past the end is a MalformedFile."""

    def __init__(self, buffer: mmap.mmap, end: int) -> None:
        self.buffer = buffer
        self.position = 0
        self.end = end
        self.elements_left = MAX_ELEMENTS

    def left(self) -> int:
        return self.end - self.position

    def number(self, form: struct.Struct, what: str) -> int:
        start = self.position
        if start + form.size > self.end:
            raise MalformedFile(f"The file ends inside {what}; it is truncated, fetch it again.")
        self.position = start + form.size
        value: int = form.unpack_from(self.buffer, start)[0]
        return value

    def raw(self, what: str, limit: int) -> bytes:
        length = self.number(_U64, what)
        if length > limit:
            raise MalformedFile(f"{what} says it has {length} bytes; the limit is {limit}.")
        start = self.position
        if length > self.end - start:
            raise MalformedFile(f"{what} says it has {length} bytes, but {self.left()} are left in the header.")
        self.position = start + length
        return self.buffer[start : self.position]

    def text(self, what: str, limit: int) -> str:
        return _utf8(self.raw(what, limit), what)

    def identifier(self, what: str, limit: int) -> str:
        """A key or a name: text that is not empty and has no control characters."""
        text = self.text(what, limit)
        if not text or not text.isprintable():
            raise MalformedFile(
                f"{what} is empty or has characters that cannot be printed: {_printable(text.encode())}."
            )
        return text


def _utf8(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise MalformedFile(f"{what} is not valid UTF-8.") from None


def _scalar(cursor: _Cursor, kind: int, what: str) -> Scalar:
    if kind == ValueType.STRING:
        return cursor.text(what, MAX_STRING_BYTES)
    value = cursor.number(_SCALARS[kind], what)
    if kind != ValueType.BOOL:
        return value
    if value > 1:
        raise MalformedFile(f"{what} is a boolean with the value {value}.")
    return bool(value)


def _strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    """`count` strings, in native code: a vocabulary has some hundred thousand of them."""
    try:
        strings, cursor.position = _pack.strings(cursor.buffer, cursor.position, cursor.end, count, MAX_STRING_BYTES)
    except IndexError:
        raise MalformedFile(f"The file ends inside {what}; it is truncated, fetch it again.") from None
    except UnicodeDecodeError:
        raise MalformedFile(f"A string in {what} is not valid UTF-8.") from None
    except ValueError as length:
        raise MalformedFile(
            f"A string in {what} says it has {length} bytes: more than there are, or than is sane."
        ) from None
    return strings


def _array(cursor: _Cursor, what: str) -> Value:
    kind = cursor.number(_U32, what)
    if kind == ValueType.ARRAY:
        raise UnsupportedModel(f"{what} is an array of arrays, which no supported model uses.")
    if kind != ValueType.STRING and kind not in _SCALARS:
        raise MalformedFile(f"{what} is an array of an unknown value type, {kind}.")
    count = cursor.number(_U64, what)
    smallest = 8 if kind == ValueType.STRING else _SCALARS[kind].size
    if count > cursor.left() // smallest:
        raise MalformedFile(f"{what} says it has {count} elements, more than the file has room for.")
    if count > cursor.elements_left:
        raise MalformedFile(f"{what} brings the metadata over {MAX_ELEMENTS} array elements, the limit.")
    cursor.elements_left -= count
    if kind == ValueType.STRING:
        return _strings(cursor, count, what)
    start = cursor.position
    cursor.position = start + count * smallest
    letter = _SCALARS[kind].format[-1]
    values = list(struct.unpack_from(f"<{count}{letter}", cursor.buffer, start))
    if kind != ValueType.BOOL:
        return values
    if values and max(values) > 1:
        raise MalformedFile(f"{what} is an array of booleans with a value other than 0 and 1.")
    return [bool(value) for value in values]


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Value], dict[str, int], dict[str, tuple[int, int]]]:
    """Values, their types, and the extents of both in the file, by key."""
    values: dict[str, Value] = {}
    types: dict[str, int] = {}
    extents: dict[str, tuple[int, int]] = {}
    for index in range(count):
        key = cursor.identifier(f"Metadata key {index}", MAX_KEY_BYTES)
        if key in values:
            raise MalformedFile(f"The metadata key '{_printable(key.encode())}' is there twice.")
        what = f"Metadata '{_printable(key.encode())}'"
        start = cursor.position
        kind = cursor.number(_U32, what)
        if kind == ValueType.ARRAY:
            values[key] = _array(cursor, what)
        elif kind == ValueType.STRING or kind in _SCALARS:
            values[key] = _scalar(cursor, kind, what)
        else:
            raise MalformedFile(f"{what} has an unknown value type, {kind}.")
        types[key] = kind
        extents[key] = (start, cursor.position)
    return values, types, extents


def _tensor(cursor: _Cursor, index: int) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.identifier(f"The name of tensor {index}", MAX_NAME_BYTES)
    what = f"Tensor '{name}'"
    dimensions = cursor.number(_U32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise MalformedFile(f"{what} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible.")
    shape = tuple(cursor.number(_U64, what) for _ in range(dimensions))
    if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS_OF_TENSOR:
        raise MalformedFile(f"{what} has the impossible shape {shape}.")
    number = cursor.number(_U32, what)
    if number in _OTHER_TYPES:
        raise UnsupportedModel(
            f"{what} has the type {_OTHER_TYPES[number]}, which VAI cannot burn yet; "
            f"use a file of {', '.join(TENSOR_TYPES)}."
        )
    if number not in _USABLE:
        raise MalformedFile(f"{what} has an unknown tensor type, {number}; the file is damaged or newer than VAI.")
    kind = _USABLE[number]
    if shape[0] % TENSOR_TYPES[kind].block:
        raise MalformedFile(f"{what} has {shape[0]} columns, not whole {kind} blocks of {TENSOR_TYPES[kind].block}.")
    return name, kind, shape, cursor.number(_U64, what)


def _alignment(values: Mapping[str, Value], types: Mapping[str, int]) -> int:
    key = "general.alignment"
    if key not in values:
        return DEFAULT_ALIGNMENT
    value = values[key]
    if types[key] != ValueType.UINT32 or not isinstance(value, int):
        raise MalformedFile("Metadata 'general.alignment' must be a 32-bit unsigned number.")
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise MalformedFile(
            f"Metadata 'general.alignment' is {value}; it must be a power of two "
            f"from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}."
        )
    return value


def _refuse_split(values: Mapping[str, Value]) -> None:
    count = values.get("split.count", 0)
    if not isinstance(count, int):
        raise MalformedFile("Metadata 'split.count' must be a number.")
    if count > 1:
        raise UnsupportedModel(
            f"This is one of {count} pieces of a split checkpoint, which VAI cannot burn yet; "
            "join them first (llama-gguf-split --merge)."
        )


class GgufFile:
    """A GGUF file, mapped read-only. `metadata`: key -> number, bool, str or list of one of them. `tensors`: name ->
    GgufTensor, in the file's order. A context manager; closing it ends the mapping.

    Raises ModelNotFound (no such file), BadRequest (it cannot be read), MalformedFile (it lies), UnsupportedModel
    (version, byte order, tensor type or split that VAI does not read, by name). It must not shrink while it is open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        try:
            self._parse()
        except BaseException:
            self._map.close()
            raise
        self._view = memoryview(self._map)

    def _parse(self) -> None:
        size = len(self._map)
        cursor = _Cursor(self._map, min(size, MAX_METADATA_BYTES))
        _check_version(self._map)
        cursor.position = 8
        tensor_count = cursor.number(_U64, "its header")
        key_count = cursor.number(_U64, "its header")
        # The smallest key is 8 + 1 + 4 + 1 bytes, the smallest tensor 8 + 1 + 4 + 8 + 4 + 8.
        if key_count > min(MAX_KEYS, cursor.left() // 14):
            raise MalformedFile(f"The header says {key_count} metadata keys, more than fit or than is sane.")
        if tensor_count > min(MAX_TENSORS, cursor.left() // 33):
            raise MalformedFile(f"The header says {tensor_count} tensors, more than fit or than is sane.")
        self.version: int = _U32.unpack_from(self._map, 4)[0]
        self.metadata, self.types, self._extents = _metadata(cursor, key_count)
        _refuse_split(self.metadata)
        self.alignment = _alignment(self.metadata, self.types)
        described = [_tensor(cursor, index) for index in range(tensor_count)]
        self.header_bytes = cursor.position
        self.data_offset = -(-cursor.position // self.alignment) * self.alignment
        self.tensors = self._place(described, size)

    def _place(self, described: list[tuple[str, str, tuple[int, ...], int]], size: int) -> dict[str, GgufTensor]:
        """Extents of the tensors, each inside the file and none over another."""
        tensors: dict[str, GgufTensor] = {}
        for name, kind, dimensions, relative in described:
            if name in tensors:
                raise MalformedFile(f"The tensor '{name}' is there twice.")
            if relative % self.alignment:
                raise MalformedFile(f"Tensor '{name}' starts at {relative}, not a multiple of {self.alignment}.")
            shape = (math.prod(dimensions[1:]), dimensions[0])
            bytes_, offset = tensor_bytes(kind, shape), self.data_offset + relative
            if offset + bytes_ > size:
                raise MalformedFile(
                    f"Tensor '{name}' should end at byte {offset + bytes_}, but the file has {size}; "
                    "it is truncated, fetch it again."
                )
            tensors[name] = GgufTensor(name, kind, shape, dimensions, offset, bytes_)
        end, last = self.data_offset, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise MalformedFile(f"The tensors '{last}' and '{tensor.name}' overlap.")
            end, last = tensor.offset + tensor.bytes, tensor.name
        return tensors

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only, uncopied; release it before close()."""
        tensor = self.tensors[name]
        return self._view[tensor.offset : tensor.offset + tensor.bytes]

    def encoded(self, key: str) -> bytes:
        """Type and value of a metadata key as the file has them, for GgufWriter.add_encoded."""
        start, end = self._extents[key]
        return bytes(self._view[start:end])

    def header_sha256(self) -> str:
        """SHA-256 of everything before the tensors' bytes: metadata and tensor descriptions."""
        return hashlib.sha256(self._view[: self.header_bytes]).hexdigest()

    def close(self) -> None:
        self._view.release()
        self._map.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map_file(path: Path) -> mmap.mmap:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelNotFound(f"There is no file {path}.") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.", param="source") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadRequest(f"{path} is not a regular file.", param="source")
        if status.st_size < 24:
            raise MalformedFile(f"{path} has {status.st_size} bytes, fewer than the smallest GGUF file.")
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.", param="source") from None
    finally:
        os.close(descriptor)


def _check_version(buffer: mmap.mmap) -> None:
    magic = buffer[:4]
    if magic != MAGIC:
        raise MalformedFile(f"This is not a GGUF file: it begins with '{_printable(magic)}' instead of 'GGUF'.")
    raw = buffer[4:8]
    if int.from_bytes(raw, "big") in (1, *VERSIONS):
        raise UnsupportedModel("This GGUF file is big-endian; VAI reads little-endian ones.")
    version = int.from_bytes(raw, "little")
    if version not in VERSIONS:
        raise UnsupportedModel(f"This GGUF file has version {version}; VAI reads versions 2 and 3. Convert it anew.")


class GgufWriter:
    """Writes a GGUF v3 file without holding its tensors in memory.

    Order of use: `add` metadata, `declare` every tensor, `write` their bytes in the order declared (a tensor may come
    in several pieces), `close`. The file appears under its name at close(); left by an exception it leaves nothing.
    Wrong use raises ValueError.
    """

    def __init__(self, path: Path, *, alignment: int = DEFAULT_ALIGNMENT) -> None:
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment} is not a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._alignment = alignment
        self._keys: dict[str, bytes] = {}
        self._tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        self._pending: list[int] = []  # bytes still owed by each tensor, known once the header is written
        self._started = False
        self._current = 0
        self._file: BinaryIO = self._partial.open("wb", buffering=1 << 20)
        if alignment != DEFAULT_ALIGNMENT:
            self.add("general.alignment", alignment, ValueType.UINT32)

    def add(self, key: str, value: Scalar | Sequence[Scalar], type: ValueType) -> None:
        """One metadata value; a sequence is written as an array of `type`."""
        encode = _encoder(type)
        if isinstance(value, str | int | float):
            body = _U32.pack(type) + encode(value)
        else:
            body = _U32.pack(ValueType.ARRAY) + _U32.pack(type) + _U64.pack(len(value))
            body += b"".join(map(encode, value))
        self.add_encoded(key, body)

    def add_encoded(self, key: str, body: bytes) -> None:
        """One metadata value as another file has it: GgufFile.encoded."""
        if self._started:
            raise ValueError("metadata comes before tensor bytes")
        if key in self._keys:
            raise ValueError(f"key {key} is there already")
        self._keys[key] = body

    def declare(self, name: str, type: str, shape: tuple[int, ...]) -> None:
        """A tensor of `shape` (rows, columns), or (n,) for a vector; `type` is a key of TENSOR_TYPES."""
        if self._started:
            raise ValueError("tensors are declared before tensor bytes")
        if name in self._tensors or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"tensor name {name} is there already, empty or too long")
        if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
            raise ValueError(f"shape {shape} of {name} is impossible")
        self._tensors[name] = (type, shape, tensor_bytes(type, (math.prod(shape[:-1]), shape[-1])))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the tensor that is due; a piece never spans two tensors. Any contiguous buffer will do."""
        self._write_header()
        view = memoryview(data).cast("B")
        if self._current == len(self._pending) or len(view) > self._pending[self._current]:
            raise ValueError(f"{len(view)} bytes are more than the tensors declared")
        self._file.write(view)
        self._pending[self._current] -= len(view)
        if self._pending[self._current] == 0:
            self._pad()
            self._current += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. Raises ValueError where tensor bytes are missing."""
        if self._file.closed:
            return
        self._write_header()
        if self._current < len(self._pending):
            raise ValueError(f"tensor {list(self._tensors)[self._current]} lacks {self._pending[self._current]} bytes")
        self._file.close()
        self._partial.replace(self._path)

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % self._alignment))

    def _write_header(self) -> None:
        if self._started:
            return
        self._started = True
        out = [MAGIC, _U32.pack(3), _U64.pack(len(self._tensors)), _U64.pack(len(self._keys))]
        for key, body in self._keys.items():
            out += [_string(key), body]
        offset = 0
        for name, (kind, shape, size) in self._tensors.items():
            out += [_string(name), _U32.pack(len(shape)), *(_U64.pack(extent) for extent in reversed(shape))]
            out += [_U32.pack(TENSOR_TYPES[kind].number), _U64.pack(offset)]
            offset += -(-size // self._alignment) * self._alignment
        self._file.write(b"".join(out))
        self._pad()
        self._pending = [size for _, _, size in self._tensors.values()]

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            if not self._file.closed:
                self._file.close()
                self._partial.unlink(missing_ok=True)


def _string(text: str) -> bytes:
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _encoder(kind: ValueType) -> Callable[[Scalar], bytes]:
    if kind == ValueType.STRING:
        return lambda value: _string(str(value))
    pack = _SCALARS[kind].pack
    return lambda value: pack(value)
