"""What an answer's bits depend on, as one short text: OpenAI's `system_fingerprint`.

Those of an answer with fast pages depend on what computed them too, and on which they are: the one is named here, the
other is in its `page_kinds`.
"""

from __future__ import annotations

from hashlib import sha256

import msgspec

from vai.kernels.program import KERNEL_ABI, Program


def fingerprint(weights: str, program: Program, kv_type: str) -> str:
    """Weights, program, kernel ABI and KV type, as in "vai-0123456789ab-0123456789ab-1-bf16".

    The same wherever and whenever an engine runs the same model to the same bits; `weights` is the image's weights id.
    """
    return f"vai-{weights[:12]}-{program_id(program)[:12]}-{KERNEL_ABI}-{kv_type}"


def with_fast_pages(name: str, fast: str) -> str:
    """The fingerprint of an answer some of whose pages the implementation `fast` has computed, as in "vai-...-amx"."""
    return f"{name}-{fast}"


def program_id(program: Program) -> str:
    """SHA-256 over everything that a Program says, in a canonical form."""
    said = (
        [(type(op).__name__, op) for op in program.ops],
        program.groups,
        sorted(program.outputs.items()),
        sorted(program.constants.items()),
        (program.width, program.vocabulary, program.context),
    )
    return sha256(msgspec.json.encode(said)).hexdigest()
