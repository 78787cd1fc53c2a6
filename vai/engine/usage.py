"""Where the time of an engine goes: into native calls, which compute, or into the Python around them."""

from __future__ import annotations

import time
from types import TracebackType


class NativeTime:
    """Seconds of one thread inside native calls: `with native: plan.forward(...)`.

    wall: by the clock; what is missing to the time that the engine had work is time in which nothing was computed.
    cpu: of the calling thread, whose own part of a call is not Python's (the kernels' threads compute beside it).
    """

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0
        self._entered = (0.0, 0.0)

    def __enter__(self) -> None:
        self._entered = time.perf_counter(), time.thread_time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        wall, cpu = self._entered
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu

    def host_seconds(self) -> float:
        """CPU seconds of the calling thread outside native calls, since it was started."""
        return time.thread_time() - self.cpu
