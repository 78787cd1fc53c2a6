"""The reference's operations against their definitions: slow scalar loops for the bits, binary64 for the values."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import reference
from vai.kernels.ops import Rope
from vai.kernels.program import Adjustments, SampleArgs
from vai.kernels.reference import NO_TOKEN, Matrix

F = np.float32
Floats = NDArray[np.float32]


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def scalar_r16(values: list[np.float32]) -> np.float32:
    partial = [F(0)] * 16
    for i, value in enumerate(values):
        partial[i % 16] = partial[i % 16] + value
    for half in (8, 4, 2, 1):
        partial = [partial[j] + partial[j + half] for j in range(half)]
    return partial[0]


# ---------------------------------------------------------------- elementary functions


def test_exp_is_within_one_step_of_the_truth() -> None:
    x = np.linspace(-87.3, 88.3, 200_001).astype(F)
    truth = np.array([math.exp(each) for each in x])
    assert (np.abs(reference.exp(x) - truth) <= np.spacing(truth.astype(F)).astype(np.float64)).all()


def test_exp_at_its_ends() -> None:
    ends = np.array([0.0, -0.0, -87.4, -1e30, -np.inf, 88.4, 1e30, np.inf, np.nan], F)
    value = reference.exp(ends)
    highest = reference.exp(np.array([88.3], F))[0]
    np.testing.assert_array_equal(value, np.array([1, 1, 0, 0, 0, highest, highest, highest, np.nan], F))
    assert not np.signbit(value[:8]).any()


def test_tanh_is_within_two_steps_of_the_truth() -> None:
    x = np.concatenate([np.linspace(-12, 12, 200_001), np.geomspace(1e-30, 1, 1001), [0.625, -0.625]]).astype(F)
    truth = np.array([math.tanh(each) for each in x])
    assert (np.abs(reference.tanh(x) - truth) <= 1.5 * np.spacing(np.abs(truth).astype(F)).astype(np.float64)).all()
    ends = reference.tanh(np.array([0, 50, -50, 1e30, np.inf, -np.inf, np.nan], F))
    np.testing.assert_array_equal(ends, np.array([0, 1, -1, 1, 1, -1, np.nan], F))


def test_sine_and_cosine_are_right_to_a_few_steps_of_binary64() -> None:
    angles = np.concatenate([
        np.linspace(0, 100, 20_001),
        np.arange(0, 1 << 20, 97).astype(np.float64),
        np.arange(1, 2_000) * (math.pi / 4),
    ])  # fmt: skip
    sine, cosine = reference.sin_cos(angles)
    assert max(abs(s - math.sin(a)) for s, a in zip(sine, angles, strict=True)) < 4 * 2.0**-53
    assert max(abs(c - math.cos(a)) for c, a in zip(cosine, angles, strict=True)) < 4 * 2.0**-53


def test_log_is_right_to_a_few_steps_of_binary64() -> None:
    values = np.concatenate([np.geomspace(1e-3, 1e9, 5_001), 1 + np.linspace(-0.3, 0.4, 1_001), [1.0, 0.5, 2.0]])
    for value in values:
        truth = math.log(value)
        assert abs(reference.log(float(value)) - truth) <= 4 * math.ulp(max(abs(truth), 0.5))
    assert reference.log(1.0) == 0.0


@pytest.mark.parametrize("n", [1, 5, 16, 17, 100, 192])
def test_sums_go_in_the_r16_order(n: int) -> None:
    x = random(3, n, seed=n) * F(1e4)
    assert [scalar_r16(list(row)) for row in x] == list(reference.sum_r16(x))


# ---------------------------------------------------------------- operations


def test_rms_norm_rounds_each_of_its_operations() -> None:
    x, weight, epsilon = random(4, 48), random(48, seed=1), 1e-5
    for row, found in zip(x, reference.rms_norm(x, weight, epsilon), strict=True):
        r = F(1) / np.sqrt(scalar_r16([v * v for v in row]) / F(48) + F(epsilon))
        assert [(v * r) * w for v, w in zip(row, weight, strict=True)] == list(found)


def test_activations_are_quantized_half_to_even_between_plus_and_minus_127() -> None:
    x = np.zeros((1, 32), F)
    x[0, :6] = [127, -127, 2.5, 3.5, -0.5, 1.5]
    codes, scales = reference.quantize(x)
    assert list(codes[0, :6]) == [127, -127, 2, 4, 0, 2]
    assert scales == [[1]]


def test_a_group_too_small_to_divide_by_becomes_zeros() -> None:
    x = np.full((1, 64), 2.0**-101, F)
    x[0, 32:] = 2.0**-100
    codes, scales = reference.quantize(x)
    assert not codes[0, :32].any() and scales[0, 0] == 0
    assert (codes[0, 32:] == 127).all() and scales[0, 1] == F(2.0**-100) / F(127)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_row_that_is_not_finite_spoils_no_other(poison: float, quantized: bool) -> None:
    x = random(3, 64)
    codes = np.random.default_rng(1).integers(-128, 128, (5, 64)).astype(np.int16)
    weight = Matrix(codes, random(5, 2, seed=2)) if quantized else Matrix(random(5, 64, seed=3), None)
    clean = reference.linear(x, weight)
    x[1, 40] = poison
    spoiled = reference.linear(x, weight)
    assert not np.isfinite(spoiled[1]).any()
    assert np.isnan(spoiled[1]).all() or not quantized
    np.testing.assert_array_equal(spoiled[[0, 2]], clean[[0, 2]])


def test_quantized_linear_adds_groups_in_ascending_order() -> None:
    x, scales = random(3, 96), random(7, 3, seed=2).astype(np.float16).astype(F)
    codes = np.random.default_rng(1).integers(-128, 128, (7, 96)).astype(np.int16)
    found = reference.linear(x, Matrix(codes, scales))
    q, da = reference.quantize(x)
    for m in range(3):
        for n in range(7):
            acc = F(0)
            for g in range(3):
                group = range(32 * g, 32 * g + 32)
                acc = acc + F(sum(int(q[m, k]) * int(codes[n, k]) for k in group)) * (scales[n, g] * da[m, g])
            assert acc == found[m, n]


@pytest.mark.parametrize("sub", [32, 16, 0])
@pytest.mark.parametrize("minimum", [True, False])
def test_factors_and_minimums_join_the_sum_of_their_group(sub: int, minimum: bool) -> None:
    """Groups of 256 with integer factors (sub: columns that share one), or of 32 without (sub = 0)."""
    group, chance = 256 if sub else 32, np.random.default_rng(1)
    n, m, groups = 5, 3, 2
    x = random(m, group * groups)
    codes = chance.integers(-32, 64, (n, group * groups)).astype(np.int16)
    scales, minimums = random(n, groups, seed=2), random(n, groups, seed=3)
    factors, minimum_factors = (chance.integers(-128, 128, (n, group * groups // (sub or 1))) for _ in range(2))
    weight = Matrix(
        codes,
        scales,
        factors.astype(np.int16) if sub else None,
        minimums if minimum else None,
        minimum_factors.astype(np.int16) if sub and minimum else None,
    )
    q, da = reference.quantize(x, group)
    found = reference.linear(x, weight)
    for row in range(m):
        for out in range(n):
            acc = F(0)
            for g in range(groups):
                mine = range(group * g, group * g + group)
                isum = sum(
                    int(q[row, k]) * int(codes[out, k]) * int(factors[out, k // sub] if sub else 1) for k in mine
                )
                asum = sum(int(q[row, k]) * int(minimum_factors[out, k // sub] if sub else 1) for k in mine)
                term = F(isum) * (scales[out, g] * da[row, g])
                if minimum:
                    term = term + F(asum) * (minimums[out, g] * da[row, g])
                acc = acc + term
            assert acc == found[row, out]


def test_float_linear_adds_columns_in_ascending_order() -> None:
    x, weight = random(3, 50), random(7, 50, seed=1)
    found = reference.linear(x, Matrix(weight, None))
    for m in range(3):
        for n in range(7):
            acc = F(0)
            for k in range(50):
                acc = acc + x[m, k] * weight[n, k]
            assert acc == found[m, n]


@pytest.mark.parametrize("pairing", ["norm", "neox"])
def test_rope_turns_its_pairs_and_leaves_the_rest(pairing: str) -> None:
    frequencies = (1.0, 0.1, 0.01)
    x, positions = random(4, 2 * 10), np.array([0, 1, 17, 4000], np.int32)
    found = reference.rope(x, positions, Rope("o", "x", 2, 10, pairing, frequencies)).reshape(4, 2, 10)
    heads = x.reshape(4, 2, 10).astype(np.float64)
    np.testing.assert_array_equal(found[:, :, 6:], heads[:, :, 6:])
    np.testing.assert_array_equal(found[0], heads[0])
    for i, frequency in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if pairing == "norm" else (i, i + 3)
        turned = (heads[:, :, a] + 1j * heads[:, :, b]) * np.exp(1j * positions * frequency)[:, None]
        np.testing.assert_allclose(found[:, :, a] + 1j * found[:, :, b], turned, atol=2e-6)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (0, 0.5), (20, 0.0), (1030, 0.5)])
def test_attention_is_the_specified_sequence_of_operations(window: int, softcap: float) -> None:
    """Over the edge of a chunk, grouped heads, several rows: every bit from scalar loops."""
    tokens, heads, kv_heads, d = 1040, 4, 2, 2
    q, k, v = random(3, heads, d), random(kv_heads, tokens, d, seed=1), random(kv_heads, tokens, d, seed=2)
    positions = np.array([3, 1023, 1039], np.int32)
    found = reference.attend(q, positions, k, v, 1 / math.sqrt(d), window=window, softcap=softcap)
    for row, position in enumerate(positions):
        for head in range(heads):
            keys, values = k[head // 2], v[head // 2]
            seen = range(max(0, position + 1 - window) if window else 0, position + 1)
            scores = {}
            for t in seen:
                s = F(0)
                for i in range(d):
                    s = s + q[row, head, i] * keys[t, i]
                scores[t] = s * F(1 / math.sqrt(d))
                if softcap:
                    scores[t] = F(softcap) * reference.tanh(np.array([scores[t] / F(softcap)]))[0]
            top = max(scores.values())
            e = {t: reference.exp(np.array([s - top]))[0] for t, s in scores.items()}
            total, mixed = None, None
            for start in range(seen[0] // 1024 * 1024, position + 1, 1024):
                chunk = range(start, min(start + 1024, position + 1))
                part = [F(0)] * d
                for t in chunk:
                    if t in seen:
                        part = [part[i] + e[t] * values[t, i] for i in range(d)]
                weight = scalar_r16([e.get(t, F(0)) for t in chunk])
                total = weight if total is None else total + weight
                mixed = part if mixed is None else [m + p for m, p in zip(mixed, part, strict=True)]
            assert [m / total for m in mixed] == list(found[row, head])


def test_what_a_row_may_not_see_cannot_spoil_it() -> None:
    q, k, v = random(2, 1, 4), random(1, 6, 4, seed=1), random(1, 6, 4, seed=2)
    positions = np.array([3, 5], np.int32)
    clean = reference.attend(q, positions, k, v, 0.5)
    k[0, 4:], v[0, 4:] = np.nan, np.inf
    spoiled = reference.attend(q, positions, k, v, 0.5)
    np.testing.assert_array_equal(spoiled[0], clean[0])
    assert not np.isfinite(spoiled[1]).any()


def test_the_gated_unit_is_silu_times_up() -> None:
    gate, up = random(3, 20) * F(4), random(3, 20, seed=1)
    found = reference.silu_glu(gate, up)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(found, wide / (1 + np.exp(-wide)) * up, rtol=1e-6)
    assert abs(reference.silu_glu(np.array([[-1e4]], F), np.ones((1, 1), F))) < 1e-33  # e^88.3 is the clamp


def test_the_gated_unit_is_gelu_times_up() -> None:
    gate, up = random(3, 20) * F(4), random(3, 20, seed=1)
    wide = gate.astype(np.float64)
    truth = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) * up
    np.testing.assert_allclose(reference.gelu_tanh_glu(gate, up), truth, rtol=1e-6, atol=1e-6)


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    one = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -0.0, np.inf, -np.inf], F)
    stored = reference.narrow_bf16(one)
    assert [hex(bits) for bits in stored] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0x8000", "0x7f80", "0xff80"]
    every_nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(F)
    assert all(bits & 0x7F80 == 0x7F80 and bits & 0x7F for bits in reference.narrow_bf16(every_nan))


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    key: tuple[int, int], counter: tuple[int, int, int, int], words: tuple[int, ...]
) -> None:
    assert reference.philox(key, counter) == words


def args(rows: int, **changes: float) -> SampleArgs:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": -1} | changes
    return SampleArgs(
        temperature=np.full(rows, values["temperature"], F),
        top_k=np.full(rows, values["top_k"], np.int32),
        top_p=np.full(rows, values["top_p"], F),
        min_p=np.full(rows, values["min_p"], F),
        seed=np.full(rows, 7, np.uint64),
        choice=np.zeros(rows, np.uint32),
        position=np.arange(rows, dtype=np.uint32),
        logprobs=np.full(rows, values["logprobs"], np.int32),
    )


LOGITS = np.log(np.array([0.1, 0.4, 0.1, 0.25, 0.15], F))


def drawn(rows: int = 4000, **changes: float) -> Counter[int]:
    sampled = reference.sample_reference(np.tile(LOGITS, (rows, 1)), args(rows, **changes))
    return Counter(sampled.tokens.tolist())


def test_greedy_takes_the_largest_and_the_lower_id_of_equals() -> None:
    logits = np.array([[1, 3, 3, 2], [-1, -1, -1, -1]], F)
    assert list(reference.sample_reference(logits, args(2, temperature=0)).tokens) == [1, 0]


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    counts, rows = drawn(), 4000
    for token, p in enumerate(np.exp(LOGITS.astype(np.float64))):
        assert abs(counts[token] - rows * p) < 5 * math.sqrt(rows * p * (1 - p))


def test_temperature_sharpens() -> None:
    counts, weights = drawn(temperature=0.5), np.exp(2 * LOGITS.astype(np.float64))
    for token, p in enumerate(weights / weights.sum()):
        assert abs(counts[token] - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 4}, {1, 3, 4, 0}),  # of two equals the lower id
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 4}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.2}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # 0.65 of the 0.8 that top_k left is more than 0.8 of it
        ({"top_k": 4, "min_p": 0.3}, {1, 3, 4}),
    ],
)
def test_filters_keep_what_they_say(filters: dict[str, float], kept: set[int]) -> None:
    assert set(drawn(2000, **filters)) == kept


def test_penalties_and_biases_are_computed_in_their_order() -> None:
    logits = np.array([2, -2, 3, 4, 5, -1], F)
    changes = Adjustments(
        repetition=np.array([2], F),
        presence=np.array([0.5], F),
        frequency=np.array([0.25], F),
        bias_start=np.array([0, 2], np.int64),
        bias_ids=np.array([0, 4], np.int32),
        biases=np.array([-3, -np.inf], F),
        seen_start=np.array([0, 4], np.int64),
        seen_ids=np.array([0, 1, 2, 4], np.int32),
        made=np.array([0, 1, 4, 1], np.int32),
    )
    # The biased 2 - 3 is below zero, so repetition moves it away from zero; id 2: 3 / 2 - 4 * 0.25 - 0.5.
    want = [-2, -4.75, 0, 4, -np.inf, -1]
    np.testing.assert_array_equal(reference.adjusted(logits, 0, changes), np.array(want, F))
    np.testing.assert_array_equal(reference.adjusted(logits, 0, Adjustments.neutral(1)), logits)


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    rows = 64
    logits = random(rows, 200)
    base = args(rows)
    first = reference.sample_reference(logits, base).tokens
    order = np.random.default_rng(0).permutation(rows)
    columns = [name for name in SampleArgs.__slots__ if getattr(base, name) is not None]
    shuffled = SampleArgs(**{name: getattr(base, name)[order] for name in columns})
    np.testing.assert_array_equal(reference.sample_reference(logits[order], shuffled).tokens, first[order])
    for name in ("seed", "choice", "position"):
        changed = {each: getattr(base, each) for each in columns}
        changed[name] = changed[name] + changed[name].dtype.type(1 << 20)
        assert (reference.sample_reference(logits, SampleArgs(**changed)).tokens != first).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_cannot_be_sampled_spoils_no_other(poison: float, temperature: float) -> None:
    logits = random(3, 50)
    clean = reference.sample_reference(logits, args(3, temperature=temperature)).tokens
    logits[1, 10] = poison
    spoiled = reference.sample_reference(logits, args(3, temperature=temperature, logprobs=2))
    assert list(spoiled.tokens) == [clean[0], NO_TOKEN, clean[2]]
    assert np.isnan(spoiled.logprob[1]) and (spoiled.top_ids[1] == NO_TOKEN).all()


def test_tokens_ruled_out_by_minus_infinity_are_never_drawn() -> None:
    logits = np.tile(LOGITS, (500, 1))
    logits[:, [1, 3]] = -np.inf
    assert set(reference.sample_reference(logits, args(500)).tokens) == {0, 2, 4}
    logits[:] = -np.inf
    assert set(reference.sample_reference(logits, args(500)).tokens) == {NO_TOKEN}


def test_log_probabilities_are_those_before_temperature_and_filters() -> None:
    logits = random(4, 300) * F(5)
    sampled = reference.sample_reference(logits, args(4, temperature=0.3, top_k=2, logprobs=20))
    wide = logits.astype(np.float64)
    truth = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    for row in range(4):
        best = np.argsort(-logits[row], kind="stable")[:20]
        assert list(sampled.top_ids[row]) == list(best)
        np.testing.assert_allclose(sampled.top_logprobs[row], truth[row, best], rtol=1e-6)
        assert sampled.logprob[row] == pytest.approx(truth[row, sampled.tokens[row]], rel=1e-6)


def test_log_probabilities_come_only_where_they_are_asked_for() -> None:
    none = reference.sample_reference(random(1, 30), args(1))
    assert np.isnan(none.logprob[0]) and (none.top_ids == NO_TOKEN).all()
    zero = reference.sample_reference(random(1, 30), args(1, logprobs=0))
    assert np.isfinite(zero.logprob[0]) and (zero.top_ids == NO_TOKEN).all()
    few = reference.sample_reference(random(1, 3), args(1, logprobs=20))
    assert (few.top_ids[0, :3] >= 0).all() and (few.top_ids[0, 3:] == NO_TOKEN).all()
