"""Toy images for the tests of rom, and the processes these tests need. Standard library only, like rom itself.

As a script: `rom_toy.py ROLE ROOT [ARGUMENT]` does one thing, prints a line when it is where the test wants it, and
waits for a line (or the end) of its standard input.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve()
REPOSITORY = SCRIPT.parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from vai.rom import image as form  # noqa: E402 - a script has to find the package first
from vai.rom import segment  # noqa: E402 - as above
from vai.rom.image import Part, StoredTensor, TensorTable  # noqa: E402 - as above

Start = Callable[[str, Path, str], "subprocess.Popen[str]"]  # the fixture `start`: role, root, argument


def stored(specification: list[tuple[str, str, int, int, list[tuple[str, int, int, int]]]]) -> tuple[list, int]:
    """(name, type, rows, columns, parts) each -> stored tensors where the layout puts them, and the data's bytes."""
    sizes = [form.tensor_bytes(kind, rows, columns) for _, kind, rows, columns, _ in specification]
    offsets, data_bytes = form.place(sizes)
    return [
        StoredTensor(name, kind, rows, columns, offset, size, tuple(Part(*p) for p in parts))
        for (name, kind, rows, columns, parts), offset, size in zip(specification, offsets, sizes, strict=True)
    ], data_bytes


def toy_tensors(scale: int = 1) -> tuple[list[StoredTensor], int]:
    """4.4 MiB (times `scale`) in five tensors and two chunks, fused both ways, with small ones between."""
    return stored(
        [
            ("token_embd.weight", "Q8_0", 1280 * scale, 2048, [("token_embd.weight", 1280 * scale, 0, 1)]),
            ("blk.0.attn_norm.weight", form.VECTOR, 64, 1, [("blk.0.attn_norm.weight", 60, 0, 1)]),
            (
                "blk.0.attn_qkv.weight",
                "Q4_0",
                96 * 16 * scale,
                2048,
                [
                    ("blk.0.attn_q.weight", 64 * 16 * scale - 3, 0, 1),
                    ("blk.0.attn_k.weight", 16 * 16 * scale, 64 * scale, 1),
                    ("blk.0.attn_v.weight", 16 * 16 * scale - 15, 80 * scale, 1),
                ],
            ),
            (
                "blk.0.ffn_gate_up.weight",
                "F16",
                64,
                100,
                [("blk.0.ffn_gate.weight", 30, 0, 2), ("blk.0.ffn_up.weight", 30, 1, 2)],
            ),
            ("output_norm.weight", form.VECTOR, 64, 1, [("output_norm.weight", 60, 0, 1)]),
        ]
    )


def sections(
    data: memoryview | bytes, tensors: list[StoredTensor], data_bytes: int, /, **changed: bytes
) -> dict[str, bytes]:
    """The six sections of a toy, hashed from its data; empty data gives hashes of zeros, of the final length."""
    count = -(-data_bytes // form.CHUNK)
    chunks = [
        hashlib.sha256(data[i * form.CHUNK : (i + 1) * form.CHUNK]).digest() if data else bytes(32)
        for i in range(count)
    ]
    made = {
        "tensors": TensorTable(data_bytes, chunks, tensors).to_bytes(),
        "spec": form.canonical_json({"architecture": "toy"}),
        "tokenizer": b'{"model":"toy"}' * 1000,
        "template": b'{"chat_template":null}',
        "defaults": b"{}",
        "provenance": b'{"format":"toy"}',
    }
    return {**made, **changed}


def burn(
    root: Path, seed: int = 0, scale: int = 1, announce: object = None, huge_pages: bool = True, **changed: bytes
) -> str:
    """Burn a toy with random weights of this seed; the digest. `announce(point)` is called on the way."""
    say = announce if callable(announce) else lambda point: None
    tensors, data_bytes = toy_tensors(scale)
    said = sum(map(len, sections(b"", tensors, data_bytes, **changed).values()))
    with segment.Partial(root, data_bytes=data_bytes, section_bytes=said, huge_pages=huge_pages) as partial:
        say("allocated")
        weights = random.Random(seed)
        for tensor in tensors:
            partial.data[tensor.offset : tensor.offset + tensor.bytes] = weights.randbytes(tensor.bytes)
            say("half written")
        made = sections(partial.data, tensors, data_bytes, **changed)
        say("before publish")
        digest = partial.publish(made, burn_seconds=0.5)
        say("published")
    return digest


# --- roles of a process -----------------------------------------------------------------------------------------------


def _pause(point: str) -> None:
    print(point, flush=True)
    sys.stdin.readline()


def burner(root: Path, stop: str) -> None:
    """Burn, and stop at a named point. Two points lie inside a library call, which is wrapped to stop there."""

    def announce(point: str) -> None:
        if point == stop:
            _pause(point)

    if stop == "first step allocated":
        allocate = os.posix_fallocate
        segment.ALLOCATION_STEP = 1 << 20

        def stepwise(fd: int, offset: int, length: int) -> None:
            allocate(fd, offset, length)
            announce("first step allocated")

        os.posix_fallocate = stepwise
    if stop == "linked":
        link = os.link

        def linked(*args: object, **options: object) -> None:
            link(*args, **options)
            announce("linked")

        os.link = linked
    print(burn(root, announce=announce), flush=True)


def reader(root: Path, digest: str) -> None:
    """Attach and hold the lease; afterwards say the hash of the data."""
    with segment.attach(root, digest) as image:
        _pause("attached")
        print(hashlib.sha256(image.data).hexdigest(), flush=True)
        _pause("hashed")


def forker(root: Path, digest: str) -> None:
    """Attach, fork, and let the child try; the parent gives its lease back and leaves the child alive."""
    image = segment.attach(root, digest)
    view = image.data
    child = os.fork()
    if child == 0:
        for attempt in (lambda: image.data, lambda: image.section("spec"), lambda: image.tensor("output_norm.weight")):
            try:
                attempt()
                print("worked", flush=True)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
        _pause(f"child still reads {len(bytes(view[:4096]))}")
        os._exit(0)
    sys.stdin.close()
    del view
    image.close()
    os.waitpid(child, 0)


def memory(root: Path, digest: str) -> None:
    """Print the growth of RssAnon, in bytes, from before an attach to all pages touched."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10

    before = anonymous()
    with segment.attach(root, digest) as image:
        bytes(image.data[::4096])
        print(anonymous() - before, flush=True)


def room(root: Path, scale: str) -> None:
    """Print the room, then try to burn a toy; print its digest or the error, then what lies in images."""
    print(segment.free_room(root), flush=True)
    try:
        print(burn(root, scale=int(scale)), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    print(sorted(path.name for path in (root / "images").iterdir()), flush=True)


def oversized(root: Path, scale: str) -> None:
    """Print what burning a toy says whose sections are much larger than was said."""
    tensors, data_bytes = toy_tensors(int(scale))
    try:
        with segment.Partial(root, data_bytes=data_bytes, section_bytes=0) as partial:
            print("allocated", flush=True)
            partial.publish(sections(partial.data, tensors, data_bytes, template=bytes(64 << 20)), burn_seconds=0.5)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    print(sorted(path.name for path in (root / "images").iterdir()), flush=True)


if __name__ == "__main__":
    role = {
        "burner": burner,
        "reader": reader,
        "forker": forker,
        "memory": memory,
        "room": room,
        "oversized": oversized,
    }[sys.argv[1]]
    role(Path(sys.argv[2]), sys.argv[3])
