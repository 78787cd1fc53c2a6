"""What a client may say about the pages of its conversation: how long they are kept, and when it is over.

`cache_control` is Anthropic's word, at the top of a request or at a part of a message, where clients of other servers
put it: the pages of the whole request are kept for its `ttl` from the end of the answer on, whoever needs room, as far
as shares of the scratchpad allow; the end of a conversation that is beyond them is kept as if nothing had been said
(scratchpad/retention.py). "0s" says that nobody will go on with it. `session_id` (OpenRouter's word) names a
conversation, so that it is known though a request does not go on with the last one word by word, and has a share of its
own; DELETE /v1/sessions/ID ends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vai.request import MAX_RETAIN, MAX_SESSION

SessionId = Annotated[str, Meta(min_length=1, max_length=MAX_SESSION)]
_UNITS = {"s": 1, "m": 60, "h": 3600}


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`ttl`: a number of seconds, minutes or hours, as in "5m" (as if none is given), "1h", "90s"."""

    type: Literal["ephemeral"]
    ttl: Annotated[str, Meta(pattern=r"^[0-9]{1,5}[smh]\Z")] = "5m"

    def __post_init__(self) -> None:
        if self.seconds > MAX_RETAIN:
            raise ValueError(f"a ttl is at most {MAX_RETAIN // 3600} hours")

    @property
    def seconds(self) -> int:
        return int(self.ttl[:-1]) * _UNITS[self.ttl[-1]]


class SessionEnded(msgspec.Struct, frozen=True):
    """`pages_freed`: those that only this session had read."""

    id: str
    pages_freed: int
    deleted: bool = True
    object: str = "session"


def retain_of(given: Iterable[CacheControl | None]) -> int | None:
    """Seconds to keep the pages of a request: the most that any part of it asks for; None where none does."""
    return max((control.seconds for control in given if control is not None), default=None)
