"""Clients of a completion server: streams over HTTP, each event's arrival noted, at a cost that does not show.

A token event is one that brings text: what a reader sees. Servers differ in whether they send one for half a character.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from vai.cli.bench.workload import Ask

_EVENT = b"data: "
_DONE = b"data: [DONE]"


@dataclass(slots=True)
class Record:
    """One request, in seconds of time.perf_counter. `events`: when text came; `signs`: when anything of the answer did,
    such as a token that ends in half a character, where the server tells of it. `tokens`: those of the answer, as the
    server counted them, 0 before its end. `error`: why there is no whole answer; None while it is under way.
    """

    model: str
    prompt: int
    sent: float
    events: list[float] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    ended: float | None = None
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.ended is not None and self.error is None


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI's completions. `ports`: model name -> where it is served; `fields`: what its requests
    say beside the usual."""

    ports: Mapping[str, int]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(self.ports)

    def request(self, model: str, ask: Ask) -> bytes:
        """The whole HTTP request of one ask: greedy, of fixed length, streamed."""
        body = {
            "model": model,
            "prompt": ask.prompt,
            "max_tokens": ask.answer,
            "temperature": 0,
            "ignore_eos": True,
            "speculative.n_max": 0,  # random weights repeat themselves as no text does
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }
        data = json.dumps(body, separators=(",", ":")).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.ports[model]}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class _Exchange(asyncio.Protocol):
    """One connection with one request on it; notes what comes in its record."""

    def __init__(self, request: bytes, record: Record, keep_text: bool) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._record = record
        self._keep_text = keep_text
        self._rest = b""
        self._status = 0
        self._body = b""
        self._transport: asyncio.Transport | None = None
        self._left = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._status:
            self._status = int(data.split(b" ", 2)[1])
        if self._status != 200:
            self._body += data
            return
        # Each write of these servers is whole events; the chunk framing between them is on lines of its own.
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_EVENT):
                self._event(line, now)
            elif line.startswith(b"error:"):
                self._record.error = line.decode(errors="replace")[:200]

    def connection_lost(self, exc: Exception | None) -> None:
        record = self._record
        if record.ended is None and record.error is None and not self._left:
            reason = self._body.partition(b"\r\n\r\n")[2].decode(errors="replace")[:200]
            record.error = f"{self._status} {reason}" if self._status else f"closed: {exc}"
        if not self.over.done():
            self.over.set_result(None)

    def cut(self) -> None:
        """Leave, as a client does whose user has gone. What has not come by now is neither complete nor an error."""
        self._left = True
        if self._transport is not None:
            self._transport.abort()

    def _event(self, line: bytes, now: float) -> None:
        record = self._record
        if line.startswith(_DONE):
            record.ended = now
            if self._transport is not None:
                self._transport.close()
            return
        if b'"text":"' in line:
            record.signs.append(now)
            if b'"text":""' not in line:
                record.events.append(now)
                if self._keep_text:
                    record.text.append(json.loads(line[len(_EVENT) :])["choices"][0]["text"])
        if b'"usage":{' in line:
            record.tokens = json.loads(line[len(_EVENT) :])["usage"]["completion_tokens"]
        elif line.startswith(b'data: {"error"'):
            record.error = line.decode(errors="replace")[:200]


async def send(target: Target, model: str, ask: Ask, records: list[Record], *, keep_text: bool = False) -> Record:
    """One request to its end. Its record is added to `records` when it is sent. Cancelling it ends the connection."""
    request = target.request(model, ask)
    record = Record(model, len(ask.prompt), time.perf_counter())
    records.append(record)
    exchange = _Exchange(request, record, keep_text)
    try:
        await asyncio.get_running_loop().create_connection(lambda: exchange, "127.0.0.1", target.ports[model])
        await exchange.over
    except OSError as error:
        record.error = f"no connection: {error}"
    finally:
        exchange.cut()
    return record


async def closed_loop(target: Target, work: Iterator[Ask], *, streams: int, seconds: float) -> list[Record]:
    """`streams` clients, each with one request after another, for `seconds`; then all that is unfinished is cut.

    Clients take the target's models in turns.
    """
    records: list[Record] = []
    end = time.perf_counter() + seconds

    async def client(model: str) -> None:
        while time.perf_counter() < end:
            record = await send(target, model, next(work), records)
            if record.error is not None:
                await asyncio.sleep(0.1)  # a server that refuses is not flooded

    models = itertools.islice(itertools.cycle(target.models), streams)
    await _for(seconds, [client(model) for model in models])
    return records


async def open_loop(target: Target, work: Iterator[Ask], *, pauses: Iterator[float], seconds: float) -> list[Record]:
    """Requests that come when they come, whether or not others are answered; then all that is unfinished is cut."""
    records: list[Record] = []

    async def arrivals() -> None:
        async with asyncio.TaskGroup() as group:
            for model, pause in zip(itertools.cycle(target.models), pauses, strict=False):
                await asyncio.sleep(pause)
                group.create_task(send(target, model, next(work), records))

    await _for(seconds, [arrivals()])
    return records


async def _for(seconds: float, coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Let them run for so long, then cancel what has not ended. Raises what any of them raised."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.wait(tasks, timeout=seconds)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
            raise result
