"""Which implementation runs what: the one place where the executors meet.

Everything is chosen once, when a Program is lowered; `implementations` says what was chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.errors import BadRequest, NotSupported, Unavailable
from vai.kernels import _native, native, reference
from vai.kernels.ops import Embed, Linear
from vai.kernels.program import Adjustments, Masks, Plan, Program, SampleArgs, Sampled
from vai.request import MAX_LOGPROBS
from vai.rom.image import BLOCK_ROWS, BLOCK_TYPES, CHUNK, Part, StoredTensor, TensorTable, place, tensor_bytes
from vai.rom.view import Image

BACKENDS = ("native", "reference")
MAX_THREADS = 1024
NO_TOKEN = -1  # of a row that cannot be sampled
# Operations too small a part of a step to have more than the portable implementation.
PORTABLE = ("embed", "angles", "rope", "kv_write", "rows")
PORTABLE_FAST = "portable"
SAME_BITS = (PORTABLE_FAST, "amx")  # fast kinds of one specification: what one has computed another computes again
VECTORIZED = ("norm", "quantize", "linear", "gated", "glu", "attention", "sample")
# Another one with tiles for integers, in some operations, which pay on some machines only: tuning.py says where.
TILES, TILES_OVER, TILED = "amx", "avx512", ("linear", "gated")

Workers = _native.Workers


def isas() -> list[str]:
    """The instruction sets this machine has implementations for, the best one last."""
    return _native.isas()


def isa() -> str:
    """The instruction set that is used when none is asked for, and nobody knows of a faster one."""
    return next(name for name in reversed(isas()) if name != TILES)


def refused() -> list[tuple[str, str]]:
    """(instruction set, reason): what the processor promises and a self-test found that it does not keep.

    The test runs once a process, in a child of its own, so that an instruction that faults ends nothing else.
    """
    return _native.refused_isas()


def self_test(name: str) -> str:
    """What is wrong with an instruction set on this machine, asked for or not; "" where it gives the portable bits."""
    return _native.self_test(name)


def fasts() -> list[str]:
    """What this machine has to compute steps of the fast kind with. "portable" is slow, and there for tests."""
    return _native.fasts()


def refused_fasts() -> list[tuple[str, str]]:
    """(fast kind, reason), as `refused` says of instruction sets."""
    return _native.refused_fasts()


def fast(wanted: str | None) -> str | None:
    """The fast kind that `wanted` means: "off" and None where there is none worth having, else one of `fasts()`.

    None: the best of this machine that is faster than the exact kind. Raises NotSupported.
    """
    if wanted == "off":
        return None
    if wanted is None:
        return next((name for name in reversed(fasts()) if name != PORTABLE_FAST), None)
    return _known_fast(wanted)


def implementations(name: str | None = None) -> dict[str, str]:
    """Operation -> implementation under instruction set `name`, or the default one. Raises NotSupported."""
    chosen = _known(name)
    found = {**dict.fromkeys(VECTORIZED, chosen), **dict.fromkeys(PORTABLE, "scalar")}
    return found | dict.fromkeys(set(VECTORIZED) - set(TILED), TILES_OVER) if chosen == TILES else found


def make_workers(threads: int, lease: Path | None = None) -> Workers:
    """The thread pool that all plans of a process share. Make it after any fork: threads do not survive one.

    `lease`: a file, made if absent, through which the processes that name it take turns on the cores, a step each.
    Raises BadRequest for fewer than 1 or more than 1,024, Unavailable where the machine gives no more threads.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise BadRequest(f"The kernels run on 1 to {MAX_THREADS} threads, not on {threads}.")
    try:
        return _native.Workers(threads, "" if lease is None else str(lease))
    except RuntimeError as error:
        raise Unavailable(f"The machine gives no {threads} threads ({error}); ask for fewer.") from error


def lower(
    program: Program,
    image: Image,
    *,
    backend: str = "native",
    kv_type: str = "bf16",
    max_rows: int,
    max_sequences: int,
    workers: Workers,
    isa: str | None = None,
    fast: str | None = None,
) -> Plan:
    """Lower `program` over `image` for steps of at most `max_rows` rows, of which at most `max_sequences` give results.

    `fast`: one of `fasts()`, which computes steps of the fast kind; None: there are none.
    Raises NotSupported for an unknown backend, instruction set, fast kind or KV type, UnsupportedModel for a missing
    operation, CorruptImage where image and Program disagree.
    """
    if backend not in BACKENDS:
        raise NotSupported(f"There is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "reference":
        return reference.ReferencePlan(
            program, image, kv_type=kv_type, max_rows=max_rows, max_sequences=max_sequences, fast=fast
        )
    return native.lower(
        program,
        image,
        kv_type=kv_type,
        max_rows=max_rows,
        max_sequences=max_sequences,
        workers=workers,
        isa=_known(isa),
        fast=_known_fast(fast),
    )


def workspace_bytes(
    program: Program, table: TensorTable, *, max_rows: int, max_sequences: int, threads: int, fast: str | None = None
) -> int:
    """The exact `workspace_bytes` of the native Plan that `lower` would make, before there is an image.

    Raises UnsupportedModel for a missing operation, CorruptImage where table and Program disagree.
    """
    return native.workspace_bytes(
        program, table, max_rows=max_rows, max_sequences=max_sequences, threads=threads, fast=fast
    )


def block_types() -> list[str]:
    """The types of matrices that the native executor reads; the slow ones come last."""
    return sorted(native.TYPE_CODES, key=lambda name: BLOCK_TYPES[name].slow)


def fast_types() -> list[str]:
    """The types that are read in a layout of their own."""
    return [name for name in native.TYPE_CODES if not BLOCK_TYPES[name].slow]


def fast_kind_types() -> list[str]:
    """Of those, the types whose linear layers a fast step computes in the fast kind."""
    return [name for name in fast_types() if name not in native.NO_FAST]


def lower_linear(
    type: str,
    rows: int,
    columns: int,
    data: memoryview,
    *,
    max_rows: int,
    workers: Workers,
    isa: str | None = None,
    fast: str | None = None,
    copies: int = 1,
) -> Plan:
    """A Plan of one linear layer with `rows` outputs over whatever `data` holds: there to be timed.

    Its 16 token ids are embedded from F32 rows before the weights. `copies`: so many layers, one after the other, each
    with weights of its own. Raises BadRequest where `data` is too short, NotSupported.
    """
    sizes = [tensor_bytes("F32", BLOCK_ROWS, columns), *[tensor_bytes(type, rows, columns)] * copies]
    offsets, end = place(sizes)
    if offsets[-1] + sizes[-1] > len(data):
        raise BadRequest(f"A linear layer of {offsets[-1] + sizes[-1]} bytes does not fit {len(data)} bytes.")
    layers = [f"output.{copy}.weight" for copy in range(copies)]
    shapes = (("token_embd.weight", "F32", BLOCK_ROWS), *((name, type, rows) for name in layers))
    stored = [
        StoredTensor(name, kind, count, columns, offset, size, (Part(name, count, 0, 1),))
        for (name, kind, count), offset, size in zip(shapes, offsets, sizes, strict=True)
    ]
    program = Program(
        ops=(Embed("x", "token_embd.weight"), *(Linear(name, "x", name) for name in layers)),
        groups=(),
        outputs={"logits": layers[-1]},
        constants={name: (count, columns) for name, _, count in shapes},
        width=columns,
        vocabulary=BLOCK_ROWS,
        context=max_rows,
    )
    weights = _Weights(TensorTable(end, [bytes(32)] * -(-end // CHUNK), stored), data)
    return native.lower(
        program,
        weights,
        kv_type="bf16",
        max_rows=max_rows,
        max_sequences=1,
        workers=workers,
        isa=_known(isa),
        fast=_known_fast(fast),
    )


class _Weights(NamedTuple):
    table: TensorTable
    data: memoryview


def sample(
    logits: NDArray[np.float32], args: SampleArgs, *, isa: str | None = None, workers: Workers | None = None
) -> Sampled:
    """Draw one token for each row of logits [R, vocabulary], in one native call with the interpreter lock released.

    `workers`: whose threads share the rows out among them; None: the caller's does it alone.
    A row that holds a NaN, or nothing finite, gets NO_TOKEN: its request must end, no other is touched. Raises
    NotSupported for an unknown instruction set.
    """
    rows = len(logits)
    adjustments = args.adjustments or Adjustments.neutral(rows)
    masks = args.masks or Masks(np.zeros((0, -(-logits.shape[1] // 8)), np.uint8), np.full(rows, -1, np.int32))
    sampled = Sampled(
        tokens=np.full(rows, NO_TOKEN, np.int32),
        logprob=np.full(rows, np.nan, np.float32),
        top_ids=np.full((rows, MAX_LOGPROBS), NO_TOKEN, np.int32),
        top_logprobs=np.full((rows, MAX_LOGPROBS), np.nan, np.float32),
    )
    _native.sample(
        isa=_known(isa),
        workers=workers,
        logits=logits,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        choice=args.choice,
        position=args.position,
        logprobs=args.logprobs,
        repetition=adjustments.repetition,
        presence=adjustments.presence,
        frequency=adjustments.frequency,
        bias_start=adjustments.bias_start,
        bias_ids=adjustments.bias_ids,
        biases=adjustments.biases,
        seen_start=adjustments.seen_start,
        seen_ids=adjustments.seen_ids,
        made=adjustments.made,
        masks=masks.bits,
        mask_of=masks.of,
        tokens=sampled.tokens,
        logprob=sampled.logprob,
        top_ids=sampled.top_ids,
        top_logprobs=sampled.top_logprobs,
    )
    return sampled


def _known(name: str | None) -> str:
    if name is None:
        return isa()
    if name not in isas():
        raise NotSupported(f"This machine cannot run the {name!r} kernels; it has {', '.join(isas())}.")
    return name


def _known_fast(name: str | None) -> str | None:
    if name is not None and name not in fasts():
        raise NotSupported(f"This machine has no fast kind {name!r}; it has {', '.join(fasts())}.")
    return name
