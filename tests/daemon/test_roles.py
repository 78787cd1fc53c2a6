"""Who holds a role is asked of the kernel: stale files mean nothing, living holders are named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vai.daemon.roles import RoleLock, arguments, holder, lock_path, option, socket_path
from vai.errors import AlreadyRunning


def test_a_second_holder_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    with RoleLock(tmp_path, "daemon"):
        assert holder(tmp_path, "daemon") == os.getpid()
        command = re.escape(" ".join(sys.orig_argv[:2]))
        with pytest.raises(AlreadyRunning, match=rf"process {os.getpid()} \({command}") as refused:
            RoleLock(tmp_path, "daemon")
    assert refused.value.exit_code == 3


def test_roles_do_not_stand_in_each_others_way(tmp_path: Path) -> None:
    with RoleLock(tmp_path, "daemon"), RoleLock(tmp_path, "engine"), RoleLock(tmp_path, "server"):
        assert {holder(tmp_path, role) for role in ("daemon", "engine", "server")} == {os.getpid()}


def test_a_role_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, vai.daemon.roles as r;"
        "lock = r.RoleLock(pathlib.Path(sys.argv[1]), 'daemon'); print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert holder(tmp_path, "daemon") == process.pid
        process.kill()
    assert lock_path(tmp_path, "daemon").read_text() == f"{process.pid}\n"  # stale, and of no consequence
    with RoleLock(tmp_path, "daemon"):
        assert holder(tmp_path, "daemon") == os.getpid()


def test_a_stale_lock_file_of_a_living_stranger_is_no_obstacle(tmp_path: Path) -> None:
    path = lock_path(tmp_path, "engine")
    path.parent.mkdir()
    path.write_text("1\n")
    socket_path(tmp_path, "engine").touch()
    assert holder(tmp_path, "engine") is None
    RoleLock(tmp_path, "engine").close()


def test_a_lock_file_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = lock_path(tmp_path, "engine")
    path.parent.mkdir()
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        RoleLock(tmp_path, "engine")
    assert victim.read_text() == "precious"


def test_a_lock_file_deleted_under_its_holder_does_not_hide_a_listening_holder(tmp_path: Path) -> None:
    argv = [sys.executable, str(Path(__file__).with_name("standin.py")), str(tmp_path), "daemon"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        try:
            while not socket_path(tmp_path, "daemon").exists() or holder(tmp_path, "daemon") is None:
                assert process.poll() is None
            lock_path(tmp_path, "daemon").unlink()
            with pytest.raises(AlreadyRunning, match=f"process {process.pid} "):
                RoleLock(tmp_path, "daemon")
        finally:
            process.kill()


def test_the_command_line_of_a_process_is_read_word_by_word() -> None:
    program = "import sys; print('running', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", program, "--host", "a b", "--port"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"  # before, /proc may still be empty
        assert arguments(process.pid) == argv
        assert option(process.pid, "--host") == "a b"
        assert option(process.pid, "--port") is None
        process.communicate()
    assert arguments(process.pid) == []
