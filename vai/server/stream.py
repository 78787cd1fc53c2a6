"""Carrying a generation to a client that may leave at any moment: disconnects, server-sent events, keep-alive comments.

Events are written by raw ASGI `send`, one write a step. `send` waits while the client does not read, and the protocol
closes a connection that stays unread, so no stream holds more than one write buffer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive, Scope, Send

from vai.errors import Interrupted, VaiError
from vai.server.render import PING, event
from vai.server.schema import error_bytes

if TYPE_CHECKING:
    from vai.llm import Delta

KEEP_ALIVE_SECONDS = 15.0
LAST_WORD_SECONDS = 1.0  # a stopping server does not wait longer for a client that does not read
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_log = logging.getLogger("vai.server")
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete: nobody is left to tell."""


def stopping() -> Interrupted:
    """What a request is told that the server's end cuts short."""
    return Interrupted("The server was stopped before the answer was complete; send the request again.")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or ClientGone, with `work` cancelled and ended, if the client leaves first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _checked(delta: Delta) -> Delta:
    if delta.finish == "abort":
        raise Interrupted("The engine ended this request before its answer was complete; send it again.")
    return delta


async def interleave(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index of the stream, delta) of all streams, as they come. Closing it closes them all.

    Raises what any of them raises, and Interrupted where the engine aborted one.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, _checked(delta)
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream) as source:
                async for delta in source:
                    await queue.put((index, _checked(delta)))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_streams = len(pumps)
        while open_streams:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


class EventStream:
    """An ASGI response of server-sent events, made from finished frames (each one write).

    The status line is sent with the first frame or the first keep-alive comment, so that what is refused before any
    token is an HTTP error; what fails later is one `data: {"error": ...}` event. A client that leaves ends the frames.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], *, keep_alive: float = KEEP_ALIVE_SECONDS) -> None:
        self._frames = frames
        self._keep_alive = keep_alive
        self._started = False
        self._refused = False
        self._written = 0.0
        self._one_writer = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._written = loop.time()
        pinging = asyncio.ensure_future(self._ping(send))
        try:
            await until_gone(receive, self._carry(send))
        except asyncio.CancelledError:  # the server is stopping: no stream ends as if it were complete
            if not self._refuse():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._end(send, event(error_bytes(stopping()))), LAST_WORD_SECONDS)
            raise
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)

    async def _carry(self, send: Send) -> None:
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    if frame:
                        await self._write(send, frame)
        except VaiError as error:
            if self._refuse():
                raise
            await self._end(send, event(error_bytes(error)))
        except Exception:
            if self._refuse():
                raise
            _log.exception("A stream failed.")
            await self._end(send, event(error_bytes(VaiError("The server failed; its log says why."))))
        else:
            await self._end(send)

    def _refuse(self) -> bool:
        """Whether an error can still be an HTTP error; if so, no keep-alive comment comes before it."""
        self._refused = not self._started
        return self._refused

    async def _write(self, send: Send, frame: bytes) -> None:
        async with self._one_writer:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            self._written = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": frame, "more_body": True})

    async def _end(self, send: Send, frame: bytes = b"") -> None:
        async with self._one_writer:
            await send({"type": "http.response.body", "body": frame, "more_body": False})

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while not self._refused:
            await asyncio.sleep(self._written + self._keep_alive - loop.time())
            if not self._refused and loop.time() >= self._written + self._keep_alive:
                await self._write(send, PING)
