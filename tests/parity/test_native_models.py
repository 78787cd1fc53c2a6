"""Whole models: the native executor equals the reference bit for bit, whatever company a row keeps.

Every model is driven through a prompt in one piece and in chunks, decoding, and steps that mix both over several
sequences; logits and pages are compared after each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import table
from vai.kernels.program import KV_TYPES, PAGE_TOKENS, Plan, Program, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.view import Image

Burned = Callable[[str, str], Image]
MODELS = [(shape, type) for shape in ("tiny", "tiny-qwen2") for type in ("Q4_0", "Q8_0", "F16", "F32")]
# Some layers have q, k and v of one type, some do not; in the last, columns that are no whole blocks of 256.
MIXED = [
    ("tiny-256", "Q4_K_M"),
    ("tiny-256", "Q5_K_M"),
    ("tiny-256", "Q6_K"),
    ("tiny-qwen2", "Q5_K_M"),
    ("tiny", "Q4_1"),
    ("tiny-qwen3", "Q4_0"),
    ("tiny-qwen3", "F32"),
    ("tiny", "IQ4_NL"),
    ("tiny-256", "IQ4_XS"),
    ("tiny-qwen2", "MXFP4"),
    ("tiny-256", "IQ2_S"),
    ("tiny-gemma2", "Q8_0"),
    ("tiny-gemma3", "Q4_0"),
    ("tiny-mistral", "F32"),
    ("tiny-yarn", "Q4_0"),
    ("tiny-phi3", "Q4_0"),
    ("tiny-phi3", "F32"),
    ("tiny-longrope", "Q8_0"),
    ("tiny-qwen3moe", "Q4_0"),
    ("tiny-qwen3moe", "Q4_K_M"),
    ("tiny-qwen3moe", "F32"),
    ("tiny-qwen2moe", "Q4_0"),
]
# Pages are written and read from values, whatever weights those come from: a shape meets every type of pages with one
# type of weights, and with its other types the usual one.
FIRST = dict(reversed(MODELS + MIXED))
CASES = [(s, t, kv) for s, t in MODELS + MIXED for kv in (KV_TYPES if FIRST[s] == t else KV_TYPES[:1])]
TOKENS = 128  # of room for each sequence


class Session:
    """Sequences over a pool of their own, driven through one plan."""

    def __init__(self, plan: Plan, program: Program, sequences: int) -> None:
        self.plan = plan
        pages = TOKENS // PAGE_TOKENS
        sizes = [group.page_bytes(plan.kv_type) for group in program.groups]
        starts = np.cumsum([0, *(sequences * pages * size for size in sizes)])
        order = np.random.default_rng(0).permutation(sequences * pages).astype(np.int64).reshape(sequences, pages)
        self.tables = [start + order * size for start, size in zip(starts, sizes, strict=False)]
        self.pool = np.zeros(starts[-1], np.uint8)
        self.context = [0] * sequences

    def __call__(self, work: dict[int, list[int]], outputs: list[int] | None = None) -> NDArray[np.float32]:
        """Logits of the rows `outputs` (all) after running these tokens of these sequences in one step."""
        starts = np.cumsum([0, *(len(tokens) for tokens in work.values())]).astype(np.int32)
        context = np.array([self.context[s] for s in work], np.int32)
        positions = [self.context[s] + i for s, tokens in work.items() for i in range(len(tokens))]
        step = StepArgs(
            tokens=np.array([token for tokens in work.values() for token in tokens], np.int32),
            positions=np.array(positions, np.int32),
            seq_start=starts,
            context=context,
            block_tables=tuple(table[list(work)] for table in self.tables),
            output_rows=np.array(range(starts[-1]) if outputs is None else outputs, np.int32),
        )
        for sequence, tokens in work.items():
            self.context[sequence] += len(tokens)
        return self.plan.forward(step, self.pool).copy()


def bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize(("shape", "type", "kv_type"), CASES)
def test_native_is_the_reference_in_prefill_chunks_decode_and_mixed_steps(
    burned: Burned, shape: str, type: str, kv_type: str
) -> None:
    image = burned(shape, type)
    program = build(Spec.from_bytes(image.spec))
    workers = [table.make_workers(threads) for threads in (1, 2, 3)]

    def session(backend: str, isa: str | None = None, threads: int = 1) -> Session:
        plan = table.lower(
            program,
            image,
            backend=backend,
            kv_type=kv_type,
            max_rows=80,
            max_sequences=80,
            workers=workers[threads - 1],
            isa=isa,
        )
        return Session(plan, program, 3)

    twin = session("reference")
    natives = [session("native", isa, threads) for isa in table.isas() for threads in (1, 2, 3)]
    rng = np.random.default_rng(1)

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, program.vocabulary, count)]

    steps = [
        ({0: some(33)}, None),  # a prompt in one piece
        ({1: some(20)}, [19]),  # another in chunks
        ({1: some(16), 0: some(1)}, [15, 16]),  # and a decode row beside it
        ({0: some(1)}, None),
        ({2: some(1), 1: some(1), 0: some(1)}, [0, 2]),
        ({2: some(34), 0: some(3), 1: some(1)}, [33, 36, 37]),
    ]
    for work, outputs in steps:
        expected = twin(work, outputs)
        assert np.isfinite(expected).all()
        for native in natives:
            np.testing.assert_array_equal(bits(native(work, outputs)), bits(expected))
            np.testing.assert_array_equal(native.pool, twin.pool)


@pytest.mark.parametrize("shape", ["tiny-qwen2", "tiny-qwen3moe"])
def test_chunking_and_company_do_not_change_a_sequence(burned: Burned, shape: str) -> None:
    image = burned(shape, "Q4_0")
    program = build(Spec.from_bytes(image.spec))
    workers = table.make_workers(2)
    tokens = [int(token) for token in np.random.default_rng(2).integers(0, program.vocabulary, 100)]

    def session() -> Session:
        plan = table.lower(program, image, max_rows=128, max_sequences=128, workers=workers)
        return Session(plan, program, 2)

    whole = session()({0: tokens})
    one_by_one, chunked, in_company = session(), session(), session()
    singles = np.concatenate([one_by_one({0: [token]}) for token in tokens])
    chunks = np.concatenate([chunked({0: tokens[i : i + 17]}) for i in range(0, 100, 17)])
    shared = np.concatenate([in_company({1: tokens[:3], 0: tokens[i : i + 10]})[3:] for i in range(0, 100, 10)])
    for other in (singles, chunks, shared):
        np.testing.assert_array_equal(bits(other), bits(whole))
