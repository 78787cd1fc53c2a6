"""Types of the native packers (csrc/burn/module.cc)."""

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
