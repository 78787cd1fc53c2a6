"""Hostile GGUF files: whatever they say, the answer is a typed error, soon and in little memory, or a true burn."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vai.burn.burn import burn
from vai.burn.gguf import MAX_ELEMENTS, GgufFile, ValueType
from vai.burn.synth import synthesize
from vai.errors import BadRequest, MalformedFile, ModelNotFound, UnsupportedModel, VaiError

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
HUGE = (1 << 64) - 1


def text(raw: bytes | str, length: int | None = None) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return U64(len(raw) if length is None else length) + raw


def key(name: bytes | str, kind: int, body: bytes) -> bytes:
    return text(name) + U32(kind) + body


def array(kind: int, count: int, body: bytes) -> bytes:
    return U32(kind) + U64(count) + body


def tensor(
    name: bytes | str, shape: Sequence[int], kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    sizes = b"".join(map(U64, shape))
    return text(name) + U32(len(shape) if dimensions is None else dimensions) + sizes + U32(kind) + U64(offset)


def file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: bytes = U32(3),
    key_count: int | None = None,
    tensor_count: int | None = None,
    data: bytes = bytes(256),
    alignment: int = 32,
) -> bytes:
    """A GGUF file, true to the format wherever it is not told otherwise."""
    head = magic + version + U64(len(tensors) if tensor_count is None else tensor_count)
    head += U64(len(keys) if key_count is None else key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


A = key("a", ValueType.UINT32, U32(7))
T = tensor("t", (8, 8))
GOOD = file([A], [T])

FAULTS: dict[str, tuple[bytes, type[VaiError], str]] = {
    "empty file": (b"", MalformedFile, "smallest GGUF"),
    "only the magic": (b"GGUF", MalformedFile, "smallest GGUF"),
    "wrong magic": (file(magic=b"GGML"), MalformedFile, "begins with 'GGML'"),
    "magic of control characters": (file(magic=b"\x1b[2J"), MalformedFile, "not a GGUF"),
    "version 1": (file(version=U32(1)), UnsupportedModel, "version 1"),
    "version of the future": (file(version=U32(4)), UnsupportedModel, "version 4"),
    "big-endian": (file(version=struct.pack(">I", 3)), UnsupportedModel, "big-endian"),
    "key count -1": (file([A], [T], key_count=HUGE), MalformedFile, "metadata keys"),
    "key count one too many": (file([A], [], key_count=2, data=b""), MalformedFile, "key 1 is empty"),
    "tensor count -1": (file([A], [T], tensor_count=HUGE), MalformedFile, "tensors"),
    "tensor count beyond the file": (file([A], [T], tensor_count=1 << 20), MalformedFile, "tensors"),
    "key longer than the file": (file([text(b"a", 1 << 40)]), MalformedFile, "the limit is 65535"),
    "key of length -1": (file([text(b"a", HUGE)]), MalformedFile, "bytes"),
    "empty key": (file([key("", 4, U32(1))]), MalformedFile, "empty"),
    "key with control characters": (file([key("a\x1b[31m\x00", 4, U32(1))]), MalformedFile, "cannot be printed"),
    "key that is not UTF-8": (file([key(b"\xff\xfe", 4, U32(1))]), MalformedFile, "UTF-8"),
    "key twice": (file([A, A]), MalformedFile, "'a' is there twice"),
    "unknown value type": (file([key("a", 13, U32(1))]), MalformedFile, "unknown value type, 13"),
    "boolean of 2": (file([key("a", ValueType.BOOL, b"\2")]), MalformedFile, "boolean"),
    "string longer than the file": (file([key("a", 8, text("x", 1 << 20))]), MalformedFile, "left in the header"),
    "string of length -1": (file([key("a", 8, text("x", HUGE))]), MalformedFile, "the limit is"),
    "string that is not UTF-8": (file([key("a", 8, text(b"\xc3\x28"))]), MalformedFile, "UTF-8"),
    "string with a lone surrogate": (file([key("a", 8, text(b"\xed\xa0\x80"))]), MalformedFile, "UTF-8"),
    "array of arrays": (file([key("a", 9, array(9, 1, array(4, 1, U32(1))))]), UnsupportedModel, "array of arrays"),
    "array of an unknown type": (file([key("a", 9, array(77, 1, U32(1)))]), MalformedFile, "unknown value type, 77"),
    "array count -1": (file([key("a", 9, array(4, HUGE, b""))]), MalformedFile, "room for"),
    "array count whose size wraps": (file([key("a", 9, array(10, 1 << 61, b""))]), MalformedFile, "room for"),
    "array of strings, count -1": (file([key("a", 9, array(8, HUGE, b""))]), MalformedFile, "room for"),
    "string in an array too long": (
        file([key("a", 9, array(8, 2, text("x") + text("y", 1 << 50)))]),
        MalformedFile,
        "more than there are",
    ),
    "array of booleans with 3": (file([key("a", 9, array(7, 2, b"\1\3"))]), MalformedFile, "0 and 1"),
    "alignment 0": (file([key("general.alignment", 4, U32(0))]), MalformedFile, "power of two"),
    "alignment 33": (file([key("general.alignment", 4, U32(33))]), MalformedFile, "power of two"),
    "alignment 2^31": (file([key("general.alignment", 4, U32(1 << 31))]), MalformedFile, "power of two"),
    "alignment that is a text": (file([key("general.alignment", 8, text("32"))]), MalformedFile, "32-bit"),
    "alignment of 64 bits": (file([key("general.alignment", 10, U64(32))]), MalformedFile, "32-bit"),
    "split file": (file([key("split.count", 2, b"\3\0")], [T]), UnsupportedModel, "3 pieces"),
    "split count that is a text": (file([key("split.count", 8, text("3"))]), MalformedFile, "split.count"),
    "no dimensions": (file([], [tensor("t", ())]), MalformedFile, "0 dimensions"),
    "five dimensions": (file([], [tensor("t", (2, 2, 2, 2, 2))]), MalformedFile, "5 dimensions"),
    "2^32 - 1 dimensions": (file([], [tensor("t", (8, 8), dimensions=(1 << 32) - 1)]), MalformedFile, "dimensions"),
    "dimension 0": (file([], [tensor("t", (8, 0))]), MalformedFile, "impossible shape"),
    "dimension -1": (file([], [tensor("t", (8, HUGE))]), MalformedFile, "impossible shape"),
    "shape whose product wraps to 0": (file([], [tensor("t", (1 << 32, 1 << 32))]), MalformedFile, "impossible shape"),
    "shape whose bytes wrap": (file([], [tensor("t", (1 << 31, 1 << 31, 4))]), MalformedFile, "impossible shape"),
    "shape larger than the file": (file([], [tensor("t", (1 << 20, 1 << 20))]), MalformedFile, "truncated"),
    "columns that are no whole block": (file([], [tensor("t", (33, 1), kind=2)]), MalformedFile, "whole Q4_0 blocks"),
    "unknown tensor type": (file([], [tensor("t", (8, 8), kind=99)]), MalformedFile, "unknown tensor type, 99"),
    "tensor type Q8_K": (file([], [tensor("t", (256, 1), kind=15)]), UnsupportedModel, "Q8_K"),
    "tensor type I32": (file([], [tensor("t", (8, 8), kind=26)]), UnsupportedModel, "I32"),
    "tensor type that was withdrawn": (file([], [tensor("t", (32, 4), kind=31)]), UnsupportedModel, "Q4_0_4_4"),
    "offset not aligned": (file([], [tensor("t", (4, 1), offset=16)]), MalformedFile, "not a multiple of 32"),
    "offset past the end": (file([], [tensor("t", (8, 8), offset=1 << 20)]), MalformedFile, "truncated"),
    "offset that wraps": (file([], [tensor("t", (8, 8), offset=(1 << 64) - 32)]), MalformedFile, "truncated"),
    "last byte missing": (file([], [T])[:-1], MalformedFile, "truncated"),
    "tensors overlap": (file([], [tensor("s", (8, 7)), tensor("t", (8, 1), offset=192)]), MalformedFile, "overlap"),
    "tensors on one another": (file([], [tensor("s", (8, 8)), T]), MalformedFile, "overlap"),
    "tensor twice": (file([], [T, T]), MalformedFile, "'t' is there twice"),
    "tensor name of 65 bytes": (file([], [tensor("t" * 65, (8, 8))]), MalformedFile, "the limit is 64"),
    "tensor name with control characters": (file([], [tensor("t\r\n", (8, 8))]), MalformedFile, "cannot be printed"),
    "empty tensor name": (file([], [tensor("", (8, 8))]), MalformedFile, "empty"),
    "file ends in a key": (GOOD[:30], MalformedFile, "more than fit"),
    "file ends in a tensor": (GOOD[:60], MalformedFile, "truncated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    raw, error, message = FAULTS[fault]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=message) as caught:
        GgufFile(path)
    assert type(caught.value) is error
    assert caught.value.message.isprintable(), "a message must not carry the file's control characters"


def test_the_file_the_faults_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    with GgufFile(path) as gguf:
        assert gguf.metadata == {"a": 7}
        assert gguf.tensors["t"].shape == (8, 8)


@pytest.mark.parametrize("cut", [*range(24, 96), 200, 300])
def test_a_file_cut_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOOD[:cut])
    with pytest.raises(MalformedFile):
        GgufFile(path)


def test_a_missing_an_unreadable_and_a_strange_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(BadRequest, match="not a regular file"):
        GgufFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadRequest, match="not a regular file"):
        GgufFile(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadRequest, match="cannot be read"):
        GgufFile(tmp_path / "loop")


def cost(work: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds and peak bytes of what `work` allocates."""
    tracemalloc.start()
    try:
        before = time.process_time()
        work()
        return time.process_time() - before, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(path: Path) -> None:
    with pytest.raises(VaiError):
        GgufFile(path)


def test_no_fault_costs_time_or_memory(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    for fault, (raw, _, _) in FAULTS.items():
        path.write_bytes(raw)
        seconds, peak = cost(lambda: refuse(path))
        assert peak < 1 << 20, fault
        assert seconds < 1, fault


def test_arrays_that_would_fill_memory_are_refused_before_they_are_made(tmp_path: Path) -> None:
    """A sparse file of 1 GiB that says it holds 2^27 empty strings: 8 bytes each in the file, more in memory."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(file([key("a", 9, array(8, 1 << 23, b""))], data=b""))
    os.truncate(path, 1 << 30)
    seconds, peak = cost(lambda: refuse(path))
    assert peak < 1 << 20
    assert seconds < 1
    many = [key(f"k{index}", 9, array(0, MAX_ELEMENTS // 2, bytes(MAX_ELEMENTS // 2))) for index in range(3)]
    path.write_bytes(file(many))
    with pytest.raises(MalformedFile, match="the limit"):
        GgufFile(path)


# --- mutations --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    synthesize(path, shape="tiny", type="Q4_0")
    return path.read_bytes()


EXTREMES = [U64(value) for value in (0, 1, 31, 1 << 20, 1 << 31, 1 << 32, 1 << 62, 1 << 63, HUGE)]
MUTATION = st.one_of(
    st.tuples(st.just("bit"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("number"), st.floats(0, 1, exclude_max=True), st.sampled_from(EXTREMES)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("repeat"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
)


def mutate(raw: bytes, end: int, mutations: Sequence[tuple[str, float, object]]) -> bytes:
    """`raw` with faults in its first `end` bytes."""
    out = bytearray(raw)
    for what, where, how in mutations:
        at = int(where * min(end, len(out)))
        if what == "bit" and isinstance(how, int) and at < len(out):
            out[at] ^= 1 << how
        elif what == "number" and isinstance(how, bytes):
            out[at : at + len(how)] = how
        elif what == "cut":
            del out[at:]
        elif isinstance(how, int):
            out[at:at] = out[at : at + how]
    return bytes(out)


LENIENT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(LENIENT, max_examples=400)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), whole=st.booleans())
def test_a_mutated_header_is_read_or_refused(
    mutations: list[tuple[str, float, object]], whole: bool, tmp_path: Path
) -> None:
    keys = [
        key("general.architecture", 8, text("llama")),
        key("n", 4, U32(3)),
        key("list", 9, array(8, 3, text("one") + text("two") + text("three"))),
        key("numbers", 9, array(6, 2, bytes(8))),
    ]
    raw = file(keys, [tensor("s", (8, 4)), tensor("t", (32, 2), kind=2, offset=128)])
    path = tmp_path / "mutant.gguf"
    path.write_bytes(mutate(raw, len(raw) if whole else len(raw) - 256, mutations))
    try:
        with GgufFile(path) as gguf:
            for name, found in gguf.tensors.items():
                assert len(gguf.data(name)) == found.bytes
    except VaiError as error:
        assert error.message.isprintable()


@settings(LENIENT, max_examples=60)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=3))
def test_a_mutated_checkpoint_is_burned_or_refused_and_leaves_no_partial(
    mutations: list[tuple[str, float, object]], tiny: bytes, tmp_path: Path
) -> None:
    header = len(tiny) // 8  # metadata, tokenizer and tensor descriptions: mutations in the weights are no faults
    path, root = tmp_path / "mutant.gguf", tmp_path / "root"
    path.write_bytes(mutate(tiny, header, mutations))
    try:
        burn(path, root)
    except VaiError as error:
        assert error.message
    left = list((root / "images").glob("*")) + list((root / "images").glob(".*")) if root.exists() else []
    assert not [entry for entry in left if entry.suffix != ".rom"]
    for entry in left:
        entry.unlink()
