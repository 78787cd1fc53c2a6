"""Sampling: the native draw is the reference's, token by token and bit by bit, over small and real vocabularies."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vai.errors import NotSupported
from vai.kernels import reference, table
from vai.kernels.program import Adjustments, Masks, SampleArgs, Sampled

Floats = NDArray[np.float32]


def arguments(rows: int, **columns: object) -> SampleArgs:
    """SampleArgs of `rows` rows; a column is a value for all or a list."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "choice": 0, "position": 0}
    values |= {"logprobs": -1, **columns}
    types = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.uint32, np.uint32, np.int32)
    made = {name: np.array(values[name], t) for name, t in zip(values, types, strict=True)}
    return SampleArgs(**{name: np.broadcast_to(value, rows).copy() for name, value in made.items()})


def same(got: Sampled, want: Sampled) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.logprob.view(np.uint32), want.logprob.view(np.uint32))
    np.testing.assert_array_equal(got.top_ids, want.top_ids)
    np.testing.assert_array_equal(got.top_logprobs.view(np.uint32), want.top_logprobs.view(np.uint32))


@pytest.fixture(params=table.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


GRID = list(itertools.product((0.0, 0.3, 1.0, 1.7), (0, 1, 5, 5000), (1.0, 0.9, 0.3, 0.0), (0.0, 0.05, 1.0)))


@pytest.mark.parametrize("vocabulary", [1, 7, 523, 3000])
def test_every_setting_draws_what_the_reference_draws(isa: str, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = (rng.standard_normal((len(GRID), vocabulary)) * 3).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # many ties
    logits[1::5, ::2] = -np.inf  # masked out
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*GRID, strict=True))
    for seed in range(4):
        args = arguments(
            len(GRID),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=rng.integers(0, 1 << 63, len(GRID)) * 2 + 1,
            choice=seed,
            position=np.arange(len(GRID)),
            logprobs=np.arange(len(GRID)) % 22 - 1,
        )
        same(table.sample(logits, args, isa=isa), reference.sample_reference(logits, args))


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1.0, 8.0])
def test_a_real_vocabulary_from_flat_to_peaked(isa: str, spread: float) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((6, 151_936)) * spread).astype(np.float32)
    args = arguments(
        6,
        temperature=[1.0, 0.7, 1.0, 1.0, 0.8, 1.0],
        top_k=[0, 0, 40, 0, 40, 0],
        top_p=[1.0, 0.95, 1.0, 1.0, 0.9, 0.9999],
        min_p=[0.0, 0.0, 0.0, 0.05, 0.05, 0.0],
        seed=[1, 2, 3, 4, 5, (1 << 64) - 1],
        position=1000,
        logprobs=[-1, 0, 1, 5, 20, 20],
    )
    same(table.sample(logits, args, isa=isa), reference.sample_reference(logits, args))


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_threads_that_share_the_rows_draw_what_one_draws(isa: str, rows: int) -> None:
    logits = np.random.default_rng(4).standard_normal((rows, 3000)).astype(np.float32)
    logits[1::4, 7] = np.nan
    args = arguments(rows, top_p=0.95, seed=np.arange(rows), position=9, logprobs=3)
    same(table.sample(logits, args, isa=isa, workers=table.make_workers(3)), table.sample(logits, args, isa=isa))


@pytest.mark.parametrize("temperature", [0.011, 0.7, 60.0])
def test_what_is_found_by_the_peaks_of_a_row_is_what_sorting_all_of_it_gives(isa: str, temperature: float) -> None:
    """Logits that differ in their last bits, whose probabilities may stand the other way round; ties; rows of -inf."""
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((7, 40_000)) * 3).astype(np.float32)
    logits[1] = np.float32(9.5) - rng.integers(0, 600, 40_000).astype(np.float32) * np.float32(2.0**-20)
    logits[2] = np.round(logits[2])
    logits[3, rng.permutation(40_000)[:39_970]] = -np.inf
    logits[4, 100:] = -np.inf
    logits[5, :300] = np.float32(50) + np.arange(300, dtype=np.float32)[::-1] * np.float32(2.0**-18)
    logits[6] *= 1e4
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.2), (33, 0.8, 0.0), (150, 1.0, 0.2)):
        args = arguments(7, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=range(7), logprobs=20)
        same(table.sample(logits, args, isa=isa), reference.sample_reference(logits, args))


def test_draws_among_the_first_hundred_the_first_thousand_and_behind(isa: str) -> None:
    """A long tail: the first 128 have 43 % of the mass, the first 1,024 have 60 %. These are ranked first."""
    rows, vocabulary = 24, 151_936
    ranks = np.random.default_rng(6).permutation(vocabulary)
    logits = np.tile(-np.log(ranks + 1).astype(np.float32), (rows, 1))
    plain = arguments(rows, position=np.arange(rows))
    sampled = table.sample(logits, plain, isa=isa)
    assert set(np.searchsorted([128, 1024], ranks[sampled.tokens], side="right")) == {0, 1, 2}
    same(sampled, reference.sample_reference(logits, plain))
    top_k, top_p, min_p = [0, 600, 2374, 2375] * 6, [0.5, 1.0, 0.9] * 8, [0.0, 0.001] * 12
    cut = arguments(rows, top_k=top_k, top_p=top_p, min_p=min_p, position=7)
    same(table.sample(logits, cut, isa=isa), reference.sample_reference(logits, cut))


def test_a_row_that_cannot_be_sampled_ends_alone(isa: str) -> None:
    logits = np.tile(np.arange(50, dtype=np.float32), (6, 1))
    logits[1, 20] = np.nan
    logits[2, 49] = np.inf
    logits[3] = -np.inf
    args = arguments(6, temperature=[1.0, 0.0, 1.0, 1.0, 1e-42, 0.0], logprobs=3)
    sampled = table.sample(logits, args, isa=isa)
    assert sampled.tokens[1:5].tolist() == [table.NO_TOKEN] * 4
    assert sampled.tokens[0] >= 0
    assert sampled.tokens[5] == 49
    assert math.isnan(sampled.logprob[2])
    same(sampled, reference.sample_reference(logits, args))


def test_draws_follow_the_probabilities(isa: str) -> None:
    p = np.array([0.5, 0.25, 0.15, 0.1])
    draws = 20_000
    logits = np.tile(np.log(p).astype(np.float32), (draws, 1))
    tokens = table.sample(logits, arguments(draws, position=np.arange(draws)), isa=isa).tokens
    counts = np.bincount(tokens, minlength=4)
    assert (np.abs(counts - draws * p) < 5 * np.sqrt(draws * p * (1 - p))).all()


def test_logits_may_be_columns_of_a_wider_array(isa: str) -> None:
    wide = np.random.default_rng(5).standard_normal((4, 80)).astype(np.float32)
    args = arguments(4, seed=[1, 2, 3, 4], logprobs=2)
    same(table.sample(wide[:, :61], args, isa=isa), table.sample(wide[:, :61].copy(), args, isa=isa))


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(NotSupported, match="'mmx' kernels; it has scalar"):
        table.sample(np.zeros((1, 4), np.float32), arguments(1), isa="mmx")


def adjustments(rows: int, vocabulary: int, rng: np.random.Generator, penalties: Floats) -> Adjustments:
    """Up to 300 biases and a history of any length for each row; `penalties` [3]: repetition, presence, frequency."""
    biased = [rng.integers(0, vocabulary, rng.integers(0, 301)) for _ in range(rows)]
    seen = [rng.permutation(vocabulary)[: rng.integers(0, vocabulary + 1)] for _ in range(rows)]
    biases = [rng.uniform(-100, 100, len(ids)).astype(np.float32) for ids in biased]
    for row in biases:
        row[:1] = -np.inf
    made = [rng.integers(0, 4, len(ids)) * rng.integers(1, 500, len(ids)) for ids in seen]

    def starts(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, parts)], dtype=np.int64)

    repetition, presence, frequency = (np.full(rows, value, np.float32) for value in penalties)
    return Adjustments(
        repetition,
        presence,
        frequency,
        starts(biased),
        np.concatenate(biased).astype(np.int32),
        np.concatenate(biases),
        starts(seen),
        np.concatenate(seen).astype(np.int32),
        np.concatenate(made).astype(np.int32),
    )


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 17, 500, 3000]),
    seed=st.integers(0, 1 << 32),
    repetition=st.floats(0.015625, 100, width=32),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([1.0, 0.9]),
)
def test_penalties_and_biases_draw_what_the_reference_draws(
    rows: int,
    vocabulary: int,
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, vocabulary)) * 4).astype(np.float32)
    logits[:, ::3] = np.round(logits[:, ::3])
    changed = adjustments(rows, vocabulary, rng, np.array([repetition, presence, frequency], np.float32))
    args = arguments(
        rows, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=range(rows), logprobs=3
    )
    args = replace(args, adjustments=changed)
    expected = reference.sample_reference(logits, args)
    for name in table.isas():
        same(table.sample(logits, args, isa=name), expected)


def test_logprobs_stay_those_of_the_model(isa: str) -> None:
    logits = np.random.default_rng(2).standard_normal((3, 200)).astype(np.float32)
    ban = np.argmax(logits, axis=1).astype(np.int32)
    changed = replace(
        Adjustments.neutral(3),
        bias_start=np.arange(4, dtype=np.int64),
        bias_ids=ban,
        biases=np.full(3, -np.inf, np.float32),
    )
    args = arguments(3, temperature=[0.0, 1.0, 0.2], logprobs=20)
    plain, changed_rows = table.sample(logits, args, isa=isa), replace(args, adjustments=changed)
    banned = table.sample(logits, changed_rows, isa=isa)
    assert (banned.tokens != ban).all() and (banned.top_ids[:, 0] == ban).all()
    np.testing.assert_array_equal(banned.top_logprobs, plain.top_logprobs)
    np.testing.assert_array_equal(banned.logprob < banned.top_logprobs[:, 0], True)


def test_rows_without_adjustments_beside_rows_with_them_draw_as_alone(isa: str) -> None:
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((4, 700)).astype(np.float32)
    changed = adjustments(4, 700, rng, np.array([1.3, 0.5, 0.1], np.float32))
    args = arguments(4, seed=[1, 2, 3, 4], logprobs=1)
    together = table.sample(logits, replace(args, adjustments=changed), isa=isa)
    for row in range(4):
        b, h = changed.bias_start[row : row + 2], changed.seen_start[row : row + 2]
        own = Adjustments(
            *(getattr(changed, name)[row : row + 1] for name in ("repetition", "presence", "frequency")),
            b - b[0],
            changed.bias_ids[b[0] : b[1]],
            changed.biases[b[0] : b[1]],
            h - h[0],
            changed.seen_ids[h[0] : h[1]],
            changed.made[h[0] : h[1]],
        )
        alone = replace(arguments(1, seed=row + 1, logprobs=1), adjustments=own)
        assert table.sample(logits[row : row + 1], alone, isa=isa).tokens[0] == together.tokens[row]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seen_ids", [0, 9]), ("seen_ids", [0, -1]), ("seen_start", [1, 2]), ("seen_start", [0, 3]), ("made", [1])],
)
def test_adjustments_outside_the_vocabulary_or_their_own_arrays_are_not_computed(field: str, value: list[int]) -> None:
    sound = replace(
        Adjustments.neutral(1),
        seen_start=np.array([0, 2], np.int64),
        seen_ids=np.array([3, 4], np.int32),
        made=np.array([1, 2], np.int32),
    )
    broken = replace(sound, **{field: np.array(value, getattr(sound, field).dtype)})
    with pytest.raises(ValueError, match="adjustments need ids"):
        table.sample(np.zeros((1, 9), np.float32), replace(arguments(1), adjustments=broken))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 9, 523, 3000])
def test_what_is_drawn_under_a_mask_is_what_the_reference_draws_and_is_allowed(isa: str, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    rows = len(GRID)
    logits = (rng.standard_normal((rows, vocabulary)) * 3).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    allowed = rng.random((rows, vocabulary)) < rng.choice([0.002, 0.3, 0.99], (rows, 1))
    allowed[np.arange(rows), rng.integers(0, vocabulary, rows)] = True
    of = np.where(rng.random(rows) < 0.8, np.arange(rows), -1).astype(np.int32)
    bits = np.packbits(allowed, axis=1, bitorder="little")
    bits[:, -1] |= np.uint8(0xFF << (vocabulary - 1) % 8 + 1 & 0xFF)  # bits behind the vocabulary say nothing
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*GRID, strict=True))
    free = arguments(
        rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=rng.integers(0, 1 << 63, rows),
        position=np.arange(rows),
        logprobs=np.arange(rows) % 22 - 1,
    )
    masked = replace(free, masks=Masks(bits, of))
    drawn = table.sample(logits, masked, isa=isa)
    same(drawn, reference.sample_reference(logits, masked))
    assert (allowed[np.arange(rows), drawn.tokens] | (of < 0)).all()
    unmasked = table.sample(logits, free, isa=isa)
    np.testing.assert_array_equal(drawn.top_logprobs.view(np.uint32), unmasked.top_logprobs.view(np.uint32))
    np.testing.assert_array_equal(drawn.tokens[of < 0], unmasked.tokens[of < 0])


def test_no_rounding_draws_a_token_that_the_mask_forbids(isa: str) -> None:
    """Sums of probabilities depend on their order, and a draw may be just under 1: what is left then is allowed too."""
    vocabulary, rows = 4096, 512
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((rows, vocabulary)) * 8).astype(np.float32)
    allowed = np.zeros((rows, vocabulary), bool)
    allowed[:, : vocabulary // 2 : 3] = True
    bits = Masks(np.packbits(allowed, axis=1, bitorder="little"), np.arange(rows, dtype=np.int32))
    args = replace(arguments(rows, seed=np.arange(rows), position=7), masks=bits)
    tokens = table.sample(logits, args, isa=isa).tokens
    assert allowed[np.arange(rows), tokens].all()
    assert allowed[0, reference.draw(reference.masked(logits[0], bits.bits[0]), 1.0, 0, 1.0, 0.0, 1.0)]


def test_a_mask_that_leaves_nothing_and_a_logit_that_is_no_number_end_their_rows_alone(isa: str) -> None:
    logits = np.zeros((3, 16), np.float32)
    logits[1, 9] = np.nan
    bits = np.array([[0, 0], [1, 0], [0, 4]], np.uint8)
    args = replace(arguments(3), masks=Masks(bits, np.arange(3, dtype=np.int32)))
    got = table.sample(logits, args, isa=isa)
    same(got, reference.sample_reference(logits, args))
    assert got.tokens.tolist() == [-1, -1, 10]


@pytest.mark.parametrize(("bits", "of"), [((1, 1), 0), ((1, 2), 1), ((1, 2), -2)])
def test_a_mask_that_is_none_is_refused(bits: tuple[int, int], of: int) -> None:
    args = replace(arguments(1), masks=Masks(np.ones(bits, np.uint8), np.array([of], np.int32)))
    with pytest.raises(ValueError, match="a mask needs a bit for each token"):
        table.sample(np.zeros((1, 16), np.float32), args)
