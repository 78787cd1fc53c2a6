"""`vai doctor`: what it measures is there for programs, and each check finds what it is for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from vai import config
from vai.cli import checks
from vai.cli import vai as command_line
from vai.daemon.roles import RoleLock
from vai.kernels import ceilings, table
from vai.rom import segment

Vai = Callable[..., subprocess.CompletedProcess[str]]


def test_it_tells_the_machine_its_ceilings_its_kernels_and_its_checks(vai: Vai) -> None:
    done = vai("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["isas"] == table.isas()
    assert found["refused"] == {}
    assert found["isa"] in (table.isa(), table.TILES)
    assert found["implementations"] == table.implementations(found["isa"])
    assert found["ahead"] > 0
    assert (found["fasts"], found["refused_fasts"]) == (table.fasts(), {})
    assert {fast["type"] for fast in found["fast_linear"]} == set(table.fast_kind_types() if table.fast(None) else ())
    assert found["machine"]["logical_cores"] == len(os.sched_getaffinity(0))
    assert [ceiling["threads"] for ceiling in found["ceilings"]] == [1, found["machine"]["threads"]]
    for ceiling in found["ceilings"]:
        assert all(0 < ceiling[name]["low"] <= ceiling[name]["median"] for name in ("read", "int8", "f32"))
    assert {linear["type"] for linear in found["linear"]} == set(table.fast_types())
    assert set(found["slow"]) == set(table.block_types()) - set(table.fast_types())
    assert all(linear[share] > 0 for linear in found["linear"] for share in ("read_share", "multiply_share"))
    assert found["buffer_bytes"] > max(found["machine"]["caches"].values(), default=0)
    assert {check["name"] for check in found["checks"]} >= {"filesystem", "rights", "huge pages", "processes"}


def test_people_get_tables_of_a_forced_instruction_set(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor = importlib.import_module("vai.cli.doctor")
    monkeypatch.setattr(doctor, "LEAST_BUFFER", 16 << 20)  # figures do not matter, and here they take long
    monkeypatch.setattr(doctor, "caches", dict)
    monkeypatch.setattr(ceilings, "_BUDGET", 0.0)
    done = CliRunner().invoke(command_line, ["doctor"], env={**environment, "VAI_ISA": "scalar", "VAI_THREADS": "1"})
    assert done.exit_code == 0, done.output
    assert "used: scalar" in done.stdout
    assert "GB/s (" in done.stdout
    assert "not measured" in done.stdout and "IQ2_XXS" in done.stdout
    for title in ("MACHINE", "CEILINGS", "LINEAR (1 threads)", "CHECK"):
        assert title in done.stdout


def test_images_on_a_disk_or_in_a_small_filesystem_are_pointed_out(tmp_path: Path) -> None:
    where, large = checks.shared_memory(tmp_path / "not/yet", machine=1 << 20)
    assert where.good == (where.found.split(" is on ")[1].split(",")[0] in ("tmpfs", "ramfs"))
    assert "VAI asks the machine" in large.remedy
    _, small = checks.shared_memory(tmp_path, machine=1 << 60)
    assert not small.good
    assert "--shm-size" in small.remedy
    where, _ = checks.shared_memory(Path("/proc"))
    assert (where.good, "VAI_ROOT" in where.remedy) == (False, True)


@pytest.mark.parametrize(("which", "mode"), [("", 0o750), ("images", 0o701), ("images/x.rom", 0o444)])
def test_what_is_open_to_other_users_is_named(tmp_path: Path, which: str, mode: int) -> None:
    root = tmp_path / "root"
    assert checks.rights(root).good
    segment.prepare(root)
    (root / "images/x.rom").touch(0o400)
    assert checks.rights(root).good
    (root / which).chmod(mode)
    found = checks.rights(root)
    assert not found.good
    assert f"{root / which} is open to others (mode {mode:04o})" in found.found


def test_logind_that_would_delete_the_images_is_pointed_out(tmp_path: Path) -> None:
    assert checks.remove_ipc(tmp_path, 1000).good  # there is none
    (tmp_path / "run/systemd/users").mkdir(parents=True)
    assert checks.remove_ipc(tmp_path, 999).good
    assert not checks.remove_ipc(tmp_path, 1000).good
    (tmp_path / "etc/systemd/logind.conf.d").mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("[Login]\n#RemoveIPC=yes\nRemoveIPC=no\n")
    assert checks.remove_ipc(tmp_path, 1000).good
    (tmp_path / "etc/systemd/logind.conf.d/10-ipc.conf").write_text("[Login]\nRemoveIPC=yes\n")
    assert "enable-linger" in checks.remove_ipc(tmp_path, 1000).remedy


def test_a_user_who_lingers_keeps_the_images(tmp_path: Path) -> None:
    import pwd

    (tmp_path / "run/systemd/users").mkdir(parents=True)
    user = next(entry for entry in pwd.getpwall() if entry.pw_uid >= checks.SYSTEM_USERS)
    assert not checks.remove_ipc(tmp_path, user.pw_uid).good
    (tmp_path / "var/lib/systemd/linger").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/linger" / user.pw_name).touch()
    assert checks.remove_ipc(tmp_path, user.pw_uid).good


def test_more_threads_than_cores_are_pointed_out() -> None:
    cores = len(os.sched_getaffinity(0))
    assert checks.threads(cores).good
    assert "VAI_THREADS" in checks.threads(cores + 1).remedy


def test_the_roles_that_live_are_named_and_those_that_do_not(tmp_path: Path) -> None:
    segment.prepare(tmp_path / "root")
    (nothing,) = checks.processes(tmp_path / "root")
    assert nothing.good
    with RoleLock(tmp_path / "root", "server"):
        (found,) = checks.processes(tmp_path / "root")
    assert not found.good
    assert f"server (process {os.getpid()})" in found.found
    assert "Not: daemon, engine." in found.found


def test_every_check_speaks_in_sentences(tmp_path: Path) -> None:
    settings = dataclasses.replace(config.load({"HOME": str(tmp_path)}), root=tmp_path / "root")
    for check in checks.checks(settings):
        assert check.found.endswith(".")
        assert check.good or check.remedy.endswith(".")
