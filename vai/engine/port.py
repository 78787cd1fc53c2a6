"""What an engine is to those who use it, wherever it runs, and the messages of the socket between them.

The wire: a 4-byte little-endian length, then one msgpack message; at most MAX_MESSAGE bytes. One message a step and
direction, never one a token. The connection is the lease: when it closes, every request it submitted is aborted.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from vai.errors import BadRequest
from vai.request import MAX_SALT, Output, Request, Session

PROTOCOL = 3
MAX_MESSAGE = 64 << 20
MAX_MASK = 1 << 21  # bytes, for as many tokens as ids can tell apart


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One attached image: its digest, requests running and waiting, pages held, tokens made, seconds to attach, and how
    often a running request had to give its pages up. Of tokens guessed ahead for its requests: how many were verified,
    and how many of them stood.

    workspace_bytes: what its steps need beside weights and pages; taken from the machine when first touched.

    prompt_exact, prompt_fast: tokens of prompts computed in each kind, those that a preemption had computed again
    too. cached_exact, cached_fast: tokens that requests with a first token found in pages of each kind.
    """

    image: str
    running: int
    waiting: int
    pages: int
    tokens: int
    attach_seconds: float
    workspace_bytes: int
    preemptions: int = 0
    guessed: int = 0
    accepted: int = 0
    prompt_exact: int = 0
    prompt_fast: int = 0
    cached_exact: int = 0
    cached_fast: int = 0


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment. Bytes and seconds; `steps` are those of all models.

    native_seconds: time in native calls. host_seconds: CPU time of the Python around them, the loop's included.

    The pool is pages in use (`pool_used`), pages that the prefix cache keeps until their room is needed
    (`pool_cached`), and the rest (`pool_free`). Of the first two, `pool_pinned` are kept at a client's wish.
    `adopted_pages` were sealed by an engine before this one. `kv_type`: how all pages store keys and values. `fast`:
    what computes the fast ones; None: all are exact.
    """

    pid: int
    device: str
    isa: str
    threads: int
    uptime: float
    steps: int
    pool_bytes: int
    pool_used: int
    models: list[ModelStatus]
    pool_cached: int = 0
    pool_free: int = 0
    pool_pinned: int = 0
    adopted_pages: int = 0
    native_seconds: float = 0.0
    host_seconds: float = 0.0
    kv_type: str = "bf16"
    fast: str | None = None


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    """First message each way."""

    protocol: int = PROTOCOL
    pid: int = 0


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Answered by outputs only: a refusal is an output with finish "error"."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request; nothing more is said about it. Ids are not used again on the same connection."""

    id: str


class Mask(msgspec.Struct, frozen=True, tag="mask"):
    """Which tokens a constrained request may draw at `position`, counted from the prompt's first: bit i % 8 of byte
    i // 8 is set for token i, over the model's whole vocabulary. One for another position than the next is forgotten.
    """

    id: str
    position: Annotated[int, Meta(ge=0, le=1 << 24)]
    bits: Annotated[bytes, Meta(max_length=MAX_MASK)]


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Let go of an image: its running requests end with reason "abort", its pages and its lease are given back."""

    image: str


class EndSession(msgspec.Struct, frozen=True, tag="end_session"):
    """Nobody goes on with the conversations of a session: free what only they have read, pinned or not."""

    session: Session
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT)] = ""


class AskStatus(msgspec.Struct, frozen=True, tag="ask_status"):
    pass


class AskSwitches(msgspec.Struct, frozen=True, tag="ask_switches"):
    """Ask for, and forget, the last pick-to-native-call times."""


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """All that one step brought for this connection."""

    outputs: list[Output]


class Status(msgspec.Struct, frozen=True, tag="status"):
    status: EngineStatus


class Switches(msgspec.Struct, frozen=True, tag="switches"):
    """Seconds from the scheduler's pick to the native call, of steps after a step of the same model and of another."""

    same: list[float]
    switched: list[float]


class Released(msgspec.Struct, frozen=True, tag="released"):
    image: str


class SessionEnded(msgspec.Struct, frozen=True, tag="session_ended"):
    """`pages` are free now."""

    pages: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Why the engine closes this connection now: (code, sentence) of a VaiError."""

    code: str
    message: Annotated[str, Meta(max_length=65536)]


ToEngine = Hello | Submit | Mask | Abort | Release | EndSession | AskStatus | AskSwitches
FromEngine = Hello | Outputs | Status | Switches | Released | SessionEnded | Failed

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_Message = TypeVar("_Message")


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the wire. Raises BadRequest for one that is too large."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise BadRequest(f"A message of {len(body)} bytes is too large; at most {MAX_MESSAGE} bytes travel at once.")
    return _LENGTH.pack(len(body)) + body


async def read_message(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message:
    """The next message. Raises BadRequest for what is none, IncompleteReadError or OSError when the connection ends."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_MESSAGE:
        raise BadRequest(f"A message announces {length} bytes; at most {MAX_MESSAGE} bytes travel at once.")
    body = await reader.readexactly(length)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"A message of {length} bytes cannot be read: {error}.") from None


class EnginePort(Protocol):
    """An engine, in this process or behind a socket. One asyncio loop owns it."""

    def generate(self, request: Request, mask: bytes = b"") -> AsyncIterator[Output]:
        """Outputs of one request, in order; closing the iterator early aborts it. `mask`: for the first token of a
        constrained request.

        Raises the VaiError that the engine refused it with (before the first output) or that ended it (finish "error"),
        and Unavailable if the engine goes away.
        """
        ...

    def mask(self, identity: str, position: int, bits: bytes) -> None:
        """Allow the token at `position` of a constrained request that is being generated; see Mask."""
        ...

    async def status(self) -> EngineStatus: ...

    async def switches(self) -> Switches: ...

    async def release(self, image: str) -> None: ...

    async def end_session(self, session: str, cache_salt: str = "") -> int:
        """Free the pages that only the conversations of a session have read; how many. Unknown ones are fine."""
        ...

    async def close(self) -> None: ...
