"""A stand-in for a role: takes the lock, listens on the socket, and does what its arguments say. Run as a program.

standin.py ROOT ROLE [--exit CODE] [--deaf]: with --exit it ends at once with that code, without taking the role;
with --deaf it does not heed SIGTERM.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

from vai.daemon.roles import RoleLock, socket_path
from vai.errors import VaiError


def main() -> int:
    root, role = Path(sys.argv[1]), sys.argv[2]
    print("a stand-in was started", flush=True)
    if "--exit" in sys.argv:
        print("it does not like its arguments", file=sys.stderr)
        return int(sys.argv[sys.argv.index("--exit") + 1])
    if "--deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with RoleLock(root, role):
            path = socket_path(root, role)
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                while True:
                    listener.accept()[0].close()
    except VaiError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code


sys.exit(main())
