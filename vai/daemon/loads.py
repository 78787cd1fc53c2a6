"""Burning in the background: one `python -m vai.burn` at a time, its progress read from its standard output.

Used by the daemon for names whose image is absent (after a reboot) and for `load` requests. A burn that is killed
leaves nothing behind, so nothing here needs undoing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vai.daemon.supervise import Process, last_line
from vai.errors import CorruptImage, Interrupted, InUse, ModelNotFound, Unavailable, VaiError, by_code
from vai.rom import segment
from vai.rom.registry import Name, Registry

log = logging.getLogger("vai.daemon")

_LINE_LIMIT = 1 << 20
_NICE = 10
_PATIENCE = 5.0


def burn_argv(root: Path, source: str) -> list[str]:
    """The command that burns `source` into `root`, one JSON object a line on its standard output."""
    return [sys.executable, "-m", "vai.burn", "--root", str(root), "--source", source]


def parse(line: bytes) -> dict[str, Any]:
    """One line of the burner: {"step", "done", "total"}, at last {"digest", ...} or {"error": {"code", "message"}}."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


@dataclass(slots=True)
class Load:
    """One wish to have an image: from a file, under a name (or none), with the digest the name promises (or None)."""

    source: str
    name: str | None = None
    expected: str | None = None
    state: str = "waiting"  # then "burning", at last "done" or "failed"
    done: int = 0
    total: int = 0
    began: float | None = None
    seconds: float | None = None
    digest: str | None = None
    error: VaiError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self) -> dict[str, Any]:
        """As the status shows it. `rate` in bytes a second and `eta` in seconds where they can be known."""
        elapsed = time.monotonic() - self.began if self.began is not None and self.state == "burning" else None
        rate = self.done / elapsed if elapsed and self.done else None
        return {
            "source": self.source,
            "name": self.name,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "rate": rate,
            "eta": (self.total - self.done) / rate if rate and self.total else None,
            "digest": self.digest,
            "error": None if self.error is None else self.error.message,
        }


def _of(name: Name) -> Load:
    """The load that makes a name's image resident; where it never had one, the name is written with the new digest."""
    return Load(name.source, name=None if name.digest else name.name, expected=name.digest)


def renamed(registry: Registry, name: str, source: str, digest: str) -> Name:
    """The name as it is after a load: what the user chose for it before (recipe, overrides) stays."""
    for known in registry.names():
        if known.name == name:
            return replace(known, source=source, digest=digest)
    return Name(name=name, source=source, digest=digest)


@contextlib.contextmanager
def wish(registry: Registry, name: str, source: str) -> Iterator[None]:
    """A new name is written before its burn, so that a bad one costs no burn; a burn that fails takes it back."""
    new = all(known.name != name for known in registry.names())
    try:
        if new:
            registry.put(Name(name=name, source=source))
        yield
    except BaseException:
        if new:
            with contextlib.suppress(ModelNotFound):
                registry.forget(name)
        raise


class Loader:
    """Loads, one after the other. All of them are remembered until the daemon ends, the last MEMORY at most."""

    MEMORY = 100

    def __init__(self, root: Path, names: Path, output: Path) -> None:
        self.root = root
        self.registry = Registry(root, names)
        self.output = output
        self.loads: list[Load] = []
        self._queue: asyncio.Queue[Load] = asyncio.Queue()
        self._burners: set[Process] = set()

    def wanted(self) -> list[Load]:
        """What is named and absent, queued; names of one image once."""
        absent: dict[str, Name] = {}
        for name in self.registry.names():
            if name.digest is None or not self.registry.is_resident(name.digest):
                absent.setdefault(name.digest or name.name, name)
        return [self.add(_of(name)) for name in absent.values()]

    def by_name(self, wanted: str) -> Load:
        """A load of the image that `wanted` names, over at once where that is resident. Raises ModelNotFound."""
        name = self.registry.get(wanted)
        load = _of(name)
        if name.digest is None or not self.registry.is_resident(name.digest):
            return self.add(load)
        load.state, load.digest = "done", name.digest
        load.over.set()
        return load

    def add(self, load: Load) -> Load:
        """Queue a load, or find the equal one that is already waiting or burning."""
        for other in self.loads:
            if not other.over.is_set() and (other.source, other.name) == (load.source, load.name):
                return other
        self.loads = [*self.loads[-self.MEMORY + 1 :], load]
        self._queue.put_nowait(load)
        return load

    async def run(self) -> None:
        """Burn what is queued, for ever."""
        while True:
            load = await self._queue.get()
            try:
                with contextlib.nullcontext() if load.name is None else wish(self.registry, load.name, load.source):
                    await self._burn(load)
                self._finish(load)
            except (VaiError, OSError) as error:
                load.state = "failed"
                load.error = error if isinstance(error, VaiError) else Unavailable(f"{load.source}: {error}")
                log.warning("load of %s failed: %s", load.source, load.error.message)
            finally:
                load.over.set()

    async def _burn(self, load: Load) -> None:
        """Run the burner over `load.source`; sets `load.digest`. Raises the VaiError it reports."""
        if load.expected is not None and self.registry.is_resident(load.expected):
            load.digest = load.expected
            return
        before = {image.digest for image in self.registry.resident()}
        if not Path(load.source).exists():
            raise ModelNotFound(f"{load.source} is gone; load it from where it is now: vai load FILE --name NAME.")
        load.state, load.began = "burning", time.monotonic()
        log.info("burning %s", load.source)
        reading, writing = os.pipe()
        try:
            process = Process.start(burn_argv(self.root, load.source), output=self.output, stdout=writing)
        finally:
            os.close(writing)
        self._burners.add(process)
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)  # a load must not stall running streams
        await self._follow(load, reading)
        changed = load.digest is not None and load.expected not in (None, load.digest)
        if changed:
            await process.end(_PATIENCE)
        ending = asyncio.create_task(self._reap(process))
        if load.digest is None:
            code = await ending
            reason = f"The burn of {load.source} ended early (exit code {code}): {last_line(self.output)}"
            raise load.error or Interrupted(reason)
        if changed:
            await ending
            self._discard(load, load.digest in before)

    async def _reap(self, process: Process) -> int | None:
        """Wait for a burner, which goes on for a while after publishing, to give the image huge pages."""
        code = await process.exited()
        process.close()
        self._burners.discard(process)
        return code

    async def _follow(self, load: Load, reading: int) -> None:
        """Read the burner's lines until the image is published, or to their end."""
        reader = asyncio.StreamReader(limit=_LINE_LIMIT)
        pipe = os.fdopen(reading, "rb", buffering=0)  # the transport closes it
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while load.digest is None and (line := await reader.readline()):
                message = parse(line)
                load.done = int(message.get("done", load.done))
                load.total = int(message.get("total", load.total))
                load.digest = message.get("digest", load.digest)
                if isinstance(error := message.get("error"), dict):
                    load.error = by_code(str(error.get("code")))(str(error.get("message")))
        finally:
            transport.close()

    def _discard(self, load: Load, was_there: bool) -> None:
        """The file no longer holds the weights that the name promises: never serve others under that name."""
        if not was_there and load.digest is not None:
            with contextlib.suppress(InUse):
                segment.remove(self.root, load.digest)
        raise CorruptImage(
            f"{load.source} has changed: its name promises image {load.expected}, it now gives {load.digest}. "
            "If that is what you want, load it again: vai load FILE --name NAME"
        )

    def _finish(self, load: Load) -> None:
        load.state = "done"
        load.seconds = None if load.began is None else time.monotonic() - load.began
        if load.name is not None and load.digest is not None:
            self.registry.put(renamed(self.registry, load.name, load.source, load.digest))
        log.info("%s is resident as image %s", load.source, load.digest)

    async def stop(self, patience: float) -> None:
        """End the burners. A burn in progress leaves nothing."""
        await asyncio.gather(*(process.end(patience) for process in self._burners))
