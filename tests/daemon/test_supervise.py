"""Supervision, with stand-in roles: real processes, locks, sockets and signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from vai.daemon import roles, supervise
from vai.daemon.supervise import Backoff, Job, Supervisor
from vai.errors import BadRequest

STANDIN = str(Path(__file__).with_name("standin.py"))


def job(root: Path, *options: str) -> Job:
    path = roles.socket_path(root, "engine")

    async def ready(pid: int) -> bool:
        return roles.listener(path) == pid

    argv = [sys.executable, STANDIN, str(root), "engine", *options]
    return Job("engine", root, argv, root / "engine.log", ready, lambda pid: str(path))


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def supervised(job: Job) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(job)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        await supervisor.stop(5.0)
        await running


def pid_of(supervisor: Supervisor) -> int:
    assert supervisor.process is not None
    return supervisor.process.pid


@pytest.fixture
def living(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in engine that is already running, with its role taken."""
    with subprocess.Popen([sys.executable, STANDIN, str(tmp_path), "engine"], stdout=subprocess.DEVNULL) as process:
        while roles.listener(roles.socket_path(tmp_path, "engine")) is None:
            assert process.poll() is None
            time.sleep(0.002)
        yield process
        process.kill()


async def test_a_role_that_dies_is_started_again_at_once(tmp_path: Path) -> None:
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
        first = pid_of(supervisor)
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
        assert pid_of(supervisor) != first
        assert supervisor.last_exit == "killed by SIGKILL"


async def test_stop_ends_the_role_and_starts_no_other(tmp_path: Path) -> None:
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
    assert supervisor.state == "stopped"
    assert supervisor.last_exit == "exit code 0"
    assert roles.holder(tmp_path, "engine") is None


async def test_a_role_deaf_to_sigterm_is_killed_after_the_deadline(tmp_path: Path) -> None:
    supervisor = Supervisor(job(tmp_path, "--deaf"))
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor.state == "ready")
    await supervisor.stop(0.1)
    await running
    assert supervisor.last_exit == "killed by SIGKILL"


async def test_a_living_role_is_adopted_and_not_started_twice(tmp_path: Path, living: subprocess.Popen[bytes]) -> None:
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
        assert supervisor.report()["adopted"]
        assert pid_of(supervisor) == living.pid
    assert living.wait(60) == 0


async def test_an_adopted_role_that_dies_is_replaced_by_an_own_one(
    tmp_path: Path, living: subprocess.Popen[bytes]
) -> None:
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
        living.kill()
        await until(lambda: supervisor.restarts == 1 and supervisor.state == "ready")
        assert not supervisor.report()["adopted"]
        assert pid_of(supervisor) != living.pid


async def test_a_role_whose_lock_file_was_deleted_is_still_found(
    tmp_path: Path, living: subprocess.Popen[bytes]
) -> None:
    roles.lock_path(tmp_path, "engine").unlink()
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
        assert pid_of(supervisor) == living.pid


async def test_stopping_may_spare_an_adopted_role(tmp_path: Path, living: subprocess.Popen[bytes]) -> None:
    supervisor = Supervisor(job(tmp_path))
    running = asyncio.create_task(supervisor.run())
    await until(lambda: supervisor.state == "ready")
    await supervisor.stop(5.0, adopted=False)
    assert living.poll() is None
    running.cancel()


async def test_a_role_that_crashes_at_start_is_tried_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY", 0.01)
    caplog.set_level("INFO", "vai.daemon")
    async with supervised(job(tmp_path, "--exit", "1")) as supervisor:
        await until(lambda: supervisor.restarts == 5)
        assert supervisor.last_exit == "exit code 1"
    pauses = [record.message for record in caplog.records if "next start" in record.message]
    assert pauses == [f"engine: next start in {delay} s" for delay in ("0.01", "0.02", "0.04", "0.08")]


async def test_a_role_that_refuses_its_arguments_is_not_tried_again(tmp_path: Path) -> None:
    supervisor = Supervisor(job(tmp_path, "--exit", "2"))
    with pytest.raises(BadRequest, match="it does not like its arguments"):
        await asyncio.wait_for(supervisor.run(), 60)
    assert supervisor.state == "failed"
    assert supervisor.restarts == 0


async def test_the_child_lives_in_a_session_of_its_own_and_inherits_only_what_it_was_given(tmp_path: Path) -> None:
    secret = os.memfd_create("not-for-children", 0)
    os.set_inheritable(secret, True)
    try:
        async with supervised(job(tmp_path)) as supervisor:
            await until(lambda: supervisor.state == "ready")
            pid = pid_of(supervisor)
            assert os.getsid(pid) == pid
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert not any("not-for-children" in link for link in links)
    finally:
        os.close(secret)


async def test_an_overlong_log_is_put_aside_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "LOG_LIMIT", 10)
    (tmp_path / "engine.log").write_text("much too long\n")
    async with supervised(job(tmp_path)) as supervisor:
        await until(lambda: supervisor.state == "ready")
        assert (tmp_path / "engine.log.old").read_text() == "much too long\n"
        assert (tmp_path / "engine.log").read_text() == "a stand-in was started\n"


def test_backoff_grows_to_a_limit_while_a_role_never_becomes_ready() -> None:
    backoff = Backoff()
    delays = [backoff.after(0.1, ready=False) for _ in range(10)]
    assert delays == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert backoff.after(60, ready=False) == 30.0


def test_backoff_stays_short_for_a_role_that_was_ready_and_is_forgotten_after_a_good_run() -> None:
    backoff = Backoff()
    assert [backoff.after(0.1, ready=True) for _ in range(4)] == [0.0, 0.25, 0.25, 0.25]
    assert backoff.after(supervise.GOOD_RUN, ready=True) == 0.0
    for _ in range(6):
        backoff.after(0.1, ready=False)
    assert backoff.after(0.1, ready=True) == 0.25


async def test_an_adopted_role_with_other_options_is_named_in_the_log(
    tmp_path: Path, living: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    wanted = job(tmp_path, "--pool-fd", "9")
    async with supervised(wanted) as supervisor:
        await until(lambda: supervisor.state == "ready")
    assert "was started with" not in caplog.text
    argv = [sys.executable, STANDIN, str(tmp_path), "engine", "--threads", "1"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as other:
        await until(lambda: roles.holder(tmp_path, "engine") == other.pid)
        async with supervised(job(tmp_path, "--threads", "2")) as supervisor:
            await until(lambda: supervisor.state == "ready")
    assert "it was started with --threads 1" in caplog.text
