"""A client process that attaches one image and reads every page of it; the attach benchmark starts one or several.

Prints one line of JSON, then holds the image until its standard input closes, so that its memory can be looked at.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vai.rom import segment

STRIDE = 4096
SPAN = 64 << 20


def rss_anon() -> int:
    """Private memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def main(root: str, digest: str) -> None:
    start = time.perf_counter()
    image = segment.attach(Path(root), digest)
    attached = time.perf_counter() - start
    before = rss_anon()
    start = time.perf_counter()
    for offset in range(0, len(image.data), SPAN):
        sum(image.data[offset : offset + SPAN : STRIDE])
    touched = time.perf_counter() - start
    answer = {"attach": attached, "touch": touched, "rss_anon_growth": rss_anon() - before, "bytes": len(image.data)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
