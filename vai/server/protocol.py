"""uvicorn's HTTP/1.1 protocol with the limits it lacks: deadlines for slow senders and slow readers, caps on the head.

uvicorn 0.54 waits for the rest of a request as long as the client likes, holds a response for a client that does not
read it just as long, and takes headers of any size. Here each of the three ends in a bounded time and memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vai.server.schema import error_body

RECEIVE_SECONDS = 10.0  # from the first moment a request is awaited to its last byte
WRITE_SECONDS = 60.0  # a reader that leaves the write buffer full this long is gone
MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128


class _HeadTooLarge(Exception):
    """Request line and headers together, or their number, are over the cap."""


class Protocol(HttpToolsProtocol):
    """One connection. Adds to uvicorn's: a receive deadline, a write deadline, caps on headers, JSON error bodies."""

    receive_seconds = RECEIVE_SECONDS
    write_seconds = WRITE_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._head_open = True
        self._too_large = False

    # -- life of the connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_arrived()
        self._disarm_write()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_open:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_open and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        # uvicorn stops its keep-alive timer at any byte, also at one that begins no request.
        if not self._busy():
            self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._arm_write()  # close() waits for the client to read what is left
        elif self.timeout_keep_alive_task is None and not self._busy():
            self._await_request()  # a pipelined request has begun and not ended

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # -- receive deadline ------------------------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Whether the server, not the client, is the one whose turn it is."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.more_body and not cycle.response_complete)

    def _await_request(self) -> None:
        if self._receive_deadline is None and not self.transport.is_closing():
            self._receive_deadline = self.loop.call_later(self.receive_seconds, self._request_late)

    def _request_arrived(self) -> None:
        if self._receive_deadline is not None:
            self._receive_deadline.cancel()
            self._receive_deadline = None

    def _request_late(self) -> None:
        self._receive_deadline = None
        if not self.transport.is_closing():
            self.logger.info("A request was not complete after %g s: connection closed.", self.receive_seconds)
            self.transport.abort()

    # -- write deadline --------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm_write()

    def _arm_write(self) -> None:
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.write_seconds, self._reader_gone)

    def _disarm_write(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _reader_gone(self) -> None:
        self._write_deadline = None
        self.logger.info("A response was not read for %g s: connection closed.", self.write_seconds)
        self.transport.abort()

    # -- parser callbacks ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_open = True

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_large = True
            raise _HeadTooLarge

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._head_bytes = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._too_large = True
            raise _HeadTooLarge
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head_open = True
        self._request_arrived()

    # -- refusals before there is a request ------------------------------------------------------------------------

    def _refuse_head(self) -> None:
        self._too_large = True
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too large a head, and close. Called by uvicorn on a parser error."""
        if self.transport.is_closing():
            return
        if self._busy():  # an answer is under way: anything written now would land in the middle of it
            self.transport.abort()
            return
        if self._too_large:
            status, text = 431, f"The request's headers are over {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} lines."
            code = "headers_too_large"
        else:
            status, text, code = 400, "This is not a valid HTTP/1.1 request.", "invalid_http"
        body = error_body(text, kind="invalid_request_error", code=code)
        head = b"content-type: application/json\r\nx-should-retry: false\r\nconnection: close\r\n"
        self.transport.write(STATUS_LINE[status] + head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
