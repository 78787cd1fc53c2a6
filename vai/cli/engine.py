"""One question to the running engine, for commands that have no loop of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vai.daemon import roles
from vai.errors import Unavailable

Answer = TypeVar("Answer")
_PATIENCE = 5.0


class Engine(Protocol):
    """What commands ask of an engine: the part of engine/port.py that is about models, not about requests."""

    async def status(self) -> Any: ...

    async def release(self, image: str) -> None: ...


def ask(root: Path, question: Callable[[Engine], Awaitable[Answer]]) -> Answer:
    """What the engine answers. Raises Unavailable where none runs or it says nothing for 5 s."""
    if roles.holder(root, "engine") is None:
        raise Unavailable("No engine is running. Start it: vai serve")
    from vai.llm import connect

    async def asking() -> Answer:
        engine = connect(roles.socket_path(root, "engine"))
        try:
            async with asyncio.timeout(_PATIENCE):
                return await question(engine)
        except TimeoutError:
            raise Unavailable(f"The engine did not answer within {_PATIENCE:.0f} s; `vai logs engine`.") from None
        finally:
            await engine.close()

    return asyncio.run(asking())
