"""The program of kernels (kernels.cc) under sanitizers: no byte beside what it may read, nothing left open, no race."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X86 = ["avx512 and amx", "amx and amx"] if platform.machine() == "x86_64" else []


@pytest.mark.timeout(1200)  # most of it compiling
@pytest.mark.parametrize(
    ("sanitizer", "implementations"), [("address", ["scalar and portable", *X86]), ("thread", ["scalar and portable"])]
)
def test_no_sanitizer_finds_anything(sanitizer: str, implementations: list[str], tmp_path: Path) -> None:
    program = tmp_path / f"kernels-{sanitizer}"
    jobs = len(os.sched_getaffinity(0))
    make = ["make", "-s", f"-j{jobs}", f"OUT={tmp_path}", str(program)]
    built = subprocess.run(make, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout[-10_000:]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    digests = dict(line.split(": ") for line in ran.stderr.splitlines())
    assert set(implementations) <= set(digests) and set(digests.values()) == {ran.stdout.strip()}
