"""A Spec becomes a Program that is closed, complete and exact in its constants."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import msgspec
import pytest

from vai.burn.synth import SHAPES
from vai.kernels.ops import (
    Attention,
    ExpertLinear,
    ExpertSum,
    GatedAdd,
    HeadNorm,
    KvWrite,
    Linear,
    RmsNorm,
    Rope,
    Route,
    Rows,
)
from vai.models.decoder import build, rope_frequencies, yarn_frequencies
from vai.models.spec import Spec

WEIGHTS = ("weight", "bias")
INPUTS = ("x", "residual", "addend", "k", "v", "q", "gate", "up", "logits")


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_every_value_is_made_before_it_is_used_and_only_once(spec: Spec) -> None:
    made: set[str] = set()
    program = build(spec)
    for op in program.ops:
        fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
        for name in INPUTS:
            assert fields.get(name) is None or fields[name] in made, op
        if isinstance(op, ExpertLinear | ExpertSum):
            assert (op.chosen if isinstance(op, ExpertLinear) else op.shares) in made, op
        results = (
            {op.chosen, op.shares} if isinstance(op, Route) else {fields[name] for name in fields if name == "output"}
        )
        assert not results & made
        made |= results
    assert set(program.outputs.values()) <= made


@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_every_tensor_of_the_model_is_read(spec: Spec) -> None:
    program = build(spec)
    read = {getattr(op, field) for op in program.ops for field in WEIGHTS if hasattr(op, field)}
    assert read - {None} == set(program.constants)


def test_what_experts_say_is_weighed_as_their_family_does() -> None:
    for shape, renormalize, shared in (("qwen3moe", True, 0), ("mixtral", True, 0), ("qwen2moe", False, 2)):
        spec = msgspec.structs.replace(SHAPES[f"tiny-{shape}"], expert_scale=1.5)
        routes = [op for op in build(spec).ops if isinstance(op, Route)]
        assert [(op.used, op.renormalize, op.scale) for op in routes] == 2 * [(spec.experts_used, renormalize, 1.5)]
        assert sum(isinstance(op, GatedAdd) for op in build(spec).ops) == shared


def test_keys_are_written_before_attention_reads_them() -> None:
    kinds = [type(op) for op in build(SHAPES["tiny"]).ops]
    for layer in range(SHAPES["tiny"].layers):
        start = 1 + 14 * layer
        assert kinds.index(KvWrite, start) < kinds.index(Attention, start) < start + 14


def test_only_rows_asked_for_reach_the_output_projection() -> None:
    *_, rows, norm, head = build(SHAPES["tiny"]).ops
    assert isinstance(rows, Rows) and isinstance(norm, RmsNorm) and isinstance(head, Linear)
    assert (head.x, norm.x) == (norm.output, rows.output)


def test_a_tied_model_projects_with_its_embedding() -> None:
    head = build(SHAPES["tiny-qwen2"]).ops[-1]
    assert isinstance(head, Linear) and head.weight == "token_embd.weight"
    head = build(SHAPES["tiny"]).ops[-1]
    assert isinstance(head, Linear) and head.weight == "output.weight"


def test_heads_are_normalized_between_their_projection_and_rope() -> None:
    ops = {op.output: op for op in build(SHAPES["tiny-qwen3"]).ops if not isinstance(op, KvWrite)}
    for name, heads in (("q", 6), ("k", 2)):
        rope = ops[f"blk.1.{name}.rope"]
        assert isinstance(rope, Rope)
        norm = ops[rope.x]
        assert isinstance(norm, HeadNorm) and isinstance(ops[norm.x], Linear)
        assert (norm.weight, norm.heads) == (f"blk.1.attn_{name}_norm.weight", heads)


def test_linear_scaling_divides_every_frequency() -> None:
    ropes = [op for op in build(SHAPES["tiny"]).ops if isinstance(op, Rope)]
    plain = msgspec.structs.replace(SHAPES["tiny"], rope_scaling="none", rope_factor=1.0)
    unscaled = next(op for op in build(plain).ops if isinstance(op, Rope))
    assert len(ropes) == 2 * SHAPES["tiny"].layers
    for op in ropes:
        assert op.frequencies == tuple(frequency / 4 for frequency in unscaled.frequencies)


@pytest.mark.parametrize(("base", "dims", "factor"), [(10_000.0, 128, 1.0), (1e6, 48, 3.0), (100_000.0, 128, 4.0)])
def test_frequencies_are_the_binary64_numbers_nearest_to_the_true_ones(base: float, dims: int, factor: float) -> None:
    for i, frequency in enumerate(rope_frequencies(base, dims, factor)):
        # f is nearest iff the true value, base^(-2i/dims)/factor, lies within half a step: compare dims-th powers.
        half = Fraction(math.ulp(frequency)) / 2
        power = (Fraction(1) / Fraction(base)) ** (2 * i)
        low, high = Fraction(frequency) - half, Fraction(frequency) + half
        assert (low * Fraction(factor)) ** dims <= power <= (high * Fraction(factor)) ** dims


def test_divisors_apply_to_their_own_frequency() -> None:
    plain = rope_frequencies(10_000.0, 8, 1.0)
    assert rope_frequencies(10_000.0, 8, 1.0, (1.0, 2.0, 4.0, 8.0)) == tuple(
        frequency / divisor for frequency, divisor in zip(plain, (1, 2, 4, 8), strict=True)
    )


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_goes_between_them_in_a_line() -> None:
    base, dims, context = 10_000.0, 48, 512
    plain = rope_frequencies(base, dims, 1.0)
    shares = [
        (kept - found) / (kept - kept / 8)
        for kept, found in zip(plain, yarn_frequencies(base, dims, 8.0, context, 32.0, 1.0), strict=True)
    ]
    turns = [frequency * context / (2 * math.pi) for frequency in plain]
    first = max(i for i, count in enumerate(turns) if count >= 32)
    last = min(i for i, count in enumerate(turns) if count <= 1)
    assert shares == pytest.approx([min(max((i - first) / (last - first), 0), 1) for i in range(dims // 2)], abs=1e-15)
    assert shares[first] == 0 and shares[first + 1] > 0 and shares[last - 1] < 1


@pytest.mark.parametrize(("context", "divided"), [(5, 24), (1 << 24, 0)])
def test_a_yarn_whose_pairs_all_turn_slowly_or_all_fast_is_no_mixture(context: int, divided: int) -> None:
    plain = rope_frequencies(10.0, 48, 1.0)
    halves = tuple(frequency / (2 if i < divided else 1) for i, frequency in enumerate(plain))
    found = yarn_frequencies(10.0, 48, 2.0, context, 32.0, 1.0)
    assert found[1:] == halves[1:]  # the first pair keeps its frequency where the ramp begins at it


def test_heads_that_are_rotated_in_part_are_multiplied_there() -> None:
    spec = SHAPES["tiny-phi4"]
    ops = build(spec).ops
    assert {op.magnitude for op in ops if isinstance(op, Rope)} == {1.1875}
    assert {op.scale for op in ops if isinstance(op, Attention)} == {1 / math.sqrt(32)}
    part = msgspec.structs.replace(SHAPES["tiny-yarn"], rope_dims=24)
    assert [op.magnitude for op in build(part).ops if isinstance(op, Rope)] == pytest.approx([1 + math.log(4) / 10] * 4)
    whole = build(SHAPES["tiny-longrope"]).ops
    assert {op.magnitude for op in whole if isinstance(op, Rope)} == {1.0}
    assert {op.scale for op in whole if isinstance(op, Attention)} == {1 / math.sqrt(32) * 1.125**2}


def test_yarn_multiplies_scores_by_the_square_of_its_magnitude() -> None:
    def scales(spec: Spec) -> list[float]:
        return [op.scale for op in build(spec).ops if isinstance(op, Attention)]

    spec = SHAPES["tiny-yarn"]
    assert scales(spec) == pytest.approx([(1 + math.log(4) / 10) ** 2 / math.sqrt(48)] * 2, rel=1e-15)
    longer = msgspec.structs.replace(spec, rope_magnitude=1.25)
    assert scales(longer) == pytest.approx([1.5625 * scale for scale in scales(spec)], rel=1e-15)
