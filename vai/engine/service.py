"""The engine process: `python -m vai.engine.service`. One thread steps the engine, this loop talks (wire: port.py).

The scratchpad's memory is a memfd named "vai-pool" (daemon/pool.py). `--pool-fd N` hands over one that somebody keeps,
so that it outlives this process; without it `--kv-bytes` of new memory are made. The descriptor stays open: a daemon
that adopts a living engine opens it through `/proc/PID/fd`, so no message exists for it.

The role is held by an flock on run/engine.lock, which has this pid in it; a second engine of the same root ends with
code 3. SIGTERM ends every stream with the code "unavailable" and the process with code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vai.daemon import pool as memory
from vai.daemon.roles import RoleLock, lock_path, peer
from vai.engine.engine import Engine
from vai.engine.port import (
    PROTOCOL,
    Abort,
    AskStatus,
    AskSwitches,
    EndSession,
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
    ToEngine,
    frame,
    read_message,
)
from vai.errors import BadRequest, Overloaded, Unavailable, VaiError, WrongVersion
from vai.kernels import table
from vai.kernels.program import KV_TYPES
from vai.request import Output, Request
from vai.rom import segment
from vai.rom.room import free_room
from vai.scratchpad.pages import map_pool

STOP_PATIENCE = 2.0  # seconds that a running step has to end after SIGTERM
BACKLOG = 128
MAX_UNREAD = 8 << 20  # bytes kept for a client that does not read
MAX_UNANSWERED = 1000  # questions of one client
LINGER = 5.0  # seconds that a client has to read the last of what was sent to it

log = logging.getLogger("vai.engine")

_decoder = msgspec.msgpack.Decoder(ToEngine)
Work = Callable[[Engine], None]


class EngineThread:
    """The one thread that owns the engine. Work is done between steps, in order; without any it sleeps.

    Like the loop it keeps its niceness: what takes time is done by the kernels' threads, which are nicer than both.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Output]], None], broken: Callable[[], None]) -> None:
        """`deliver` gets the outputs of every step, `broken` is called if the thread ends by an error; both in it."""
        self._engine = engine
        self._deliver = deliver
        self._broken = broken
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def do(self, work: Work) -> None:
        """Have `work` done between two steps."""
        self._work.put(work)

    def stop(self) -> bool:
        """Release everything after the current step; False where that takes too long."""
        self._work.put(None)
        self._thread.join(STOP_PATIENCE)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            while self._do_work():
                outputs = self._engine.step()
                if outputs:
                    self._deliver(outputs)
        except Exception:
            log.exception("the engine thread ended")
            self._broken()
        self._engine.close()

    def _do_work(self) -> bool:
        """Everything that is asked for; waits for it where there is nothing else to do. False at the end."""
        while True:
            try:
                work = self._work.get(block=not self._engine.has_work(), timeout=self._engine.patience())
            except queue.Empty:
                return True
            if work is None:
                return False
            work(self._engine)


class Connection:
    """One client. `streams` maps its request ids to the engine's, which are unique over all connections."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.streams: dict[str, str] = {}
        self.unanswered = 0
        self._number = number
        self._writer = writer

    def open_stream(self, identity: str) -> str:
        """A new stream's id inside the engine. Raises BadRequest for an id in use."""
        if identity in self.streams:
            raise BadRequest(f"The request id '{identity}' is in use on this connection.")
        self.streams[identity] = f"{self._number}/{identity}"
        return self.streams[identity]

    def send(self, message: FromEngine) -> None:
        """Queue a message. A client that does not read loses its connection, not everybody's memory."""
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            self._writer.transport.abort()
        elif not self._writer.is_closing():
            self._writer.write(frame(message))

    def answer(self, message: FromEngine) -> None:
        """Queue the answer to a question."""
        self.unanswered -= 1
        self.send(message)

    def close(self) -> None:
        """End the connection once what was sent is out, or where the client does not read it, LINGER later."""
        self._writer.close()
        asyncio.get_running_loop().call_later(LINGER, self._writer.transport.abort)


class Service:
    """The socket's side of an engine."""

    def __init__(self, engine: Engine) -> None:
        """Starts the engine's thread. Made inside the loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._loop_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._streams: dict[str, tuple[Connection, str]] = {}  # the engine's request id -> whose, and its id there
        self._connections: dict[Connection, asyncio.Task[None] | None] = {}
        self._accepted = 0
        self.ended = asyncio.Event()
        self.broken = False
        self._thread = EngineThread(engine, self._deliver_soon, self._break_soon)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end; then all its requests are aborted."""
        if peer(writer.get_extra_info("socket"))[1] != os.getuid():
            writer.close()
            return
        self._accepted += 1
        connection = Connection(self._accepted, writer)
        self._connections[connection] = asyncio.current_task()
        try:
            await self._talk(connection, reader)
        except VaiError as error:
            log.warning("a connection is closed: %s", error.message)
            connection.send(Failed(error.code, error.message))
        except (OSError, asyncio.IncompleteReadError):
            pass  # it is gone, which is how every connection ends
        finally:
            del self._connections[connection]
            for identity in list(connection.streams):
                self._abort(connection, identity)
            connection.close()

    async def stop(self) -> bool:
        """End streams with a reason, connections, and the engine; False where its last step takes too long."""
        why = "failed and ends" if self.broken else "was asked to stop"
        reason = Unavailable(f"The engine {why}; send the request again once it is back.")
        self._deliver([_refusal(identity, reason) for identity in self._streams])
        tasks = [task for task in self._connections.values() if task is not None]
        for connection in list(self._connections):
            connection.close()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_PATIENCE)
        return self._thread.stop()

    async def _talk(self, connection: Connection, reader: asyncio.StreamReader) -> None:
        hello = await read_message(reader, _decoder)
        if not isinstance(hello, Hello) or hello.protocol != PROTOCOL:
            raise WrongVersion(f"This engine speaks protocol {PROTOCOL}, its client does not. Run both of one version.")
        connection.send(Hello(pid=os.getpid()))
        while True:
            match await read_message(reader, _decoder):
                case Submit(request):
                    self._submit(connection, request)
                case Mask(identity, position, bits):
                    self._mask(connection, identity, position, bits)
                case Abort(identity):
                    self._abort(connection, identity)
                case Release(image):
                    self._ask(connection, partial(_release, image))
                case EndSession(session, salt):
                    self._ask(connection, partial(_end_session, session, salt))
                case AskStatus():
                    self._ask(connection, self._status)
                case AskSwitches():
                    self._ask(connection, Engine.switches)
                case Hello():
                    raise BadRequest("A second Hello on one connection.")

    def _submit(self, connection: Connection, request: Request) -> None:
        inner = msgspec.structs.replace(request, id=connection.open_stream(request.id))
        self._streams[inner.id] = (connection, request.id)

        def submit(engine: Engine) -> None:
            try:
                engine.submit(inner)
            except VaiError as error:
                self._deliver_soon([_refusal(inner.id, error)])
            except Exception as error:  # whatever it is, it is this request's alone
                log.exception("a request could not be taken")
                self._deliver_soon(
                    [_refusal(inner.id, VaiError(f"The engine could not take this request: {error!r}."))]
                )

        self._thread.do(submit)

    def _mask(self, connection: Connection, identity: str, position: int, bits: bytes) -> None:
        inner = connection.streams.get(identity)
        if inner is not None:
            self._thread.do(lambda engine: engine.mask(inner, position, bits))

    def _abort(self, connection: Connection, identity: str) -> None:
        inner = connection.streams.pop(identity, None)
        if inner is not None:
            del self._streams[inner]
            self._thread.do(lambda engine: engine.abort(inner))

    def _status(self, engine: Engine) -> FromEngine:
        """The engine's status, with the CPU time of the loop's thread in it."""
        status = engine.status()
        talking = time.clock_gettime(self._loop_clock)
        return Status(msgspec.structs.replace(status, host_seconds=status.host_seconds + talking))

    def _ask(self, connection: Connection, question: Callable[[Engine], FromEngine]) -> None:
        """Have a question answered between two steps. Raises BadRequest for the one too many."""
        if connection.unanswered >= MAX_UNANSWERED:
            raise BadRequest(f"{MAX_UNANSWERED} questions wait for their answers already.")
        connection.unanswered += 1
        self._thread.do(lambda engine: self._soon(connection.answer, question(engine)))

    def _deliver(self, outputs: list[Output]) -> None:
        """One message for each connection that has a part in these outputs."""
        parts: dict[Connection, list[Output]] = {}
        for output in outputs:
            if output.id not in self._streams:
                continue  # aborted: nobody listens
            connection, identity = self._streams[output.id]
            if output.finish is not None:
                del self._streams[output.id], connection.streams[identity]
            parts.setdefault(connection, []).append(msgspec.structs.replace(output, id=identity))
        for connection, part in parts.items():
            connection.send(Outputs(part))

    def _deliver_soon(self, outputs: list[Output]) -> None:
        self._soon(self._deliver, outputs)

    def _break_soon(self) -> None:
        self.broken = True
        self._soon(self.ended.set)

    def _soon(self, call: Callable[..., object], *arguments: object) -> None:
        """From the engine's thread: have the loop do this."""
        self._loop.call_soon_threadsafe(call, *arguments)


def _refusal(identity: str, error: VaiError) -> Output:
    wait = error.retry_after if isinstance(error, Overloaded) else None
    return Output(id=identity, finish="error", error=(error.code, error.message), retry_after=wait)


def _release(image: str, engine: Engine) -> Released:
    engine.release(image)
    return Released(image)


def _end_session(session: str, cache_salt: str, engine: Engine) -> SessionEnded:
    return SessionEnded(engine.end_session(session, cache_salt))


def arguments() -> argparse.ArgumentParser:
    """The command line of the process."""
    parser = argparse.ArgumentParser(prog="vai.engine.service", description="The engine; started by `vai serve`.")
    parser.add_argument("--root", type=Path, required=True, help="where images and run files are")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    parser.add_argument("--lock", type=Path, required=True, help="lock file of the role")
    parser.add_argument("--threads", type=int, required=True, help="compute threads")
    parser.add_argument("--kv-bytes", type=int, help="size of the scratchpad; default: a quarter of the free memory")
    parser.add_argument("--kv-type", choices=KV_TYPES, default="bf16", help="how keys and values are stored")
    parser.add_argument("--pool-fd", type=int, help="inherited descriptor of the scratchpad's memory")
    parser.add_argument("--isa", choices=("scalar", "avx2", "avx512", "amx"), help="force an instruction set")
    parser.add_argument(
        "--fast", choices=("off", "portable", "amx"), help="what may compute prompts; default: the best"
    )
    return parser


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for this user alone, in the place of a dead one. Raises Unavailable."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # we hold the role, so whoever made it is dead
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(f"The engine cannot listen on {path}: {error.strerror or error}.") from None
    return listener


def open_pool(root: Path, descriptor: int | None, size: int | None) -> NDArray[np.uint8]:
    """The scratchpad: the one handed over, or new memory. Raises BadRequest, NotEnoughRoom."""
    if descriptor is None:
        descriptor = memory.create(size or memory.default_bytes(free_room(root).free))
    pool = map_pool(descriptor)
    found = memory.page_bytes(pool.nbytes)
    if size is not None and found < size:
        raise BadRequest(f"--kv-bytes {size} is more than the {found} bytes of the scratchpad handed over.")
    return pool


def make_engine(args: argparse.Namespace) -> Engine:
    """The engine with every resident image attached, and what the pool holds for them.

    An image that cannot be attached is logged, and refused when asked for.
    """
    pool = open_pool(args.root, args.pool_fd, args.kv_bytes)
    fast = table.fast(args.fast)
    engine = Engine(args.root, threads=args.threads, pool=pool, isa=args.isa, fast=fast, kv_type=args.kv_type)
    for path in sorted((args.root / "images").glob("*.rom")):
        try:
            engine.attach(path.stem)
        except VaiError as error:
            log.warning("image %s is not attached: %s", path.stem[:12], error.message)
    engine.adopt()
    return engine


async def serve(engine: Engine, path: Path) -> int:
    """Listen until SIGTERM, SIGINT or an error of the engine; returns the exit code."""
    listener = listen(path)
    service = Service(engine)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.ended.set)
    server = await asyncio.start_unix_server(service.accept, sock=listener)
    log.info("listening on %s", path)
    await service.ended.wait()
    server.close()
    path.unlink(missing_ok=True)
    stopped = await service.stop()
    code = 1 if service.broken else 0
    if not stopped:
        os._exit(code)  # a step is still running in native code, on memory that an orderly end would take away
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the engine; returns the exit code."""
    args = arguments().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        segment.prepare(args.root)
        if args.lock != lock_path(args.root, "engine"):
            raise BadRequest(f"--lock {args.lock} is not the engine's lock of {args.root}.")
        with RoleLock(args.root, "engine"):
            return asyncio.run(serve(make_engine(args), args.socket))
    except VaiError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the process's own last word
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
