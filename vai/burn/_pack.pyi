"""Types of the burner's native code (csrc/burn/module.cc)."""

from mmap import mmap

def fill(
    type: str,
    vector: bool,
    source: memoryview | bytes,
    rows: int,
    columns: int,
    first_block: int,
    block_step: int,
    start: int,
    window: memoryview | bytearray,
) -> bool: ...
def proved(
    type: str,
    vector: bool,
    source: memoryview | bytes,
    rows: int,
    columns: int,
    first_block: int,
    block_step: int,
    stored: memoryview | bytes,
) -> bool: ...
def unpack(
    type: str,
    vector: bool,
    stored: memoryview | bytes,
    rows: int,
    columns: int,
    first_block: int,
    block_step: int,
) -> bytes: ...
def can_hash() -> bool: ...
def hash_each(data: memoryview | bytes, piece: int) -> bytes: ...
def strings(
    buffer: memoryview | bytes | mmap, position: int, end: int, count: int, limit: int
) -> tuple[list[str], int]: ...
