"""Models with experts in the serving engine: the reference's tokens and logprobs to the bit, however they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vai import LLM
from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.engine.engine import Engine
from vai.kernels import table
from vai.kernels.program import PAGE_TOKENS, StepArgs
from vai.kernels.reference import log_probabilities
from vai.models.decoder import build
from vai.request import Request, SamplingParams, Speculate, TokenLogprob
from vai.rom.segment import attach

Make = Callable[..., Engine]
Answer = tuple[list[int], list[TokenLogprob]]

MADE, RIVALS = 16, 3
MODELS = [("tiny-qwen3moe", "Q8_0"), ("tiny-qwen2moe", "Q4_0")]
PROMPTS = [[(61 * i * i + 17 * i + seed) % 500 for i in range(length)] for seed, length in ((7, 70), (3, 20), (1, 1))]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(model))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(root, digest, shape)"""
    shape, type = request.param
    base = tmp_path_factory.mktemp("experts")
    synthesize(base / "model.gguf", shape=shape, type=type)
    return base / "root", burn(base / "model.gguf", base / "root").digest, shape


def asked(engine: Engine, digest: str, prompts: list[list[int]], **how: object) -> list[Answer]:
    """The greedy answers, all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=MADE, logprobs=RIVALS)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=str(i), image=digest, tokens=prompt, sampling=sampling, **how))
    answers: dict[str, Answer] = {str(i): ([], []) for i in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            answers[output.id][0].extend(output.tokens)
            answers[output.id][1].extend(output.logprobs)
    return list(answers.values())


def said_by_reference(root: Path, digest: str, shape: str, prompt: list[int], answer: list[int]) -> Answer:
    """What the reference says behind the prompt and each token of the answer, from one step."""
    program, tokens = build(SHAPES[shape]), prompt + answer[:-1]
    pages, rows = -(-len(tokens) // PAGE_TOKENS), len(tokens)
    size = program.groups[0].page_bytes("bf16")
    with attach(root, digest) as image:
        plan = table.lower(
            program, image, backend="reference", max_rows=rows, max_sequences=rows, workers=table.make_workers(1)
        )
        step = StepArgs(
            tokens=np.array(tokens, np.int32),
            positions=np.arange(rows, dtype=np.int32),
            seq_start=np.array([0, rows], np.int32),
            context=np.zeros(1, np.int32),
            block_tables=(np.arange(pages, dtype=np.int64)[None, :] * size,),
            output_rows=np.arange(len(prompt) - 1, rows, dtype=np.int32),
        )
        logits = plan.forward(step, np.full(pages * size, 0xFF, np.uint8))
    said = []
    for row in logits:
        best = np.argsort(-row, kind="stable")[:RIVALS]
        found = [float(each) for each in log_probabilities(row, np.array([best[0], *best]))]
        said.append(TokenLogprob(found[0], best.tolist(), found[1:]))
    return logits.argmax(axis=1).tolist(), said


@pytest.fixture(scope="module")
def alone(model: tuple[Path, str, str]) -> list[Answer]:
    """Each prompt in an engine that never sees another, with one thread."""
    answers = []
    for prompt in PROMPTS:
        engine = Engine(model[0], threads=1, pool=np.full(64 << 20, 0xFF, np.uint8))
        answers += asked(engine, model[1], [prompt])
        engine.close()
    return answers


def test_an_engine_s_answers_are_the_reference_s_tokens_and_logprobs(
    model: tuple[Path, str, str], alone: list[Answer]
) -> None:
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        assert len(answer[0]) == MADE
        assert said_by_reference(*model, prompt, answer[0]) == answer
    assert len({tuple(tokens) for tokens, _ in alone}) == len(PROMPTS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", table.isas())
def test_no_bit_depends_on_company_chunks_threads_or_instruction_set(
    model: tuple[Path, str, str], alone: list[Answer], make_engine: Make, isa: str, threads: int
) -> None:
    engine = make_engine(model[0], slabs=2, threads=threads, isa=isa, max_rows=16)
    assert asked(engine, model[1], PROMPTS) == alone
    again = asked(engine, model[1], PROMPTS, speculate=Speculate(kind="ngram"))  # and from the prefix cache
    assert again == alone


def test_llm_gives_the_same_answers(model: tuple[Path, str, str], alone: list[Answer], tmp_path: Path) -> None:
    root, digest, _ = model
    sampling = SamplingParams(temperature=0, max_tokens=MADE, logprobs=RIVALS)
    with LLM(digest, root=root, names=tmp_path, threads=2, kv_bytes=32 << 20) as llm:
        answers, ends = llm.generate(PROMPTS, sampling), llm.sampling().stop_ids
    for answer, (tokens, logprobs) in zip(answers, alone, strict=True):
        made = next((i for i, token in enumerate(tokens, 1) if token in ends), MADE)
        assert (answer.token_ids, answer.logprobs) == (tokens[:made], logprobs[:made])
