"""The burner as a process: `python -m vai.burn --root DIR --source FILE`. It burns, says so, and tidies up the pages.

Standard output has one JSON object a line. While it works: {"step", "done", "total", "rate"}, in bytes and bytes a
second. At last {"step": "published", "digest", "weights", "bytes", "seconds"}, or {"error": {"code", "message"}} with
that error's exit code. SIGINT and SIGTERM end a burn without a trace until the step "publishing", from where on it
ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from vai.burn.burn import Progress, burn
from vai.errors import Interrupted, VaiError
from vai.rom import segment

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHARES = 200  # lines of progress a burn prints at most


def main(argv: list[str]) -> int:
    """Run the burner; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vai.burn", description="Burn a GGUF file into a ROM image.")
    parser.add_argument("--root", type=Path, required=True, help="where images live")
    parser.add_argument("--source", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--threads", type=int, default=2, choices=range(1, 257), metavar="N", help="default: 2")
    arguments = parser.parse_args(argv)
    _on_signals(_interrupt)
    try:
        burned = burn(arguments.source, arguments.root, threads=arguments.threads, progress=_reporter())
    except VaiError as error:
        _say(error={"code": error.code, "message": error.message})
        return error.exit_code
    _say(step="published", **burned._asdict())
    _on_signals(signal.SIG_DFL)
    _collapse(arguments.root, burned.digest)
    return 0


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _on_signals(signal.SIG_IGN)  # a second signal must not disturb the cleaning up
    raise Interrupted(f"Interrupted by {signal.Signals(number).name}; nothing was left behind.")


def _reporter() -> Callable[[Progress], None]:
    """Prints progress, though not every chunk of a large image."""
    printed = 0

    def report(progress: Progress) -> None:
        nonlocal printed
        if progress.phase == "publishing":
            _on_signals(signal.SIG_IGN)
        enough = progress.done - printed >= progress.total // _SHARES
        if enough or progress.done in (0, progress.total):
            printed = progress.done
            rate = progress.done / progress.seconds if progress.seconds else 0.0
            _say(step=progress.phase, done=progress.done, total=progress.total, rate=round(rate))

    return report


def _say(**fields: object) -> None:
    # Whoever listened may be gone; the image is wanted all the same.
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(fields, ensure_ascii=False).encode() + b"\n")


def _collapse(root: Path, digest: str) -> None:
    """Give the image 2 MiB pages, in time that nobody else wants."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(19)
    # Gone or held already: then there is nothing to improve.
    with contextlib.suppress(VaiError), segment.attach(root, digest) as image:
        segment.collapse(image)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
