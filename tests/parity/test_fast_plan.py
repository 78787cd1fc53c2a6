"""Steps of the fast kind: the same bits from the native plan and the reference, alone and in company."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.burn.burn import burn
from vai.burn.quantize import quantize
from vai.errors import NotSupported
from vai.kernels import _native, table
from vai.kernels.program import PAGE_TOKENS, Plan, Program, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.image import BLOCK_ROWS
from vai.rom.segment import attach
from vai.rom.view import Image

Burned = Callable[[str, str], Image]
Pool = NDArray[np.uint8]

ROWS = 43  # whole tiles of rows and a rest
MODELS = (
    ("tiny", "Q4_0"),
    ("tiny-qwen2", "Q8_0"),
    ("tiny-gemma2", "Q4_1"),
    ("tiny-256", "Q4_K"),
    ("tiny-qwen3moe", "Q5_0"),
    ("tiny", "BF16"),
    ("tiny-256", "Q3_K"),
)


def program_of(image: Image) -> Program:
    return build(Spec.from_bytes(image.spec))


def lowered(image: Image, *, threads: int = 2, **options: object) -> Plan:
    arguments = {"max_rows": 64, "max_sequences": 4, "workers": table.make_workers(threads), "fast": "portable"}
    return table.lower(program_of(image), image, **{**arguments, **options})


def pool_of(program: Program, tokens: int, kv_type: str = "bf16") -> Pool:
    """Pages of NaNs, all of them."""
    pages = -(-tokens // PAGE_TOKENS)
    return np.full(sum(pages * group.page_bytes(kv_type) for group in program.groups), 0xFF, np.uint8)


def step(program: Program, first: int, end: int, kind: str, kv_type: str = "bf16") -> StepArgs:
    """Tokens [first, end) of the one sequence; the last one's logits, of an exact step."""
    pages, tables, offset = -(-end // PAGE_TOKENS), [], 0
    for group in program.groups:
        size = group.page_bytes(kv_type)
        tables.append(offset + np.arange(pages, dtype=np.int64)[None] * size)
        offset += -(-(ROWS + 1) // PAGE_TOKENS) * size
    positions = np.arange(first, end, dtype=np.int32)
    return StepArgs(
        tokens=(61 * positions * positions + 17 * positions + 7) % program.vocabulary,
        positions=positions,
        seq_start=np.array([0, end - first], np.int32),
        context=np.array([first], np.int32),
        block_tables=tuple(tables),
        output_rows=np.array([end - first - 1] if kind == "exact" else [], np.int32),
        kind=kind,
    )


def computed(plan: Plan, program: Program, cuts: tuple[int, ...]) -> tuple[Pool, NDArray[np.uint32]]:
    """Pages after ROWS fast rows, in steps that end at `cuts`, and the bits of an exact row's logits behind them."""
    pool = pool_of(program, ROWS + 1, plan.kv_type)
    for first, end in zip((0, *cuts), (*cuts, ROWS), strict=True):
        plan.forward(step(program, first, end, "fast", plan.kv_type), pool)
    logits = plan.forward(step(program, ROWS, ROWS + 1, "exact", plan.kv_type), pool)
    return pool, logits.copy().view(np.uint32)


@pytest.mark.parametrize("fast", table.fasts())
@pytest.mark.parametrize(("shape", "type"), MODELS)
def test_the_native_plan_has_the_bits_of_the_reference(burned: Burned, shape: str, type: str, fast: str) -> None:
    image = burned(shape, type)
    program = program_of(image)
    pages, logits = computed(lowered(image, fast=fast), program, ())
    expected, right = computed(lowered(image, backend="reference"), program, ())
    np.testing.assert_array_equal(pages, expected)
    np.testing.assert_array_equal(logits, right)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_pages_of_every_type_have_the_bits_of_the_reference(burned: Burned, kv_type: str) -> None:
    image = burned("tiny-gemma2", "Q4_0")
    program = program_of(image)
    pages, logits = computed(lowered(image, kv_type=kv_type), program, (20,))
    expected, right = computed(lowered(image, kv_type=kv_type, backend="reference"), program, (20,))
    np.testing.assert_array_equal(pages, expected)
    np.testing.assert_array_equal(logits, right)


@pytest.mark.parametrize("isa", table.isas())
def test_a_fast_row_has_the_same_bits_in_every_company_on_every_instruction_set(burned: Burned, isa: str) -> None:
    image = burned("tiny-qwen2", "Q8_0")
    program = program_of(image)
    whole = computed(lowered(image), program, ())
    for cuts, threads in (((1, 17, 20), 1), ((7, 14, 21, 28, 35), 3), ((32,), 2)):
        for one, other in zip(whole, computed(lowered(image, threads=threads, isa=isa), program, cuts), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_gated_layer_leaves_bfloat16_where_nobody_reads_anything_else(burned: Burned) -> None:
    """Else what it leaves would be written and read once more, to be rounded."""
    image = burned("tiny-qwen2", "Q8_0")
    layers = sum(group.layers for group in program_of(image).groups)
    lines = lowered(image).describe("fast")
    assert [line.text.endswith("as bfloat16") for line in lines if line.kind == "gated"] == [True] * layers
    assert sum(line.kind == "narrow" for line in lines) == 3 * layers  # for q|k|v, the attention's output, gate|up


def test_a_gated_layer_leaves_binary32_where_the_next_one_is_exact(
    checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    quantize(checkpoint("tiny-qwen2", "F32"), tmp_path / "mixed.gguf", type="Q8_0", keep=[("*ffn_down*", "F16")])
    tmp_path.chmod(0o700)
    image = attach(tmp_path, burn(tmp_path / "mixed.gguf", tmp_path).digest)
    plan, program = lowered(image), program_of(image)
    assert not any(line.text.endswith("as bfloat16") for line in plan.describe("fast") if line.kind == "gated")
    pages, logits = computed(plan, program, ())
    expected, right = computed(lowered(image, backend="reference"), program, ())
    np.testing.assert_array_equal(pages, expected)
    np.testing.assert_array_equal(logits, right)
    image.close()


def test_fast_rows_are_other_bits_than_exact_ones_and_near_them(burned: Burned) -> None:
    image = burned("tiny", "Q8_0")
    program = program_of(image)
    plan, pool = lowered(image), pool_of(program, ROWS + 1)
    plan.forward(step(program, 0, ROWS, "exact"), pool)
    exact = plan.forward(step(program, ROWS, ROWS + 1, "exact"), pool).copy()
    pages, bits = computed(plan, program, ())
    fast = bits.view(np.float32)
    assert (pages != pool).any()
    # Activations lose a 256th at most to bfloat16, a 254th of their group's largest to int8, and weights a 512th.
    assert 0 < np.linalg.norm(fast - exact) < np.linalg.norm(exact) / 16


@pytest.mark.parametrize("type", ["F16", "F32"])
def test_weights_that_bfloat16_would_shorten_are_computed_exactly(burned: Burned, type: str) -> None:
    image = burned("tiny", type)
    program = program_of(image)
    plan, pool = lowered(image, kv_type="f32"), pool_of(program, ROWS + 1, "f32")  # so is attention over such pages
    plan.forward(step(program, 0, ROWS, "exact", "f32"), pool)
    plan.forward(step(program, ROWS, ROWS + 1, "exact", "f32"), pool)
    np.testing.assert_array_equal(computed(plan, program, ())[0], pool)


def test_a_plan_without_a_fast_kind_refuses_its_steps(burned: Burned) -> None:
    image = burned("tiny", "Q4_0")
    program = program_of(image)
    plan = lowered(image, fast=None)
    assert plan.fast is None
    with pytest.raises(NotSupported, match="'fast'"):
        plan.forward(step(program, 0, 8, "fast"), pool_of(program, ROWS + 1))


def test_a_fast_kind_that_is_not_there_is_refused_by_name(burned: Burned) -> None:
    with pytest.raises(NotSupported, match="'neon'"):
        lowered(burned("tiny", "Q4_0"), fast="neon")
    assert table.fast("off") is None
    assert table.fast("portable") == "portable"
    assert table.fast(None) in (None, "amx")


def test_both_kinds_share_a_workspace_that_is_known_beforehand(burned: Burned) -> None:
    image = burned("tiny-256", "Q4_K")
    program = program_of(image)
    sizes = {
        fast: table.workspace_bytes(program, image.table, max_rows=64, max_sequences=4, threads=2, fast=fast)
        for fast in (None, "portable")
    }
    room = -(-program.context // BLOCK_ROWS) * BLOCK_ROWS, max(group.head_dim for group in program.groups)
    more = 2 * (_native.fast_attention_scratch(*room) - 4 * _native.attention_scratch(*room))
    assert lowered(image).workspace_bytes == sizes["portable"] < sizes[None] + (sizes[None] + more)  # two workspaces
    assert lowered(image, fast=None).workspace_bytes == sizes[None]


def test_a_kind_leaves_nothing_behind_for_the_other(burned: Burned) -> None:
    image = burned("tiny", "Q4_0")
    program = program_of(image)
    alone = computed(lowered(image), program, ())
    plan = lowered(image)
    plan.forward(dataclasses.replace(step(program, 0, ROWS, "exact")), pool_of(program, ROWS + 1))
    for one, other in zip(alone, computed(plan, program, ()), strict=True):
        np.testing.assert_array_equal(one, other)
