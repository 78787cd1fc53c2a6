"""The kernels of AVX-512 and AMX on any x86-64 processor, whether it has the instructions or not.

Their sources are compiled over plain C++ that does what the instructions do (tests/native/emulated), and judged by the
tests that judge the kernels of a processor that has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vai.kernels import table

ROOT = Path(__file__).parents[2]
WHERE = ("tests/parity", "tests/engine/test_fast.py")
# Tests that name an implementation, and of the others those that go through all there are or take the best one. In the
# engine those that do not depend on how fast it is.
NAMED, ALL, BEST = "avx512 or amx", "test_kv_types or test_fast_plan or (test_fuzz and 0])", "every_bit or reference"
WHICH = f"{NAMED} or {ALL} or (test_fast.py and ({BEST}))"
LEAST = {"avx512": 300, "amx": 200, "test_kv_types": 20, "test_fast_plan": 10, "test_fuzz": 20, "engine.test_fast": 8}
if "avx512" in table.isas() and "amx" in table.fasts():
    # Its own kernels go through all of those, the emulated ones through some: it is other machines that need them.
    WHICH = "test_fast_plan or (test_fuzz and 0])"
    LEAST = {"test_fast_plan": 10, "test_fuzz": 20}


def succeed(*argv: str) -> str:
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout.strip()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """The native module with emulated instructions."""
    python = (sys.executable, "-m")
    settings = {
        "VAI_EMULATED": "ON",
        "CMAKE_CXX_FLAGS": "-O1",
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": succeed(*python, "nanobind", "--cmake_dir"),
    }
    told = [f"-D{name}={value}" for name, value in settings.items()]
    succeed(*python, "cmake", "-S", str(ROOT), "-B", str(tmp_path), *told)
    jobs = str(len(os.sched_getaffinity(0)))
    succeed(*python, "cmake", "--build", str(tmp_path), "--target", "_native", "--parallel", jobs)
    (path,) = tmp_path.glob("_native*.so")
    return path


@pytest.mark.timeout(1200)  # most of it compiling
def test_kernels_that_this_processor_may_lack_pass_the_tests_of_those_it_has(module: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    runner = (sys.executable, "tests/native/run_emulated.py", str(module))
    succeed(*runner, "-p", "no:cacheprovider", "-x", f"--junitxml={report}", "-k", WHICH, *WHERE)
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case.attrib for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')} {case.get('name')}" for case in cases]
    ran = {word: sum(word in name for name in names) for word in LEAST}
    assert all(ran[word] >= least for word, least in LEAST.items()), ran
