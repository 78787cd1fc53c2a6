"""The peer beside us: llama.cpp's server on the same file, from page cache, at its best flags, which are printed."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vai.cli.bench.client import Raw
from vai.cli.bench.stand import DEADLINE, free_port
from vai.errors import Unavailable

PROMPT = "The quick brown fox jumps over the lazy dog"


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


def _ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.005)
    raise Unavailable(f"The peer did not become ready (exit status {process.poll()}).")


@contextmanager
def running(binary: Path, file: Path, port: int, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A peer that serves `file` on `port` with these flags, ready; killed at the end. Raises Unavailable."""
    command = [str(binary), "-m", str(file), "--port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _ready(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def start(binary: Path, file: Path, threads: int, flags: list[str], tokens: int = 32) -> dict[str, Any]:
    """Start the peer once: seconds to ready, to the first token, its memory (PSS), and its decode rate."""
    port = free_port()
    words = ["-t", str(threads), "-c", "2048", "-np", "1", *flags]
    begin = time.perf_counter()
    with running(binary, file, port, words) as process:
        ready = time.perf_counter() - begin
        raw = Raw("127.0.0.1", port)
        body = {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "cache_prompt": False}
        first, status, answer = raw.post("/completion", body)
        if status != 200:
            raise Unavailable(f"The peer refused: {answer[:200]!r}.")
        rates = []
        for _ in range(3):
            _, _, answer = raw.post("/completion", {**body, "n_predict": tokens, "ignore_eos": True})
            rates.append(json.loads(answer)["timings"]["predicted_per_second"])
        raw.close()
        return {
            "flags": " ".join(["--port", str(port), *words]),
            "ready": ready,
            "first_answer": ready + first,
            "pss": _pss(process.pid),
            "tokens_per_second": sorted(rates)[1],
        }
