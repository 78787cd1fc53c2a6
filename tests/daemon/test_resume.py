"""What clients see of a dying engine: a pause. Real daemon, engine and server, and the clients people use."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from vai.daemon import roles, service
from vai.engine.engine import Engine
from vai.engine.port import AskStatus, Hello, frame
from vai.engine.resume import RETRIES
from vai.engine.service import Service, listen
from vai.llm import Completion, Frontend, connect

PROMPT = "Once upon a time"
IGNORE = {"extra_body": {"ignore_eos": True}}
PATIENT = ("--patience", "60")  # an engine starts in a second, but not where many others want the same cores
STREAMS: dict[str, dict[str, Any]] = {
    "greedy": {"model": "tiny-qwen2", "temperature": 0, "max_tokens": 900, "logprobs": 2, **IGNORE},
    "sampled": {"model": "tiny", "temperature": 1, "seed": 7, "max_tokens": 900, "logprobs": 1, **IGNORE},
    "held off": {"model": "tiny", "seed": 3, "max_tokens": 700, "extra_body": {"min_tokens": 699}},
    "under a grammar": {
        "model": "tiny",
        "seed": 5,
        "max_tokens": 700,
        "extra_body": {"guided_regex": "([a-z]{2}[0-9]){700}"},
    },
}


@contextlib.contextmanager
def api(stand) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{stand.port}/v1", api_key="none", max_retries=0) as client:
        yield client


class Reading:
    """A stream on its way: its chunks, and how many characters are in them."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []  # the last one has the usage
        self.characters = 0

    def read(self, stand, **asked: Any) -> list[Any]:
        with api(stand) as client:
            options = {"include_usage": True}
            for chunk in client.completions.create(prompt=PROMPT, stream=True, stream_options=options, **asked):
                self.chunks.append(chunk)
                self.characters += sum(len(choice.text) for choice in chunk.choices)
        return said(self.chunks)


def said(chunks: list[Any]) -> list[Any]:
    """What came, however many tokens at once (guesses that stand come together)."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs is not None]
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    together = [[value for each in logprobs for value in getattr(each, field)] for field in fields]
    text, finish = "".join(choice.text for choice in choices), choices[-1].finish_reason
    return [text, finish, chunks[-1].usage.completion_tokens, *together]


def kill_engine(stand) -> None:
    """SIGKILL, and wait for the next one."""
    killed = stand.pid("engine")
    os.kill(killed, signal.SIGKILL)
    stand.until(lambda: stand.roles()["engine"]["pid"] not in (None, killed))
    stand.until(lambda: stand.roles()["engine"]["state"] == "ready")


def test_streams_of_two_models_do_not_see_their_engines_die(stand) -> None:
    stand.start(*PATIENT)
    expected = {name: Reading().read(stand, **asked) for name, asked in STREAMS.items()}
    readings = {name: Reading() for name in STREAMS}
    cut: list[str] = []  # which streams the first kill found unfinished
    with ThreadPoolExecutor(len(STREAMS)) as pool:
        streams = {name: pool.submit(readings[name].read, stand, **asked) for name, asked in STREAMS.items()}
        for more in (1, 30, 60):
            goal = {name: reading.characters + more for name, reading in readings.items()}
            # A stream whose guesses stand may be at its end before the others have come so far.
            stand.until(lambda goal=goal: all(readings[n].characters >= goal[n] or streams[n].done() for n in goal))
            cut = cut or [name for name, stream in streams.items() if not stream.done()]
            kill_engine(stand)
        assert cut == list(STREAMS)
        for name, stream in streams.items():
            assert stream.result() == expected[name], name
    assert stand.roles()["engine"]["restarts"] == 3
    stand.until(lambda: stand.requests() == 0)


def test_a_conversation_is_found_again_by_the_engine_after_the_one_that_was_killed(stand) -> None:
    stand.start()
    asked = {"model": "tiny-qwen2", "prompt": [7 * n % 500 for n in range(700)], "temperature": 0, "max_tokens": 60}
    with api(stand) as client:
        first = client.completions.create(**asked, **IGNORE)
        kill_engine(stand)
        again = client.completions.create(**asked, **IGNORE)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert again.usage.prompt_tokens_details.cached_tokens == 672
        assert again.choices[0].text == first.choices[0].text
    assert _metric(stand, "vai_kv_adopted_pages") == (700 + 59) // 32


def _metric(stand, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", stand.port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.split()[0] == name)
    finally:
        connection.close()


def test_a_stop_string_is_found_across_the_cut(stand) -> None:
    stand.start(*PATIENT)
    with api(stand) as client:
        asked = {"model": "tiny-qwen2", "prompt": PROMPT, "temperature": 0, "max_tokens": 1500, **IGNORE}
        text = client.completions.create(**asked).choices[0].text
        place = next(at for at in range(900, len(text)) if text.index(text[at : at + 12]) == at)
        stream = client.completions.create(stream=True, stop=[text[place : place + 12]], **asked)
        pieces = [next(stream)]
        for _ in range(2):
            kill_engine(stand)
            pieces += [next(stream) for _ in range(3)]
        pieces += list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == text[:place]
    assert pieces[-1].choices[0].finish_reason == "stop"


async def test_a_frontend_without_http_is_carried_over_too(stand) -> None:
    await asyncio.to_thread(stand.start)
    port = connect(roles.socket_path(stand.root, "engine"), patience=60)
    frontend = Frontend(stand.root, stand.names, port)
    try:
        model = await frontend.open("tiny-qwen2")
        sampling = model.sampling(temperature=1, seed=5, max_tokens=400, logprobs=1)
        expected = Completion.of([delta async for delta in model.stream([1, 2, 3], sampling)])
        deltas = []
        async for delta in model.stream([1, 2, 3], sampling):
            deltas.append(delta)
            if len(deltas) == 20:
                await asyncio.to_thread(kill_engine, stand)
    finally:
        await frontend.close()
        await port.close()
    answer = Completion.of(deltas)
    for field in ("text", "token_ids", "logprobs", "finish", "prompt_tokens", "seed"):
        assert getattr(answer, field) == getattr(expected, field), field


def test_when_retries_are_exhausted_there_is_one_error_event(stand) -> None:
    stand.start(*PATIENT)
    body = {"model": "tiny-qwen2", "prompt": [1, 2, 3], "max_tokens": 4000, "stream": True, "ignore_eos": True}
    events: list[bytes] = []
    path, killed = roles.socket_path(stand.root, "engine"), None
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_read_events, stand, body, events)
        for _ in range(RETRIES + 1):
            stand.until(lambda killed=killed: roles.listener(path) not in (None, killed))
            seen = len(events)
            stand.until(lambda seen=seen: len(events) > seen)
            killed = stand.pid("engine")
            os.kill(killed, signal.SIGKILL)
        stream.result()
    assert [event for event in events if b'"error"' in event] == events[-1:]
    assert json.loads(events[-1])["error"]["code"] == "unavailable"


def _read_events(stand, body: dict[str, Any], events: list[bytes]) -> None:
    """Append the data of every event of a stream as it comes."""
    connection = http.client.HTTPConnection("127.0.0.1", stand.port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        events += (line[6:].strip() for line in connection.getresponse() if line.startswith(b"data: "))
    finally:
        connection.close()


def test_a_stopped_engine_is_noticed_killed_and_its_streams_go_on(stand) -> None:
    stand.start("--watchdog", "3", *PATIENT)
    asked = STREAMS["greedy"]
    expected, reading = Reading().read(stand, **asked), Reading()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(reading.read, stand, **asked)
        stand.until(lambda: len(reading.chunks) > 5)
        stopped = stand.pid("engine")
        os.kill(stopped, signal.SIGSTOP)
        assert stream.result() == expected
    stand.until_replaced("engine", stopped)
    told = stand.roles()["engine"]
    assert (told["restarts"], told["last_exit"]) == (1, "killed by SIGKILL, as it did not answer")
    assert "engine: process" in (stand.logs / "daemon.log").read_text()


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_while_the_engine_is_away_health_says_so_leavers_free_everything_and_newcomers_wait(stand) -> None:
    stand.start("--patience", "60")
    expected, server = stand.complete("tiny", 20), stand.pid("server")
    before = descriptors(server)
    pieces = stand.stream("tiny-qwen2", 2000)
    next(pieces)
    os.kill(stand.daemon.pid, signal.SIGSTOP)  # nobody starts another engine for now
    try:
        os.kill(stand.pid("engine"), signal.SIGKILL)
        stand.until(lambda: roles.holder(stand.root, "engine") is None)
        assert _status(stand, "/health") == 503
        with ThreadPoolExecutor(1) as pool:
            newcomer = pool.submit(stand.complete, "tiny", 20)
            pieces.close()  # the client leaves in the pause
            stand.until(lambda: descriptors(server) <= before + 1)  # the newcomer's connection
            assert not newcomer.done()
            os.kill(stand.daemon.pid, signal.SIGCONT)
            assert newcomer.result() == expected
    finally:
        os.kill(stand.daemon.pid, signal.SIGCONT)
    stand.until(lambda: stand.requests() == 0)
    stand.until(lambda: descriptors(server) <= before)


def _status(stand, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", stand.port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_watchdog_speaks_the_protocol_of_the_engine() -> None:
    assert frame(Hello()) == service.HELLO
    assert frame(AskStatus()) == service.ASK_STATUS


class Stuck(Engine):
    """An engine whose steps end when the test says so."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def has_work(self) -> bool:
        return not self.go_on.is_set()

    def step(self) -> list[Any]:
        self.entered.set()
        self.go_on.wait()
        return super().step()


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    from vai.daemon.pool import SLAB, create
    from vai.scratchpad.pages import map_pool

    descriptor = create(SLAB)
    engine = Stuck(tmp_path, threads=1, pool=map_pool(descriptor))
    yield engine
    engine.go_on.set()
    os.close(descriptor)


async def test_a_step_that_does_not_end_is_no_answer_though_the_loop_lives(tmp_path: Path, stuck: Stuck) -> None:
    path = tmp_path / "engine.sock"
    talking = Service(stuck)
    async with await asyncio.start_unix_server(talking.accept, sock=listen(path)):
        assert await asyncio.to_thread(stuck.entered.wait, 20)
        answer = asyncio.ensure_future(service._engine_answers(path))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(answer), 0.3)
        assert not answer.done()
        stuck.go_on.set()
        await asyncio.wait_for(answer, 20)
        assert await talking.stop()


@pytest.mark.parametrize("talk", [lambda peer: peer.close(), lambda peer: None], ids=["closes", "says nothing"])
async def test_what_listens_but_does_not_serve_is_no_answer(
    tmp_path: Path, talk: Callable[[socket.socket], None]
) -> None:
    path = tmp_path / "engine.sock"
    with listen(path) as listener:
        answer = asyncio.ensure_future(service._engine_answers(path))
        peer, _ = await asyncio.to_thread(listener.accept)
        with peer:
            talk(peer)
            with pytest.raises((EOFError, OSError)):  # TimeoutError is one of them
                await asyncio.wait_for(answer, 0.3)
