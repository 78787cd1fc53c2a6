"""Holders are read from the kernel."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path

from vai.rom.holders import holders


def test_a_file_nobody_locks_and_one_that_is_not_there_have_no_holders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert holders(tmp_path / "file") == []
    assert holders(tmp_path / "absent") == []


def test_who_only_waits_for_a_lock_is_no_holder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    waits = "import fcntl, sys; print('here', flush=True); fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        command = [sys.executable, "-c", waits, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiter:
            waiter.stdout.readline()
            waiting = re.compile(rf"-> FLOCK .* {waiter.pid} ")  # others on this machine may wait for other locks
            while not waiting.search(Path("/proc/locks").read_text()):
                assert waiter.poll() is None
            assert waiter.pid not in [h.pid for h in holders(path)]
            fcntl.flock(held, fcntl.LOCK_UN)
            assert waiter.wait() == 0


def test_a_lock_whose_taker_died_is_its_heirs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    script = """
import fcntl, os, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_SH)
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        heir = int(process.stdout.readline())
        process.wait()
        assert [h.pid for h in holders(path)] == [heir]
        process.stdin.close()


def test_a_command_line_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(1, flush=True); input()"
    command = [sys.executable, "-c", script, str(path), "\x1b[2J"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        (holder,) = holders(path)
        assert holder.command.isprintable()
        process.communicate("\n")
