"""The server process: `python -m vai.server`. Every value is an argument; the API key comes through a descriptor."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from vai import llm
from vai.daemon.roles import RoleLock
from vai.errors import BadRequest, Unavailable, VaiError
from vai.rom import segment
from vai.server.app import build
from vai.server.guard import is_loopback
from vai.server.protocol import Protocol

MAX_KEY_BYTES = 4096
KEEP_ALIVE_SECONDS = 60
GRACE_SECONDS = 8  # streams may end this long after SIGTERM; the daemon waits 10
BACKLOG = 2048
MAX_FILES = 65536
MAX_PATIENCE = 3600


def arguments() -> argparse.ArgumentParser:
    """The command line of the process."""
    parser = argparse.ArgumentParser(prog="vai.server", description="The HTTP server of VAI; started by `vai serve`.")
    parser.add_argument("--root", type=Path, required=True, help="where images and run files are")
    parser.add_argument("--names", type=Path, required=True, help="where name files are")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8642, help="port to listen on; 0 takes a free one")
    parser.add_argument("--engine-socket", type=Path, required=True, help="socket of the engine")
    parser.add_argument(
        "--patience", type=float, default=10, help="seconds to wait for an engine that is away; 0 gives answers up"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="what requests are that do not say: no pages of the fast kind"
    )
    parser.add_argument("--daemon-socket", type=Path, help="socket of the daemon, which loads models on demand")
    parser.add_argument("--api-key-fd", type=int, help="inherited descriptor that the API key is read from")
    return parser


def read_key(descriptor: int) -> str:
    """The key behind an inherited descriptor, which is closed. Raises BadRequest."""
    try:
        with os.fdopen(descriptor, "rb") as source:
            raw = source.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"--api-key-fd {descriptor} cannot be read: {error.strerror}.") from None
    key = raw.strip()
    if not key or len(raw) > MAX_KEY_BYTES or not key.isascii() or not key.decode("ascii").isprintable():
        raise BadRequest(f"The API key must be 1 to {MAX_KEY_BYTES} printable ASCII characters.")
    return key.decode("ascii")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on the first address of `host`. Raises BadRequest, Unavailable, naming the address."""
    if not 0 <= port <= 65535:
        raise BadRequest(f"--port {port} must be from 0 to 65535.")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise BadRequest(f"--host {host} is not an address: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(
            f"Cannot listen on {host} port {port}: {error.strerror}. Choose another with --port."
        ) from None
    listener.setblocking(False)
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, which does not die of the signal that it has obeyed: a clean stop is exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # asked twice
        self.should_exit = True


def allow_many_connections() -> None:
    """Raise the soft limit on open files, 1,024 on most machines, to what the machine allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def warm(frontend: llm.Frontend) -> None:
    """Build the tokenizers of what is resident before anybody asks, one after another, off the loop."""
    for card in frontend.models():
        if card.resident:
            try:
                await frontend.open(card.name)
            except VaiError as error:  # whoever asks for this model gets the same sentence
                logging.getLogger("vai.server").warning("'%s' cannot be opened: %s", card.name, error.message)


async def serve(args: argparse.Namespace, listener: socket.socket, api_key: str | None) -> None:
    """Answer requests until SIGTERM or SIGINT."""
    port = llm.connect(args.engine_socket, patience=args.patience)
    frontend = llm.Frontend(args.root, args.names, port)
    warming = asyncio.ensure_future(warm(frontend))
    try:
        app = build(
            frontend,
            port,
            root=args.root,
            daemon_socket=args.daemon_socket,
            host=args.host,
            api_key=api_key,
            deterministic=args.deterministic,
        )
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        await Server(config).serve(sockets=[listener])
    finally:
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await frontend.close()
        await port.close()


def main(argv: list[str] | None = None) -> int:
    """Run the server; returns the exit code."""
    args = arguments().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        api_key = None if args.api_key_fd is None else read_key(args.api_key_fd)
        if not 0 <= args.patience <= MAX_PATIENCE:
            raise BadRequest(f"--patience {args.patience:g} must be from 0 to {MAX_PATIENCE} seconds.")
        if api_key is None and not is_loopback(args.host):
            raise BadRequest(
                f"--host {args.host} can be reached from other machines, so the server needs a key: set VAI_API_KEY, "
                "or listen on 127.0.0.1."
            )
        segment.prepare(args.root)
        with RoleLock(args.root, "server"), listen(args.host, args.port) as listener:
            address, number = listener.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            logging.getLogger("vai.server").info("Listening on http://%s:%d", shown, number)
            allow_many_connections()
            uvloop.run(serve(args, listener, api_key))
    except VaiError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the process's own last word
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
