"""`python -m vai.daemon`: the daemon as a process. Every value is an argument; `vai serve` fills them in."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from vai.daemon.service import REQUEST_PATIENCE, Daemon, Settings
from vai.daemon.supervise import WATCHDOG, open_log
from vai.errors import VaiError


def _arguments() -> Settings:
    parser = argparse.ArgumentParser(prog="python -m vai.daemon", description="The VAI daemon; `vai serve` starts it.")
    for name in ("root", "names", "logs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int)
    parser.add_argument("--kv-type", default="bf16")
    parser.add_argument("--isa")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--fast")
    parser.add_argument("--patience", type=float, default=REQUEST_PATIENCE)
    parser.add_argument("--watchdog", type=float, default=WATCHDOG)
    parser.add_argument("--api-key-fd", type=int)
    return Settings(**vars(parser.parse_args()))


def _log_to(path: Path) -> None:
    """Into the log file, and to standard error too unless that is the same file."""
    open_log(path).close()  # puts an overlong one aside
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if not os.path.samestat(path.stat(), os.fstat(sys.stderr.fileno())):
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)


def main() -> int:
    """Run the daemon to its end and return the exit code."""
    os.umask(0o077)
    settings = _arguments()
    try:
        _log_to(settings.logs / "daemon.log")
        asyncio.run(_run(settings))
    except VaiError as error:
        return _last_word(error.message, error.exit_code)
    except OSError as error:
        return _last_word(str(error), VaiError.exit_code)
    return 0


def _last_word(message: str, code: int) -> int:
    print(f"vai: {message}", file=sys.stderr)  # noqa: T201 - to whoever started us
    return code


async def _run(settings: Settings) -> None:
    await Daemon(settings).run()


if __name__ == "__main__":
    sys.exit(main())
