"""A real model with a window in some of its layers: what is behind it is freed, and no bit of an answer changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.engine.engine import Engine
from vai.errors import NotEnoughRoom
from vai.kernels import table
from vai.kernels.program import PAGE_TOKENS, StepArgs
from vai.models.decoder import build
from vai.request import Request, SamplingParams, TokenLogprob
from vai.rom.segment import attach

Make = Callable[..., Engine]
SHAPE = "tiny-gemma2"
PROMPT = [(61 * i * i + 17 * i + 7) % SHAPES[SHAPE].vocabulary for i in range(150)]
MADE = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    base = tmp_path_factory.mktemp("windowed")
    synthesize(base / "model.gguf", shape=SHAPE, type="Q8_0")
    return base / "root", burn(base / "model.gguf", base / "root").digest


def by_reference(root: Path, digest: str, tokens: list[int]) -> list[int]:
    """The most likely token behind each of `tokens`, from one step of the reference that keeps every page."""
    program = build(SHAPES[SHAPE])
    pages = -(-len(tokens) // PAGE_TOKENS)
    sizes = [group.page_bytes("bf16") for group in program.groups]
    tables = tuple(sum(sizes[:g]) * pages + np.arange(pages)[None, :] * size for g, size in enumerate(sizes))
    with attach(root, digest) as image:
        plan = table.lower(
            program,
            image,
            backend="reference",
            max_rows=len(tokens),
            max_sequences=len(tokens),
            workers=table.make_workers(1),
        )
        step = StepArgs(
            tokens=np.array(tokens, np.int32),
            positions=np.arange(len(tokens), dtype=np.int32),
            seq_start=np.array([0, len(tokens)], np.int32),
            context=np.zeros(1, np.int32),
            block_tables=tables,
            output_rows=np.arange(len(tokens), dtype=np.int32),
        )
        logits = plan.forward(step, np.full(pages * sum(sizes), 0xFF, np.uint8))
        return [int(token) for token in logits.argmax(axis=1)]


def asked(engine: Engine, digest: str, prompts: list[list[int]], **how: bool) -> list[tuple[list[int], int]]:
    """Answers and tokens taken from the cache; all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=MADE)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=str(i), image=digest, tokens=prompt, sampling=sampling, **how))
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    cached = dict.fromkeys(answers, 0)
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            answers[output.id] += output.tokens
            cached[output.id] += output.cached_tokens
    return [(answers[identity], cached[identity]) for identity in answers]


def test_answers_are_the_reference_s_with_pages_freed_found_again_and_computed_again(
    model: tuple[Path, str], make_engine: Make
) -> None:
    root, digest = model
    program = build(SHAPES[SHAPE])
    assert [group.window for group in program.groups] == [None, 20]
    engine = make_engine(root, slabs=2)
    engine.attach(digest)
    [(first, hit)] = asked(engine, digest, [PROMPT])
    assert (len(first), hit) == (MADE, 0)
    told = by_reference(root, digest, PROMPT + first)
    assert first == told[len(PROMPT) - 1 : -1]
    turn = [*PROMPT, *first, 3, 5]  # goes on; the other needs pages that the window had left behind
    fork = [*PROMPT[:100], 9]
    together = asked(engine, digest, [turn, fork])
    assert [hit for _, hit in together] == [192, 0]
    for prompt, (answer, _) in zip((turn, fork), together, strict=True):
        assert asked(make_engine(root, slabs=2), digest, [prompt], cache=False) == [(answer, 0)]


def test_the_group_with_a_window_holds_two_pages_of_a_long_sequence(model: tuple[Path, str], make_engine: Make) -> None:
    root, digest = model
    engine = make_engine(root, slabs=2)
    sampling = SamplingParams(temperature=0, max_tokens=MADE)
    engine.submit(Request(id="a", image=digest, tokens=PROMPT, sampling=sampling, cache=False))
    made, most = 0, 0
    while engine.has_work():
        made += sum(len(output.tokens) for output in engine.step())
        if made:
            most = max(most, engine.status().models[0].pages)
    assert most == 7 + 2  # of 200 tokens, those of all layers that see everything, and those of the others


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Pages of half a MiB for the layer that sees everything, of 1 MiB for the two with a window."""
    base = tmp_path_factory.mktemp("wide")
    shape = replace(SHAPES[SHAPE], heads=16, kv_heads=16, head_dim=256, rope_dims=256)
    synthesize(base / "model.gguf", shape=shape, type="Q8_0")
    return base / "root", burn(base / "model.gguf", base / "root").digest


def told(engine: Engine, digest: str, prompts: list[list[int]], **how: bool) -> list[list[TokenLogprob]]:
    """Answers with the logprobs of each token and its rivals; all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=str(i), image=digest, tokens=prompt, sampling=sampling, **how))
    answers: dict[str, list[TokenLogprob]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            answers[output.id] += output.logprobs
    return list(answers.values())


def test_prompts_run_to_the_same_bits_where_only_their_windows_fit(wide: tuple[Path, str], make_engine: Make) -> None:
    root, digest = wide
    prompts = [[(61 * i * i + 17 * i + seed) % SHAPES[SHAPE].vocabulary for i in range(530)] for seed in (1, 2)]
    expected = told(make_engine(root, slabs=8), digest, prompts)
    assert all(len(answer) == 12 for answer in expected)
    one = make_engine(root, slabs=2)  # room for 16 pages of the windowed group: fewer than a step of 512 rows needs
    assert told(one, digest, prompts) == expected  # one after the other
    both = make_engine(root, slabs=3, max_rows=32)
    assert told(both, digest, prompts, cache=False) == expected  # beside each other
    assert one.status().models[0].preemptions == both.status().models[0].preemptions == 0
    with pytest.raises(NotEnoughRoom, match=r"530 tokens, .* holds 0 of this model.*VAI_KV=32M"):
        told(make_engine(root, slabs=1), digest, prompts)


def test_fast_pages_are_the_same_where_windows_free_what_is_behind_them(
    model: tuple[Path, str], make_engine: Make
) -> None:
    root, digest = model
    prompts = [[(61 * i * i + 17 * i + seed) % SHAPES[SHAPE].vocabulary for i in range(260)] for seed in (1, 2)]
    alone = [told(make_engine(root, slabs=2, fast="portable"), digest, [prompt])[0] for prompt in prompts]
    exact = told(make_engine(root, slabs=2), digest, prompts)
    assert all(left != right for left, right in zip(alone, exact, strict=True))
    engine = make_engine(root, slabs=2, max_rows=23, fast="portable")
    for how in ({}, {}, {"cache": False}):  # computed, found, and computed again
        assert told(engine, digest, prompts, **how) == alone
    assert told(engine, digest, prompts, deterministic=True) == exact
