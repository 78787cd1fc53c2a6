"""The daemon: `vai serve`. It keeps an engine and a server running, and burns again what is named and absent.

It holds no truth of its own: roles come from locks, images from segments, names from their files, the pool from the
engine that uses it. So it may be killed at any instant; the next one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vai.daemon import pool, protocol, roles
from vai.daemon.loads import Load, Loader
from vai.daemon.supervise import WATCHDOG, Job, Supervisor
from vai.errors import BadRequest, NotEnoughRoom, NotSupported, Unavailable, VaiError
from vai.rom import segment
from vai.rom.room import free_room

log = logging.getLogger("vai.daemon")

SERVER_PATIENCE = 10.0  # seconds for open streams to end after SIGTERM
ENGINE_PATIENCE = 5.0
REQUEST_PATIENCE = 10.0  # seconds that a request waits for an engine that died
LONGEST_ANSWER = 1 << 20
# What vai.engine.port frames, which this room must not import: Hello of protocol 3, then AskStatus. The engine's loop
# answers Hello, the thread that computes answers AskStatus, between two steps.
HELLO = b"\x1b\0\0\0" + b"\x83\xa4type\xa5hello\xa8protocol\x03\xa3pid\x00"
ASK_STATUS = b"\x11\0\0\0" + b"\x81\xa4type\xaaask_status"
LONGEST_SOCKET_PATH = 107  # sun_path of unix(7), less its final zero


@dataclass(frozen=True, slots=True)
class Settings:
    """What the daemon was told. `kv_bytes` None: a share of free memory. `api_key_fd`: where the key is read.
    `deterministic`: the server's requests are, unless they say otherwise.

    Seconds: `patience` that the server's requests wait for an engine that died (0: they end), `watchdog` after which an
    engine that does not answer is killed.
    """

    root: Path
    names: Path
    logs: Path
    host: str
    port: int
    threads: int
    kv_bytes: int | None = None
    kv_type: str = "bf16"
    isa: str | None = None
    fast: str | None = None
    api_key_fd: int | None = None
    patience: float = REQUEST_PATIENCE
    watchdog: float = WATCHDOG
    deterministic: bool = False


class Daemon:
    """One daemon of one root."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.began = time.monotonic()
        self.loader = Loader(settings.root, settings.names, settings.logs / "burn.log")
        self.pool = -1
        self.supervisors: list[Supervisor] = []
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM, SIGINT, SIGHUP or a `shutdown` request; then engine and server are ended too.

        Raises AlreadyRunning where this root has a daemon, Unavailable where the port is taken, BadRequest where a role
        refuses its arguments.
        """
        settings = self.settings
        path = roles.socket_path(settings.root, "daemon")
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise BadRequest(f"{settings.root} is too long a path for sockets; choose a shorter one with VAI_ROOT.")
        segment.prepare(settings.root)
        with roles.RoleLock(settings.root, "daemon"):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
            log.info("daemon: process %d over %s", os.getpid(), settings.root)
            segment.sweep(settings.root)
            self._prepare()
            path.unlink(missing_ok=True)
            async with await asyncio.start_unix_server(self._serve, path):
                try:
                    await self._work()
                finally:
                    path.unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Decide what engine and server are started with; those that live already are adopted as they are."""
        settings = self.settings
        engine = roles.holder(settings.root, "engine")
        adopted = pool.reopen(engine) if engine else None
        self.pool = adopted or _new_pool(settings)
        if roles.holder(settings.root, "server") is None:
            _check_port(settings.host, settings.port)
        self.supervisors = [Supervisor(self._engine()), Supervisor(self._server())]

    def _pool_bytes(self) -> int:
        """Bytes for pages."""
        return pool.page_bytes(os.fstat(self.pool).st_size)

    def _engine(self) -> Job:
        settings, path = self.settings, roles.socket_path(self.settings.root, "engine")
        argv = [sys.executable, "-m", "vai.engine.service", "--root", str(settings.root), "--socket", str(path)]
        argv += ["--lock", str(roles.lock_path(settings.root, "engine")), "--threads", str(settings.threads)]
        argv += ["--kv-bytes", str(self._pool_bytes()), "--pool-fd", str(self.pool), "--kv-type", settings.kv_type]
        if settings.isa is not None:
            argv += ["--isa", settings.isa]
        if settings.fast is not None:
            argv += ["--fast", settings.fast]

        async def ready(pid: int) -> bool:
            return roles.listener(path) == pid

        return Job(
            "engine",
            settings.root,
            argv,
            settings.logs / "engine.log",
            ready,
            lambda pid: str(path),
            pass_fds=(self.pool,),
            answers=lambda: _engine_answers(path),
            watchdog=settings.watchdog,
        )

    def _server(self) -> Job:
        settings, root = self.settings, self.settings.root
        argv = [sys.executable, "-m", "vai.server", "--root", str(root), "--names", str(settings.names)]
        argv += ["--host", settings.host, "--port", str(settings.port)]
        argv += ["--engine-socket", str(roles.socket_path(root, "engine"))]
        argv += ["--daemon-socket", str(roles.socket_path(root, "daemon")), "--patience", str(settings.patience)]
        if settings.deterministic:
            argv += ["--deterministic"]
        pass_fds: tuple[int, ...] = ()
        if settings.api_key_fd is not None:
            argv += ["--api-key-fd", str(settings.api_key_fd)]
            pass_fds = (settings.api_key_fd,)

        def address(pid: int) -> str:
            return f"http://{roles.option(pid, '--host') or '?'}:{roles.option(pid, '--port') or '?'}"

        async def ready(pid: int) -> bool:
            host, port = roles.option(pid, "--host"), roles.option(pid, "--port")
            return host is not None and port is not None and await _alive(host, int(port))

        return Job("server", root, argv, settings.logs / "server.log", ready, address, pass_fds=pass_fds)

    async def _work(self) -> None:
        """Run everything until the end is asked for, then end everything."""
        self.loader.wanted()
        stop = asyncio.create_task(self._stop.wait())
        tasks = [asyncio.create_task(supervisor.run()) for supervisor in self.supervisors]
        loading = asyncio.create_task(self.loader.run())
        done, _ = await asyncio.wait([stop, loading, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not isinstance(task.exception(), VaiError | None):
                task.result()  # a bug of ours: engine and server live on, and the next daemon adopts them
        asked = self._stop.is_set()
        log.info("daemon: stopping; weights stay in memory")
        engine, server = self.supervisors
        await asyncio.gather(self.loader.stop(ENGINE_PATIENCE), server.stop(SERVER_PATIENCE, adopted=asked))
        await engine.stop(ENGINE_PATIENCE, adopted=asked)
        for task in (stop, loading):
            task.cancel()
        ended, _ = await asyncio.wait([loading, *(task for task in tasks if asked or task.done())])
        for task in ended:
            if not task.cancelled():
                task.result()
        log.info("daemon: stopped")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: questions and answers until it closes."""
        try:
            _, uid = roles.peer(writer.get_extra_info("socket"))
            if uid == os.getuid():
                await self._converse(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                question = await protocol.read(reader)
            except BadRequest as error:  # where the next message begins is unknown now: answer and close
                writer.write(protocol.encode(protocol.failure(error)))
                await writer.drain()
                return
            if question is None:
                return
            try:
                answer = {"ok": True, **await self._answer(question)}
            except VaiError as error:
                answer = protocol.failure(error)
            writer.write(protocol.encode(answer))
            await writer.drain()

    async def _answer(self, question: protocol.Message) -> dict[str, Any]:
        match question.get("op"):
            case "ping":
                return {"pid": os.getpid()}
            case "status":
                return self._status()
            case "load":
                return await self._load(question)
            case "shutdown":
                self._stop.set()
                return {"pid": os.getpid()}
            case other:
                raise NotSupported(f"The daemon knows ping, status, load and shutdown, not {other!r}.")

    def _status(self) -> dict[str, Any]:
        return {
            "root": str(self.settings.root),
            "pool_bytes": self._pool_bytes(),
            "roles": {
                "daemon": {"state": "ready", "pid": os.getpid(), "uptime": time.monotonic() - self.began},
                **{supervisor.job.role: supervisor.report() for supervisor in self.supervisors},
            },
            "loads": [load.report() for load in self.loader.loads],
        }

    async def _load(self, question: protocol.Message) -> dict[str, Any]:
        """{"op": "load", "name"} burns again what a name means; {"source", "name"} burns a file under a name.

        With "wait" true (the default) the answer comes at the end of the load, and is its error if it failed.
        """
        source, name, wait = question.get("source"), question.get("name"), question.get("wait", True)
        if not isinstance(name, str) or not (source is None or isinstance(source, str)) or not isinstance(wait, bool):
            raise BadRequest("A load needs a name (and, for a new model, its source file) as text; wait is a boolean.")
        load = self.loader.by_name(name) if source is None else self.loader.add(Load(source, name=name))
        if wait:
            await load.over.wait()
            if load.error is not None:
                raise load.error
        return load.report()


async def _engine_answers(path: Path) -> None:
    """Returns once the engine on the socket `path` has said hello and has got from one step to the next.

    Raises OSError or EOFError where it does not serve the connection; waits as long as it takes.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(HELLO + ASK_STATUS)
        await _message(reader)
        with contextlib.suppress(EOFError):  # an engine of another version says so, and closes: that is an answer, too
            await _message(reader)
    finally:
        writer.close()


async def _message(reader: asyncio.StreamReader) -> None:
    length = int.from_bytes(await reader.readexactly(4), "little")
    await reader.readexactly(min(length, LONGEST_ANSWER))


def _new_pool(settings: Settings) -> int:
    """Memory for a scratchpad. Raises NotEnoughRoom for more than is free: it is taken page by page, in use."""
    room = free_room(settings.root)
    size = settings.kv_bytes or pool.default_bytes(room.free)
    if size > room.free:
        raise NotEnoughRoom(
            f"A scratchpad of {size >> 20} MiB needs more than the {room.free >> 20} MiB that are free ({room.limit}); "
            "choose less with vai serve --kv, or remove a model."
        )
    return pool.create(size)


def _check_port(host: str, port: int) -> None:
    """Refuse now what the server would refuse in a moment. Raises Unavailable where another program has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use by another program" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
            raise Unavailable(f"{host}:{port} {reason}; choose another with vai serve --port.") from None


async def _alive(host: str, port: int) -> bool:
    """Whether the server answers at all: GET /livez, which needs no key, no engine and no model."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - asked of ourselves, nothing is bound
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET /livez HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.readline()).split(b" ")[1:2] == [b"200"]
            finally:
                writer.close()
    return False
