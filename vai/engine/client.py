"""The engine's port over its Unix socket, for those who must not load it: the server, `vai run`.

Connects when first needed and again after the engine came back. Whoever gives it patience sees a pause where an engine
dies, and then the tokens that would have come (resume.py); without, requests in flight end with Unavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import msgspec

from vai.engine.port import (
    PROTOCOL,
    Abort,
    AskStatus,
    AskSwitches,
    EndSession,
    EngineStatus,
    Failed,
    FromEngine,
    Hello,
    Mask,
    Outputs,
    Release,
    Released,
    SessionEnded,
    Status,
    Submit,
    Switches,
    ToEngine,
    frame,
    read_message,
)
from vai.engine.resume import Answer
from vai.errors import BadRequest, Unavailable, VaiError, WrongVersion, by_code, from_wire
from vai.request import Output, Request

AGAIN = 0.02  # seconds between two looks for an engine that is away

_decoder = msgspec.msgpack.Decoder(FromEngine)
Told = TypeVar("Told", Status, Switches, Released, SessionEnded)


class EngineClient:
    """An EnginePort (see port.py) over the socket at `path`. One asyncio loop owns it."""

    def __init__(self, path: Path, *, patience: float = 0.0) -> None:
        """`patience`: seconds that a request waits for an engine that is away, before its first token or between two;
        0: not at all, and an answer whose engine goes away is lost.
        """
        self._path = path
        self._patience = patience
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._answers: dict[str, Answer] = {}  # by the ids of their requests: those under way

    async def generate(self, request: Request, mask: bytes = b"") -> AsyncIterator[Output]:
        """See EnginePort.generate. With patience, Unavailable is raised only after waiting and trying again."""
        if request.id in self._answers:
            raise BadRequest(f"The request id '{request.id}' is in use.", param="id")
        answer = self._answers[request.id] = Answer(request, mask)
        try:
            while not answer.over:
                connection, part = await self._there(), answer.rest()
                outputs = connection.open_stream(part)
                if (due := answer.mask()) is not None:
                    connection.allow(due)
                try:
                    while not answer.over:
                        output = await outputs.get()
                        if isinstance(output, VaiError):
                            raise output
                        if output.error is not None:
                            raise from_wire(*output.error, output.retry_after)
                        yield answer.take(output)
                except Unavailable:
                    if not self._patience or not answer.lost():
                        raise
                    await asyncio.sleep(AGAIN)  # an engine that is asked to stop closes the connection after saying so
                finally:
                    connection.close_stream(part.id)
        finally:
            del self._answers[request.id]

    def mask(self, identity: str, position: int, bits: bytes) -> None:
        """See EnginePort.mask. It is kept until the token has come, for the next engine if this one goes away."""
        answer = self._answers.get(identity)
        if answer is not None:
            answer.allow(position, bits)
            due = answer.mask()
            if due is not None and self._connection is not None:
                self._connection.allow(due)

    async def status(self) -> EngineStatus:
        """The engine at this moment, or after the step it is in. Raises Unavailable."""
        return (await (await self._connected()).ask(AskStatus(), Status)).status

    async def switches(self) -> Switches:
        """Times from pick to native call since the last time they were asked for. Raises Unavailable."""
        return await (await self._connected()).ask(AskSwitches(), Switches)

    async def release(self, image: str) -> None:
        """Have the engine let go of an image; returns when it has. Raises Unavailable."""
        await (await self._connected()).ask(Release(image), Released)

    async def end_session(self, session: str, cache_salt: str = "") -> int:
        """Free the pages that only the conversations of a session have read; how many. Raises Unavailable."""
        return (await (await self._connected()).ask(EndSession(session, cache_salt), SessionEnded)).pages

    async def close(self) -> None:
        """End the connection, and with it every request on it."""
        if self._connection is not None:
            await self._connection.close()

    async def _there(self) -> _Connection:
        """The connection, after a wait for an engine that is away. Raises Unavailable when patience is at its end."""
        if not self._patience:
            return await self._connected()
        reason = Unavailable(f"The engine on {self._path} accepts connections but says nothing; see `vai status`.")
        try:
            async with asyncio.timeout(self._patience):
                while True:
                    try:
                        return await self._connected()
                    except Unavailable as error:
                        reason = error
                    await asyncio.sleep(AGAIN)
        except TimeoutError:
            raise reason from None

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or self._connection.ended:
                self._connection = await _connect(self._path)
            return self._connection


async def _connect(path: Path) -> _Connection:
    """Raises Unavailable where nobody listens, WrongVersion where somebody else does."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise Unavailable(
            f"No engine listens on {path} ({error.strerror or error}); start it with `vai serve`."
        ) from None
    try:
        writer.write(frame(Hello()))
        answer = await read_message(reader, _decoder)
        if not isinstance(answer, Hello) or answer.protocol != PROTOCOL:
            raise WrongVersion(f"The engine on {path} does not speak protocol {PROTOCOL}; restart it with `vai serve`.")
    except (OSError, asyncio.IncompleteReadError):
        writer.close()
        raise Unavailable(f"The engine on {path} closed the connection; `vai status` shows how it is.") from None
    except (VaiError, asyncio.CancelledError):
        writer.close()
        raise
    return _Connection(reader, writer)


class _Connection:
    """One connection: many streams at once, and questions that are answered in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended: VaiError | None = None
        self._reader = reader
        self._writer = writer
        self._streams: dict[str, asyncio.Queue[Output | VaiError]] = {}
        self._questions: deque[asyncio.Future[FromEngine]] = deque()  # a cancelled one still has an answer coming
        self._listening = asyncio.create_task(self._listen())

    def open_stream(self, request: Request) -> asyncio.Queue[Output | VaiError]:
        """Submit a request; the queue gets its outputs. Raises BadRequest for an id in use, Unavailable."""
        if request.id in self._streams:
            raise BadRequest(f"The request id '{request.id}' is in use.", param="id")
        self._send(Submit(request))
        self._streams[request.id] = asyncio.Queue()
        return self._streams[request.id]

    def close_stream(self, identity: str) -> None:
        """Nobody listens to this stream any more; abort it if it was not over."""
        if self._streams.pop(identity, None) is not None and self.ended is None:
            self._send(Abort(identity))

    def allow(self, mask: Mask) -> None:
        """Send the mask of a stream that is open here."""
        if mask.id in self._streams:
            self._send(mask)

    async def ask(self, question: ToEngine, kind: type[Told]) -> Told:
        """Send a question and wait for its answer. Raises Unavailable, or why the engine closed the connection."""
        self._send(question)
        self._questions.append(asyncio.get_running_loop().create_future())
        answer = await self._questions[-1]
        if not isinstance(answer, kind):
            raise WrongVersion(f"The engine answered {type(question).__name__} with {type(answer).__name__}.")
        return answer

    async def close(self) -> None:
        """End the connection; every stream ends with Unavailable."""
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _send(self, message: ToEngine) -> None:
        if self.ended is not None:
            raise self.ended
        self._writer.write(frame(message))

    async def _listen(self) -> None:
        ended: VaiError = Unavailable("The connection to the engine was closed.")
        try:
            while self.ended is None:
                message = await read_message(self._reader, _decoder)
                if isinstance(message, Failed):
                    ended = by_code(message.code)(message.message)
                    break
                self._take(message)
        except (OSError, asyncio.IncompleteReadError):
            ended = Unavailable("The engine went away; `vai status` shows how it is. Send the request again.")
        except VaiError as error:
            ended = error
        finally:
            self._end(ended)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                stream = self._streams.get(output.id)
                if stream is not None:  # else it was closed while this was on its way
                    stream.put_nowait(output)
                if output.finish is not None:
                    self._streams.pop(output.id, None)
        elif self._questions and not (question := self._questions.popleft()).done():
            question.set_result(message)

    def _end(self, reason: VaiError) -> None:
        self.ended = reason
        for stream in self._streams.values():
            stream.put_nowait(reason)
        self._streams.clear()
        for question in self._questions:
            if not question.done():
                question.set_exception(reason)
        self._writer.close()
