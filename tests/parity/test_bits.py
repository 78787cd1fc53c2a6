"""The bits of logits: what they are with every executor, what they must not depend on, and what they are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from vai.burn.synth import SHAPES
from vai.errors import BadRequest, CorruptImage
from vai.kernels import table
from vai.kernels.program import PAGE_TOKENS, StepArgs
from vai.kernels.reference import Matrix, ReferencePlan, embed, unpack, unpack_vector
from vai.models.decoder import build
from vai.rom.image import BLOCK_TYPES
from vai.rom.view import Image

Burned = Callable[[str, str], Image]
Checkpoint = Callable[[str, str], Path]
Logits = NDArray[np.float32]

BITS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "bits.json").read_text())
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
LENGTHS = (37, 64, 5)


def tokens(count: int, vocabulary: int) -> NDArray[np.int32]:
    return np.array([(61 * i * i + 17 * i + 7) % vocabulary for i in range(count)], np.int32)


class Sequence:
    """A prompt, its pages, and how far it has come."""

    def __init__(self, prompt: NDArray[np.int32], pages: NDArray[np.int64]) -> None:
        self.prompt, self.pages, self.done = prompt, pages, 0


class Batch:
    """Sequences over one pool whose pages lie in a shuffled order, in memory that starts as NaNs everywhere."""

    def __init__(self, image: Image, shape: str, lengths: tuple[int, ...]) -> None:
        program = build(SHAPES[shape])
        self._plan = ReferencePlan(program, image, kv_type="bf16", max_rows=256, max_sequences=256)
        counts = [-(-length // PAGE_TOKENS) for length in lengths]
        page = program.groups[0].page_bytes("bf16")
        order = np.random.default_rng(5).permutation(sum(counts)).astype(np.int64) * page
        self._pool = np.full(sum(counts) * page, 0xFF, np.uint8)
        self.sequences = [
            Sequence(tokens(length, SHAPES[shape].vocabulary), order[sum(counts[:i]) : sum(counts[: i + 1])])
            for i, length in enumerate(lengths)
        ]

    def step(self, takes: list[int]) -> list[Logits]:
        """Advance sequence i by takes[i] tokens, in one step; the logits of each one's new rows."""
        active = [(s, n) for s, n in zip(self.sequences, takes, strict=True) if n]
        table = np.full((len(active), max(len(s.pages) for s, _ in active)), -(1 << 40), np.int64)
        for row, (s, _) in zip(table, active, strict=True):
            row[: len(s.pages)] = s.pages
        starts = np.cumsum([0, *(n for _, n in active)])
        logits = self._plan.forward(
            StepArgs(
                tokens=np.concatenate([s.prompt[s.done : s.done + n] for s, n in active]),
                positions=np.concatenate([np.arange(s.done, s.done + n, dtype=np.int32) for s, n in active]),
                seq_start=starts.astype(np.int32),
                context=np.array([s.done for s, _ in active], np.int32),
                block_tables=(table,),
                output_rows=np.arange(starts[-1], dtype=np.int32),
            ),
            self._pool,
        )
        for s, n in active:
            s.done += n
        pieces = iter(np.split(logits, starts[1:-1]))
        return [next(pieces) if n else logits[:0] for n in takes]


def alone(image: Image, shape: str, length: int) -> Logits:
    return Batch(image, shape, (length,)).step([length])[0]


@pytest.fixture(scope="module")
def workers() -> table.Workers:
    return table.make_workers(2)


@pytest.mark.parametrize("executor", ["reference", *table.isas()])
@pytest.mark.parametrize("entry", BITS, ids=lambda e: f"{e['shape']}-{e['type']}-{e['tokens']}")
def test_not_one_bit_of_a_logit_has_changed(
    entry: dict[str, Any], executor: str, burned: Burned, workers: table.Workers
) -> None:
    spec, count, rows = SHAPES[entry["shape"]], entry["tokens"], entry["rows"]
    program, kv_type = build(spec), entry["kv_type"]
    plan = table.lower(
        program,
        burned(entry["shape"], entry["type"]),
        backend="reference" if executor == "reference" else "native",
        isa=None if executor == "reference" else executor,
        kv_type=kv_type,
        max_rows=count,
        max_sequences=rows,
        workers=workers,
    )
    page, pages = program.groups[0].page_bytes(kv_type), -(-count // PAGE_TOKENS)
    step = StepArgs(
        tokens=tokens(count, spec.vocabulary),
        positions=np.arange(count, dtype=np.int32),
        seq_start=np.array([0, count], np.int32),
        context=np.array([0], np.int32),
        block_tables=(np.arange(pages, dtype=np.int64)[None, :] * page,),
        output_rows=np.arange(count - rows, count, dtype=np.int32),
    )
    logits = plan.forward(step, np.zeros(pages * page, np.uint8))
    assert hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("type", ["F32", "Q4_0"])
@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen2"])
def test_bits_do_not_depend_on_chunks(shape: str, type: str, burned: Burned) -> None:
    whole = alone(burned(shape, type), shape, 37)
    batch = Batch(burned(shape, type), shape, (37,))
    pieces = [batch.step([n])[0] for n in (1, 15, 1, 16, 3, 1)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen2", "tiny-qwen3moe"])
def test_bits_do_not_depend_on_company(shape: str, burned: Burned) -> None:
    image = burned(shape, "Q8_0")
    batch = Batch(image, shape, LENGTHS)
    steps = [batch.step(takes) for takes in ([30, 1, 0], [7, 40, 5], [0, 23, 0])]
    for index, length in enumerate(LENGTHS):
        together = np.concatenate([step[index] for step in steps])
        np.testing.assert_array_equal(together, alone(image, shape, length))


def test_only_the_rows_asked_for_come_back(burned: Burned) -> None:
    image, program = burned("tiny", "Q4_0"), build(SHAPES["tiny"])
    plan = ReferencePlan(program, image, kv_type="bf16", max_rows=8, max_sequences=2)
    step = StepArgs(
        tokens=tokens(8, 512),
        positions=np.arange(8, dtype=np.int32),
        seq_start=np.array([0, 8], np.int32),
        context=np.array([0], np.int32),
        block_tables=(np.zeros((1, 1), np.int64),),
        output_rows=np.array([2, 7], np.int32),
    )
    pool = np.zeros(program.groups[0].page_bytes("bf16"), np.uint8)
    np.testing.assert_array_equal(plan.forward(step, pool), alone(image, "tiny", 8)[[2, 7]])
    with pytest.raises(BadRequest, match="3 results"):
        plan.forward(
            StepArgs(step.tokens, step.positions, step.seq_start, step.context, step.block_tables, np.arange(3)), pool
        )


def test_a_step_may_ask_for_nothing(burned: Burned) -> None:
    plan = ReferencePlan(build(SHAPES["tiny"]), burned("tiny", "Q4_0"), kv_type="f32", max_rows=1, max_sequences=1)
    none, one = np.zeros(0, np.int32), np.zeros(1, np.int32)
    step = StepArgs(one, one, np.array([0, 1], np.int32), one, (np.zeros((1, 1), np.int64),), none)
    assert plan.forward(step, np.zeros(1 << 20, np.uint8)).shape == (0, 512)


def test_a_program_that_the_image_does_not_fit_is_refused_by_name(burned: Burned) -> None:
    with pytest.raises(CorruptImage, match=r"token_embd\.weight"):
        ReferencePlan(build(SHAPES["tiny"]), burned("tiny-qwen2", "F32"), kv_type="f32", max_rows=1, max_sequences=1)


@pytest.mark.parametrize(
    ("shape", "type"),
    [(shape, type) for shape in ("tiny", "tiny-qwen2") for type in (*TYPES, "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")]
    + [("tiny-256", type) for type in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_K_M", "Q4_0+Q6_K")]
    + [("tiny-256", kind.name) for kind in BLOCK_TYPES.values() if kind.slow]
    + [("tiny-qwen3moe", type) for type in ("Q4_0", "Q4_K_M", "BF16")]
    + [("tiny-mixtral", "Q8_0"), ("tiny-qwen2moe", "Q4_0")],
)
def test_what_is_unpacked_from_the_image_is_what_the_checkpoint_holds(
    shape: str, type: str, burned: Burned, checkpoint: Checkpoint
) -> None:
    image = burned(shape, type)
    for tensor in gguf.GGUFReader(checkpoint(shape, type)).tensors:
        truth = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored, part, data = image.tensor(tensor.name)
        found = unpack_vector(part, data) if truth.ndim == 1 else every_row(unpack(stored, part, data))
        np.testing.assert_array_equal(found, truth.reshape(found.shape), err_msg=tensor.name)


def every_row(matrix: Matrix) -> NDArray[np.float32]:
    return embed(matrix, np.arange(len(matrix.values)))
