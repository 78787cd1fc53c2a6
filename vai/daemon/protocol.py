"""The daemon's wire: a 4-byte little-endian length, then one JSON object; at most MAX_MESSAGE bytes.

A question is `{"op": NAME, ...}`; the answer is `{"ok": true, ...}` or `{"error": {"code", "message"}}` with the code
of a VaiError. Rare and small by design, so the standard library's JSON is enough.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

from vai.errors import BadRequest, VaiError, by_code

MAX_MESSAGE = 1 << 20
_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One message as it travels. Raises BadRequest when it is too large."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE:
        raise BadRequest(f"A message of {len(body)} bytes is too large for the daemon's socket ({MAX_MESSAGE}).")
    return _LENGTH.pack(len(body)) + body


def _length(prefix: bytes) -> int:
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_MESSAGE:
        raise BadRequest(f"A message of {length} bytes is announced; the daemon's socket takes {MAX_MESSAGE} at most.")
    return int(length)


def _decode(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"A message on the daemon's socket is not JSON: {error}.") from None
    if not isinstance(message, dict):
        raise BadRequest("A message on the daemon's socket is not a JSON object.")
    return message


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at the end of the stream. Raises BadRequest for what is not a message."""
    try:
        length = _length(await reader.readexactly(_LENGTH.size))
        return _decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None


def receive(connection: socket.socket) -> Message:
    """The next message of a blocking socket. Raises ConnectionError when the other end closes first."""
    return _decode(_exactly(connection, _length(_exactly(connection, _LENGTH.size))))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("the connection was closed in the middle of a message")
        parts += part
    return bytes(parts)


def failure(error: VaiError) -> Message:
    """The answer that carries an error."""
    return {"error": {"code": error.code, "message": error.message}}


def unwrap(answer: Message) -> Message:
    """The answer, or the VaiError it carries, raised."""
    error = answer.get("error")
    if error is None:
        return answer
    if not isinstance(error, dict):
        raise VaiError(f"The daemon answered with an error that cannot be read: {error!r}.")
    raise by_code(str(error.get("code")))(str(error.get("message")))
