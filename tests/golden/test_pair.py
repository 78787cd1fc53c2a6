"""The two models that VAI brings write the same by every way there is: each executor, `vai.LLM`, and HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest

from vai.burn.burn import burn
from vai.cli import shipped
from vai.cli.bench.stand import Stand
from vai.kernels import table
from vai.llm import LLM
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.request import SamplingParams
from vai.rom.registry import Name
from vai.rom.segment import attach

from .pair import COUNT, PAIR, ROOM, follow

ENTRIES: list[dict[str, Any]] = json.loads(PAIR.read_text())
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT)
UNADVISED = {"repetition_penalty": 1.0}  # against what the files recommend
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['model']}-{e['prompt'][:10].strip()}")


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    """A daemon with its engine and server, and the pair in memory."""
    with Stand(threads=1, kv_bytes=64 << 20) as found:
        for file in shipped.pair():
            digest = burn(file, found.root, huge_pages=False).digest
            found.registry().put(Name(file.stem, str(file), digest=digest))
        found.start()
        found.one_token(shipped.NAMES[0], [65])  # answered when all of it stands
        yield found


@pytest.fixture(scope="module")
def models(stand: Stand) -> Iterator[dict[str, LLM]]:
    with ExitStack() as undo:
        yield {
            name: undo.enter_context(LLM(name, root=stand.root, names=stand.names, threads=1, kv_bytes=64 << 20))
            for name in shipped.NAMES
        }


@pytest.fixture(scope="module")
def api(stand: Stand) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{stand.port}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("executor", ["reference", *table.isas()])
@each
def test_every_executor_has_the_golden_bits(
    entry: dict[str, Any], executor: str, stand: Stand, models: dict[str, LLM]
) -> None:
    llm = models[entry["model"]]
    with attach(stand.root, stand.registry().find(entry["model"])) as image:
        program = build(Spec.from_bytes(image.spec))
        plan = table.lower(
            program,
            image,
            backend="reference" if executor == "reference" else "native",
            isa=None if executor == "reference" else executor,
            max_rows=ROOM,
            max_sequences=ROOM,
            workers=table.make_workers(2),
        )
        written, logits = follow(plan, program, llm.encode(entry["prompt"]))
        del plan  # it reads the image, which is closed now
    assert (llm.decode(written), logits) == (entry["text"], entry["sha256"])


@each
def test_a_process_of_its_own_writes_the_golden_text(entry: dict[str, Any], models: dict[str, LLM]) -> None:
    assert models[entry["model"]].generate(entry["prompt"], GREEDY).text == entry["text"]


@each
def test_a_client_over_http_reads_the_golden_text(entry: dict[str, Any], api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model=entry["model"], prompt=entry["prompt"], temperature=0, max_tokens=COUNT, extra_body=UNADVISED
    )
    assert answer.choices[0].text == entry["text"]


def test_a_conversation_is_gone_on_with(api: openai.OpenAI) -> None:
    entry = ENTRIES[0]
    said = api.chat.completions.create(
        model=entry["model"],
        messages=[{"role": "user", "content": entry["prompt"]}],
        temperature=0,
        max_tokens=COUNT,
        extra_body=UNADVISED,
    )
    assert said.choices[0].message.content == entry["text"]
