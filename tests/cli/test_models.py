"""Commands over models, with no daemon: everything is in files."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vai.rom import segment
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]


def test_a_file_is_loaded_listed_and_removed(vai: Vai, checkpoint: Path) -> None:
    assert "No models yet" in vai("ls").stdout
    loaded = vai("load", checkpoint)
    assert (loaded.returncode, loaded.stdout) == (0, "")
    assert "tiny is in memory" in loaded.stderr

    (row,) = json.loads(vai("ls", "--json").stdout)
    assert (row["name"], row["resident"], row["architecture"]) == ("tiny", True, "llama")
    assert row["source"] == str(checkpoint)
    lines = vai("ls").stdout.splitlines()
    assert lines[0].split() == ["NAME", "IMAGE", "SIZE", "RESIDENT", "ARCHITECTURE", "BURNED"]
    assert lines[1].split()[:2] == ["tiny", row["digest"][:12]]

    removed = vai("rm", "tiny")
    assert removed.returncode == 0, removed.stderr
    assert json.loads(vai("ls", "--json").stdout) == []


def test_a_second_name_shares_the_image_and_survives_the_first(
    vai: Vai, registry: Registry, loaded: str, checkpoint: Path
) -> None:
    vai("load", checkpoint, "--name", "b")
    assert registry.get("b").digest == loaded
    assert "also called b" in vai("rm", "m").stdout
    assert [name.name for name in registry.names()] == ["b"]
    assert registry.is_resident(loaded)


def test_a_name_whose_image_is_gone_is_burned_again_by_name(vai: Vai, registry: Registry, loaded: str) -> None:
    segment.remove(registry.root, loaded)
    (row,) = json.loads(vai("ls", "--json").stdout)
    assert (row["name"], row["resident"]) == ("m", False)
    assert vai("load", "--name", "m").returncode == 0
    assert registry.is_resident(loaded)


def test_loading_again_keeps_what_the_user_chose_for_a_name(
    vai: Vai, registry: Registry, loaded: str, checkpoint: Path
) -> None:
    registry.put(Name("m", "/gone.gguf", digest=loaded, overrides={"system": "Be brief."}))
    refused = vai("load", "--name", "m")
    assert refused.returncode == 2
    assert "/gone.gguf" in refused.stderr
    assert vai("load", checkpoint, "--name", "m").returncode == 0
    assert registry.get("m") == Name("m", str(checkpoint), digest=loaded, overrides={"system": "Be brief."})


def test_a_load_that_fails_leaves_no_name(vai: Vai, registry: Registry, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    failed = vai("load", broken)
    assert failed.returncode == 9
    assert failed.stderr.startswith("vai: ")
    assert failed.stderr.count("\n") == 1
    assert registry.names() == []


def test_a_name_that_cannot_be_is_refused_before_anything_is_burned(
    vai: Vai, registry: Registry, checkpoint: Path
) -> None:
    refused = vai("load", checkpoint, "--name", "../escape")
    assert refused.returncode == 2
    assert "cannot be a model's name" in refused.stderr
    assert not registry.root.exists()


def test_an_interrupted_load_leaves_nothing(registry: Registry, checkpoint: Path, environment: dict[str, str]) -> None:
    segment.prepare(registry.root)
    with open(registry.root / "run/room.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the burner has to wait for it
        argv = [sys.executable, "-m", "vai", "load", str(checkpoint), "--name", "m"]
        with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
            while not registry.names():
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
            _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert registry.names() == []
    assert registry.resident() == []


@pytest.mark.parametrize(("typed", "told"), [("pull", "vai load"), ("list", "vai ls"), ("version", "vai --version")])
def test_words_of_other_programs_are_answered_with_ours(vai: Vai, typed: str, told: str) -> None:
    refused = vai(typed, "qwen")
    assert refused.returncode == 2
    assert told in refused.stderr


def test_verify_finds_a_flipped_bit_and_names_its_tensor(vai: Vai, registry: Registry, loaded: str) -> None:
    intact = vai("verify", "m")
    assert intact.returncode == 0
    assert intact.stdout.startswith(f"{loaded[:12]}  intact")
    with segment.attach(registry.root, loaded) as image:
        stored, _, _ = image.tensor("blk.0.ffn_down.weight")
        offset, path = image.header.data_offset + stored.offset, image.path
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    found = vai("verify")
    assert found.returncode == 11
    assert "blk.0.ffn_down.weight" in found.stderr


def test_an_image_in_use_is_not_removed_unless_forced(vai: Vai, registry: Registry, loaded: str) -> None:
    with segment.attach(registry.root, loaded):
        refused = vai("rm", "m")
        assert refused.returncode == 5
        assert f"(pid {os.getpid()})" in refused.stderr
        assert registry.get("m").digest == loaded  # the name is as it was
        assert vai("rm", "m", "--force").returncode == 0
    assert registry.names() == []
    assert not registry.is_resident(loaded)


def test_an_image_without_a_name_is_removed_by_its_digest(vai: Vai, registry: Registry, loaded: str) -> None:
    registry.forget("m")
    assert vai("rm", loaded[:8]).returncode == 0
    assert not registry.is_resident(loaded)


def test_show_tells_what_a_model_is_made_of(vai: Vai, loaded: str) -> None:
    found = json.loads(vai("show", "m", "--json").stdout)
    assert (found["names"], found["digest"]) == (["m"], loaded)
    assert found["spec"]["architecture"] == "llama"
    assert found["tensors"]["Q4_0"]["count"] > 0 and not found["tensors"]["Q4_0"]["slow"]
    assert found["provenance"]["format"] == "gguf"
    text = vai("show", loaded[:8]).stdout
    for word in ("architecture", "Q4_0", "tokenizer", "CHAT TEMPLATE"):
        assert word in text


def test_status_needs_no_process(vai: Vai, registry: Registry, loaded: str) -> None:
    with segment.attach(registry.root, loaded):
        found = json.loads(vai("status", "--json").stdout)
        text = vai("status").stdout
    (image,) = found["images"]
    assert (image["names"], image["resident"], image["problem"]) == (["m"], 1.0, None)
    assert [lease["pid"] for lease in image["leases"]] == [os.getpid()]
    assert {told["state"] for told in found["processes"].values()} == {"stopped"}
    assert found["room"]["free"] > 0
    assert f"({os.getpid()})" in text
    assert "Room for more" in text


def test_status_and_ls_show_a_damaged_image_and_go_on(vai: Vai, registry: Registry, loaded: str) -> None:
    path = segment.image_path(registry.root, loaded)
    path.chmod(0o600)
    os.truncate(path, 4096)
    (image,) = json.loads(vai("status", "--json").stdout)["images"]
    assert image["problem"]
    assert vai("status").returncode == 0
    assert "damaged" in vai("ls").stdout


def test_an_unknown_model_is_an_error_that_lists_the_known(vai: Vai, loaded: str) -> None:
    for command in ("show", "verify", "rm", "run"):
        refused = vai(command, "unknown")
        assert refused.returncode == 4, command
        assert refused.stderr == "vai: There is no model 'unknown'. Known: m.\n"


def test_a_draft_is_named_with_a_load_and_must_have_the_same_tokenizer(
    vai: Vai, registry: Registry, loaded: str, checkpoint: Path, tmp_path: Path
) -> None:
    assert vai("load", checkpoint, "--name", "large", "--draft", "m").returncode == 0
    assert registry.get("large").overrides == {"draft": "m"}
    assert vai("load", checkpoint, "--name", "large").returncode == 0
    assert registry.get("large").overrides == {"draft": "m"}

    stranger = tmp_path / "stranger.gguf"
    assert vai("synth", "tiny-qwen2", "Q4_0", stranger).returncode == 0
    refused = vai("load", stranger, "--draft", "m")
    assert refused.returncode == 2
    assert "tokenizers differ" in refused.stderr
    assert registry.get("stranger").overrides == {}
