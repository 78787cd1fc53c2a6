"""A prompt of 8,000 tokens beside running streams, computed by a real engine: each of its steps brings them a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.engine.engine import Engine
from vai.engine.scheduler import STEP_WHILE_STREAMING
from vai.kernels.program import MAX_ROWS
from vai.request import Request, SamplingParams

Make = Callable[..., Engine]
STREAMS = 4


@pytest.fixture(scope="module")
def long_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(root, digest) of a model whose context holds the prompt."""
    base = tmp_path_factory.mktemp("long")
    synthesize(
        base / "model.gguf",
        shape=replace(SHAPES["tiny"], layers=1, heads=1, kv_heads=1, context=16384),
        type="Q4_0",
        seed=2,
    )
    return base / "root", burn(base / "model.gguf", base / "root").digest


def test_running_streams_get_a_token_in_every_step_of_a_long_prompt(
    long_root: tuple[Path, str], make_engine: Make
) -> None:
    """How long the worst of these steps takes is printed (pytest -s), not asserted."""
    root, image = long_root
    engine = make_engine(root, slabs=2)
    sampling = SamplingParams(temperature=0, max_tokens=2000)
    streams = {str(number) for number in range(STREAMS)}
    for name in streams:
        engine.submit(Request(id=name, image=image, tokens=[int(name)] * 9, sampling=sampling))
    gaps: dict[str, list[float]] = {"before": [], "during": []}
    last = time.perf_counter()
    while len(gaps["before"]) < 50:
        assert engine.step()
        gaps["before"].append(time.perf_counter() - last)
        last = time.perf_counter()
    prompt = [number % 500 for number in range(8000)]
    engine.submit(Request(id="long", image=image, tokens=prompt, sampling=replace(sampling, max_tokens=1)))
    while True:
        came = {output.id for output in engine.step()}
        gaps["during"].append(time.perf_counter() - last)
        last = time.perf_counter()
        assert streams <= came
        if "long" in came:
            break
    assert len(gaps["during"]) >= 8000 / MAX_ROWS
    worst = {when: round(max(seconds), 4) for when, seconds in gaps.items()}
    print(f"worst seconds between two tokens of a stream: {worst}; the bound of a step is {STEP_WHILE_STREAMING}")
