"""The daemon's wire, with hostile and broken peers."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from pathlib import Path

import pytest

from vai.daemon import client, protocol
from vai.errors import BadRequest, InUse, ModelNotFound, Unavailable, VaiError


def answer_once(path: Path, answer: bytes) -> threading.Thread:
    """A peer that reads something and answers these bytes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_question_brings_its_answer(tmp_path: Path) -> None:
    thread = answer_once(tmp_path / "s", protocol.encode({"ok": True, "text": "ümläut"}))
    assert client.call(tmp_path / "s", "ping") == {"ok": True, "text": "ümläut"}
    thread.join()


def test_an_error_arrives_as_the_class_it_left_as(tmp_path: Path) -> None:
    thread = answer_once(tmp_path / "s", protocol.encode(protocol.failure(InUse("held by 7"))))
    with pytest.raises(InUse, match="held by 7"):
        client.call(tmp_path / "s", "ping")
    thread.join()


def test_an_error_of_an_unknown_code_is_still_an_error() -> None:
    with pytest.raises(VaiError, match="new"):
        protocol.unwrap({"error": {"code": "from_the_future", "message": "new"}})
    with pytest.raises(VaiError, match="cannot be read"):
        protocol.unwrap({"error": "text"})
    with pytest.raises(ModelNotFound):
        protocol.unwrap(protocol.failure(ModelNotFound("no")))


@pytest.mark.parametrize("answer", [b"", b"\x01", b"\x08\0\0\0{}"], ids=["nothing", "half a length", "half a body"])
def test_a_daemon_that_dies_in_its_answer_is_unavailable(tmp_path: Path, answer: bytes) -> None:
    thread = answer_once(tmp_path / "s", answer)
    with pytest.raises(Unavailable, match="vai serve"):
        client.call(tmp_path / "s", "ping")
    thread.join()


def test_no_daemon_is_unavailable_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="vai serve"):
        client.call(tmp_path / "absent", "ping")


def test_a_daemon_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(Unavailable, match="did not answer"):
            client.call(tmp_path / "s", "ping", timeout=0.05)


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<I", protocol.MAX_MESSAGE + 1),
        struct.pack("<I", 3) + b"[1]",
        struct.pack("<I", 3) + b"{{{",
        struct.pack("<I", 2) + b"\xff\xfe",
        struct.pack("<I", 200_000) + b"[" * 200_000,
    ],
    ids=["announced too large", "not an object", "not JSON", "not UTF-8", "nested too deep"],
)
async def test_what_is_no_message_is_refused(message: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(message)
    with pytest.raises(BadRequest):
        await protocol.read(reader)


def test_a_message_too_large_to_be_read_is_not_sent() -> None:
    with pytest.raises(BadRequest, match="too large"):
        protocol.encode({"text": "x" * protocol.MAX_MESSAGE})


async def test_the_end_of_a_connection_is_no_error() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", 20) + b"{")
    reader.feed_eof()
    assert await protocol.read(reader) is None
