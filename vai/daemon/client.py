"""One question to the daemon, over its socket. Standard library only; takes paths as arguments."""

from __future__ import annotations

import socket
from pathlib import Path

from vai.daemon import protocol
from vai.errors import Unavailable


def call(path: Path, op: str, *, timeout: float | None = 10.0, **fields: object) -> protocol.Message:
    """Ask the daemon listening on `path` and return its answer.

    `timeout` in seconds, None to wait as long as it takes. Raises Unavailable where no daemon answers, and the VaiError
    the daemon refused with.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            connection.sendall(protocol.encode({"op": op, **fields}))
            answer = protocol.receive(connection)
        except TimeoutError:
            raise Unavailable(f"The daemon did not answer within {timeout} s; `vai logs daemon` may say why.") from None
        except OSError as error:
            raise Unavailable(
                f"No daemon is running ({path}: {error.strerror or error}). Start it: vai serve."
            ) from None
    return protocol.unwrap(answer)
