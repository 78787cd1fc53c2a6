"""The load benchmark on real processes with tiny models: the small twin of what `bench/serve.py` does at full size."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx2
import openai
import pytest

from vai.cli.bench.figures import Goal
from vai.cli.bench.rudeness import gone, many, stall
from vai.cli.bench.serving import Point, Row, Rules, header, line, measure, run_alone, write
from vai.cli.bench.stand import Stand
from vai.cli.bench.systems import Vai
from vai.cli.bench.traffic import Record, open_loop, send
from vai.cli.bench.workload import Ask, Workload, asks, pauses
from vai.kernels.program import MAX_SEQUENCES
from vai.rom.registry import Name

IDS = range(300, 500)
MODELS = ["tiny", "tiny-qwen2"]


@pytest.fixture(scope="module")
def vai(tiny_root: tuple[Path, Path, dict[str, str]]) -> Iterator[Vai]:
    root, _, digests = tiny_root
    with Stand(threads=1, kv_bytes=128 << 20) as stand:
        shutil.copytree(root / "images", stand.root / "images")
        for name, digest in digests.items():
            stand.registry().put(Name(name, "", digest=digest))
        stand.start()
        for name in MODELS:
            stand.one_token(name, [65])
        yield Vai(stand, MODELS)


def test_the_load_client_reads_what_the_openai_client_reads(vai: Vai) -> None:
    ask = Ask(random.Random(1).choices(IDS, k=20), 40)
    record = asyncio.run(send(vai.target, "tiny", ask, [], keep_text=True))
    with httpx2.Client(timeout=60) as http:
        api = openai.OpenAI(
            base_url=f"http://127.0.0.1:{vai.target.ports['tiny']}/v1", api_key="none", http_client=http, max_retries=0
        )
        body = {"ignore_eos": True}
        told = api.completions.create(
            model="tiny", prompt=ask.prompt, max_tokens=ask.answer, temperature=0, extra_body=body
        )
    assert record.complete and record.error is None
    assert "".join(record.text) == told.choices[0].text
    assert record.tokens == told.usage.completion_tokens == ask.answer
    assert 1 <= len(record.events) <= ask.answer
    assert len(record.events) < len(record.signs)  # random weights end tokens in half a character
    assert record.sent < record.events[0] <= record.events[-1] <= record.ended


def test_a_refusal_is_an_error_in_the_servers_own_words(vai: Vai) -> None:
    record = asyncio.run(send(vai.target, "tiny", Ask([10**6], 4), []))
    assert record.error is not None and record.error.startswith("400 ")
    assert "Token ids of 'tiny'" in record.error


def test_a_run_is_measured_with_what_the_processors_did(vai: Vai, tmp_path: Path) -> None:
    rules = Rules(0.8, Goal(5, 1), 1, list(IDS))
    rows = [measure(vai.of([MODELS[0]]), Point("decode", streams), rules) for streams in (1, 3)]
    for row in rows:
        assert row.figures.errors == 0
        assert row.figures.output_rate > 0
        assert 0 < row.overhead < row.cpu < 2
        assert 0 < row.native < 1.05
        assert len(line(row)) >= len(header()) - 1
    written = write(tmp_path / "serve", rows, "here")
    assert [path.name for path in written] == ["serve.csv", "serve-decode.svg"]
    assert len(written[0].read_text().splitlines()) == 3


def test_two_models_in_turns_are_compared_with_each_alone_at_the_same_batch(vai: Vai) -> None:
    rules = Rules(0.4, Goal(5, 1), 1, list(IDS))
    together = measure(vai, Point("two", 2), rules)
    assert set(together.tokens) == set(MODELS) and all(together.tokens.values())
    known = [measure(vai.of([MODELS[0]]), Point("decode", 2), rules)]
    said: list[Row] = []
    files = [Path(f"{name}.gguf") for name in MODELS]
    rows, found = run_alone(together, vai, files, rules, known, said.append)
    assert rows == said
    assert [(row.models, row.point.streams) for row in rows] == [("tiny", 1), ("tiny-qwen2", 1), ("tiny-qwen2", 2)]
    half = sum(together.tokens[row.models] / row.figures.output_rate for row in rows if row.point.streams == 1)
    assert found.efficiency == pytest.approx(half / together.figures.seconds)
    assert found.halved > 0


def test_an_open_loop_sends_what_comes_whether_or_not_others_are_answered(vai: Vai) -> None:
    work = asks(Workload(10, 30, 4), list(IDS), seed=1)
    arrivals = list(islice(pauses(50.0, seed=1), 200))
    due = next(number for number in range(200) if sum(arrivals[: number + 1]) > 0.3)
    records = asyncio.run(open_loop(vai.target, work, pauses=iter(arrivals), seconds=1.2))  # time for a slow machine
    assert len(records) >= due > 5
    assert {record.model for record in records} == set(MODELS)
    assert not [record.error for record in records if record.error]


def test_clients_that_leave_at_random_moments_leave_nothing_behind(vai: Vai) -> None:
    vai.rest()
    before = vai.counters()
    work = asks(Workload(10, 200, 16), list(IDS), seed=1)
    records = asyncio.run(gone(vai.target, work, clients=120, at_once=60, patience=2))
    vai.rest()  # every page is back
    complete = sum(record.complete for record in records)
    counted = vai.counters().since(before)
    assert counted.aborted > 0 and complete > 0
    assert counted.disagreements(clients=120, complete=complete) == []


def test_more_streams_than_run_at_once_all_come_to_their_end(vai: Vai) -> None:
    records = asyncio.run(many(vai.of(["tiny"]).target, asks(Workload(10, 40, 8), list(IDS), seed=2), streams=96))
    assert MAX_SEQUENCES < len(records) == 96
    assert all(record.complete and record.tokens == 8 for record in records)
    vai.rest()


def test_the_longest_wait_of_running_streams_is_seen_around_a_long_prompt(vai: Vai) -> None:
    found = asyncio.run(stall(vai.target, list(IDS), streams=2, length=1500, before=0.3, most=60))
    assert found.before > 0
    assert 0 < found.during <= found.text < found.first
    vai.rest()


def test_counters_that_cannot_be_true_are_named(vai: Vai) -> None:
    counters = vai.counters()
    wrong = counters._replace(ended=3, whole=1, aborted=1, tokens=9, engine_tokens=8, connections=1)
    assert len(wrong.disagreements(clients=2, complete=2)) == 5


def test_a_server_that_is_not_there_is_an_error_of_each_request(vai: Vai) -> None:
    records: list[Record] = []
    nowhere = vai.target.__class__({"tiny": 1})
    asyncio.run(send(nowhere, "tiny", Ask([300], 1), records))
    assert records[0].error is not None and records[0].error.startswith("no connection")
