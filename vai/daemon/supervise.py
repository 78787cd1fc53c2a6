"""Keeping a role alive: start it or adopt it, watch it by pidfd, start it again with backoff when it ends.

A supervised process is in its own session and gets no signal when the daemon dies: it lives on, and the next daemon
adopts it. Processes are started by exec, never by a bare fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from vai.daemon import roles
from vai.errors import BadRequest

log = logging.getLogger("vai.daemon")

GOOD_RUN = 2.0  # seconds a role must live, and have been ready, for its earlier deaths to be forgotten
FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0
LOG_LIMIT = 8 << 20
WATCHDOG = 25.0  # seconds without an answer; an honest step, also of a very large model's first rows, is shorter
_PROBE_EVERY = (0.01, 0.25)  # seconds between questions whether a starting role is ready: at least, and at most
_PROBE_SHARE = 0.02  # of its age: whoever starts fast is soon known to be ready, whoever hangs costs little


class Process:
    """A process watched by pidfd: one of our own, or one adopted from an earlier daemon."""

    def __init__(self, pid: int, *, own: subprocess.Popen[bytes] | None = None) -> None:
        """Raises ProcessLookupError where `pid` is gone."""
        self.pid = pid
        self.own = own
        self._pidfd = os.pidfd_open(pid)
        self.since = time.monotonic() - roles.age(pid)
        self._over = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._end_seen)

    @classmethod
    def start(
        cls, argv: Sequence[str], *, output: Path, pass_fds: Sequence[int] = (), stdout: int | None = None
    ) -> Process:
        """Exec `argv` in a session of its own, its output appended to the file `output` (or to `stdout`)."""
        with open_log(output) as file:
            own = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout,
                stderr=file,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        return cls(own.pid, own=own)

    def _end_seen(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._over.set()

    async def exited(self) -> int | None:
        """Wait for the end: the exit code (negative: the signal), or None where adopted, as only a parent is told."""
        await self._over.wait()
        return self.own.wait() if self.own else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process, never to one that got its number later."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def end(self, patience: float) -> None:
        """SIGTERM, and SIGKILL after `patience` seconds."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.exited(), patience)
        except TimeoutError:
            log.warning("process %d did not end within %.0f s of SIGTERM: killed", self.pid, patience)
            self.signal(signal.SIGKILL)
            await self.exited()

    def close(self) -> None:
        """Stop watching."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)


def open_log(path: Path) -> BinaryIO:
    """A log file, opened for appending; one that has grown past LOG_LIMIT is put aside first (one old file is kept)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_LIMIT:
        path.replace(path.with_suffix(".log.old"))
    return open(path, "ab", buffering=0)


class Backoff:
    """How long to wait before the next start: nothing after a good run, then twice as long each time.

    A role that was ready works, whatever killed it: it never waits longer than FIRST_DELAY.
    """

    def __init__(self) -> None:
        self._failures = 0

    def after(self, lived: float, *, ready: bool) -> float:
        """Seconds to wait after a life of `lived` seconds, in which the role was `ready` or never."""
        if ready:
            self._failures = 0 if lived >= GOOD_RUN else min(self._failures, 1)
        delay = 0.0 if self._failures == 0 else min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (self._failures - 1))
        self._failures += 1
        return delay


@dataclass(frozen=True, slots=True)
class Job:
    """What a role is: how to start it, how to know that it is ready, and where it then answers."""

    role: str
    root: Path
    argv: Sequence[str]
    log: Path
    ready: Callable[[int], Awaitable[bool]]  # both are asked of a pid: an adopted process may have other arguments
    address: Callable[[int], str]
    pass_fds: Sequence[int] = ()
    answers: Callable[[], Awaitable[None]] | None = None  # returns if it works; OSError, EOFError or no end if not
    watchdog: float = WATCHDOG  # seconds after which one that was ready and does not answer is killed


class Supervisor:
    """One role, kept alive. `state` is "starting", "ready", "waiting" (before a new start), "failed" or "stopped"."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = "starting"
        self.process: Process | None = None
        self.restarts = 0
        self.last_exit: str | None = None
        self.next_start: float | None = None
        self._hung = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop` is called. Raises BadRequest where the role refuses its arguments: trying again is no help."""
        backoff = Backoff()
        while not self._stopping.is_set():
            process = self.process = self._adopt() or self._start()
            self._hung = False
            code = await self._watch(process)
            lived, ready = time.monotonic() - process.since, self.state == "ready"
            self.process = None
            process.close()
            self._ended(process.pid, code, lived, ready=ready)
            if not self._stopping.is_set():
                self.restarts += 1
                await self._pause(backoff.after(lived, ready=ready))
        self.state = "stopped"

    def _adopt(self) -> Process | None:
        """The living process that already has this role, if there is one."""
        pid = roles.holder(self.job.root, self.job.role)
        if pid is None:
            return None
        try:
            process = Process(pid)
        except ProcessLookupError:
            return None
        if roles.holder(self.job.root, self.job.role) != pid:  # it ended, and its number may be another's by now
            process.close()
            return None
        log.info("%s: adopted the running process %d", self.job.role, pid)
        if other := _differences(roles.arguments(pid), self.job.argv):
            log.warning("%s: it was started with %s; for another value, vai stop and start again", self.job.role, other)
        return process

    def _start(self) -> Process:
        for descriptor in self.job.pass_fds:
            os.lseek(descriptor, 0, os.SEEK_SET)  # the position is shared with the process that had it before
        process = Process.start(self.job.argv, output=self.job.log, pass_fds=self.job.pass_fds)
        log.info("%s: started as process %d", self.job.role, process.pid)
        return process

    async def _watch(self, process: Process) -> int | None:
        """Wait for the end, and note meanwhile when the process becomes ready."""
        self.state = "starting"
        probing = asyncio.create_task(self._probe(process))
        try:
            return await process.exited()
        finally:
            probing.cancel()

    async def _probe(self, process: Process) -> None:
        least, most = _PROBE_EVERY
        while not await self.job.ready(process.pid):
            age = time.monotonic() - process.since
            await asyncio.sleep(min(most, max(least, _PROBE_SHARE * age)))
        self.state = "ready"
        address, seconds = self.job.address(process.pid), time.monotonic() - process.since
        log.info("%s: ready on %s after %.2f s", self.job.role, address, seconds)
        while await self._answers():
            await asyncio.sleep(self.job.watchdog / 6)
        log.error("%s: process %d has not answered for %g s: killed", self.job.role, process.pid, self.job.watchdog)
        self._hung = True
        process.signal(signal.SIGKILL)

    async def _answers(self) -> bool:
        """Whether the process, which was ready once, answers before the watchdog loses patience."""
        if self.job.answers is None:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.job.watchdog):
                while True:
                    with contextlib.suppress(OSError, EOFError):
                        await self.job.answers()
                        return True
                    await asyncio.sleep(self.job.watchdog / 60)
        return False

    def _ended(self, pid: int, code: int | None, lived: float, *, ready: bool) -> None:
        self.last_exit = f"{_describe(code)}, as it did not answer" if self._hung else _describe(code)
        if self._stopping.is_set():
            log.info("%s: ended (%s)", self.job.role, self.last_exit)
            return
        log.warning("%s: process %d ended (%s) after %.1f s", self.job.role, pid, self.last_exit, lived)
        if code == BadRequest.exit_code and not ready:
            self.state = "failed"
            raise BadRequest(f"The {self.job.role} refused to start: {last_line(self.job.log)}")

    async def _pause(self, delay: float) -> None:
        self.state = "waiting"
        self.next_start = time.monotonic() + delay
        if delay:
            log.info("%s: next start in %.2f s", self.job.role, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        self.next_start = None

    def report(self) -> dict[str, Any]:
        """As the status shows it; seconds."""
        process, now = self.process, time.monotonic()
        return {
            "state": self.state,
            "pid": None if process is None else process.pid,
            "address": None if process is None else self.job.address(process.pid),
            "adopted": process is not None and process.own is None,
            "uptime": None if process is None else now - process.since,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
            "next_start": None if self.next_start is None else max(0.0, self.next_start - now),
        }

    async def stop(self, patience: float, *, adopted: bool = True) -> None:
        """End the process (SIGKILL after `patience` seconds), start no other. `adopted` False spares an adopted one."""
        self._stopping.set()
        if self.process is not None and (adopted or self.process.own is not None):
            await self.process.end(patience)


def _differences(running: Sequence[str], wanted: Sequence[str]) -> str:
    """The options of a running process that differ from the wanted ones. Descriptor numbers mean nothing elsewhere."""
    before = dict(pairwise(running))
    return ", ".join(
        f"{option} {before[option]}"
        for option, value in pairwise(wanted)
        if option.startswith("--") and not option.endswith("-fd") and before.get(option, value) != value
    )


def _describe(code: int | None) -> str:
    if code is None:
        return "exit code unknown: it was not our child"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def last_line(path: Path) -> str:
    """The last line of a log, for a message."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"no reason given in {path}"
