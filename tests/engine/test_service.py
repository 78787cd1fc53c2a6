"""The engine as a process behind its socket: the connection is the lease, and nothing a client does reaches another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from vai.daemon import pool as memory
from vai.daemon.pool import SLAB
from vai.engine.client import EngineClient
from vai.engine.engine import Engine
from vai.engine.port import MAX_MESSAGE, Abort, AskStatus, Hello, Submit, ToEngine, frame
from vai.errors import BadRequest, ContextTooLong, ModelNotFound, Unavailable
from vai.request import Output, Request, SamplingParams
from vai.rom import segment

Root = tuple[Path, Path, dict[str, str]]
Start = Callable[..., Any]  # gives an EngineProcess of conftest.py

SAMPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=30, logprobs=2)
ENDLESS = SamplingParams(temperature=0)
DEADLINE = 60.0


def request(identity: str, image: str, prompt: list[int], sampling: SamplingParams = SAMPLED) -> Request:
    return Request(id=identity, image=image, tokens=prompt, sampling=sampling)


async def collect(client: EngineClient, one: Request) -> list[Output]:
    return [output async for output in client.generate(one)]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(path)
    try:
        yield client
    finally:
        await client.close()


async def test_streams_of_two_models_through_one_socket_are_what_the_engine_itself_gives(
    tiny_root: Root, start_engine: Start, make_engine: Callable[..., Engine]
) -> None:
    root, _, digests = tiny_root
    requests = [request(f"{name}-{n}", digests[name], list(range(n, n + 40))) for n in range(3) for name in digests]
    process = start_engine(root)
    async with connected(process.socket) as client:
        streams = await asyncio.gather(*(collect(client, each) for each in requests))
        status = await client.status()
        times = await client.switches()
    assert (status.pid, status.pool_bytes, status.pool_used) == (process.process.pid, 4 * SLAB, 0)
    assert {(model.image, model.tokens) for model in status.models} == {(digest, 90) for digest in digests.values()}
    assert len(times.same) + len(times.switched) == status.steps
    engine, expected = make_engine(root, slabs=2), {each.id: [] for each in requests}
    for each in requests:
        engine.submit(each)
    while engine.has_work():
        for output in engine.step():
            expected[output.id].append(replace(output, timing=None))
    assert [[replace(output, timing=None) for output in stream] for stream in streams] == list(expected.values())


async def test_refusals_arrive_as_the_errors_they_are(tiny_root: Root, start_engine: Start) -> None:
    root, _, digests = tiny_root
    async with connected(start_engine(root).socket) as client:
        with pytest.raises(ModelNotFound):
            await collect(client, request("a", "0" * 64, [1]))
        with pytest.raises(ContextTooLong, match=r"5000.*4096"):
            await collect(client, request("b", digests["tiny"], [1] * 5000))
        with pytest.raises(BadRequest, match="does not exist"):
            await collect(client, request("c", digests["tiny"], [100_000]))
        assert len(await collect(client, request("d", digests["tiny"], [1]))) == 30


async def test_an_image_burned_after_the_start_is_attached_by_its_first_request(
    tiny_root: Root, start_engine: Start, tmp_path: Path
) -> None:
    root, _, digests = tiny_root
    late = tmp_path / "late"
    process = start_engine(late)
    async with connected(process.socket) as client:
        with pytest.raises(ModelNotFound):
            await collect(client, request("a", digests["tiny"], [1]))
        path = segment.image_path(late, digests["tiny"])
        path.write_bytes(segment.image_path(root, digests["tiny"]).read_bytes())
        path.chmod(0o400)
        assert len(await collect(client, request("b", digests["tiny"], [1]))) == 30
        assert [holder.pid for holder in segment.holders(path)] == [process.process.pid]
        await client.release(digests["tiny"])
        assert segment.holders(path) == []


async def test_a_stream_closed_early_gives_its_pages_back_and_disturbs_nobody(
    tiny_root: Root, start_engine: Start
) -> None:
    root, _, digests = tiny_root
    async with connected(start_engine(root).socket) as client:
        alone = await collect(client, request("alone", digests["tiny"], [7] * 50))
        other = asyncio.create_task(collect(client, request("other", digests["tiny"], [7] * 50)))
        stream = client.generate(request("closed", digests["tiny-qwen2"], [1], ENDLESS))
        async for _ in stream:
            break
        await stream.aclose()
        assert [output.tokens for output in await other] == [output.tokens for output in alone]

        async def all_back() -> bool:
            status = await client.status()
            return status.pool_used == 0 and all(model.running == 0 for model in status.models)

        await until(all_back)


async def test_a_lost_connection_takes_its_requests_with_it_and_every_page_comes_back(
    tiny_root: Root, start_engine: Start
) -> None:
    root, _, digests = tiny_root
    process = start_engine(root)
    draw = random.Random(3)
    async with connected(process.socket) as client:
        for round_ in range(40):
            reader, writer = await asyncio.open_unix_connection(process.socket)
            writer.write(frame(Hello()))
            for number in range(3):
                prompt = [draw.randrange(500)] * draw.choice([1, 40, 300])
                digest = digests[draw.choice(["tiny", "tiny-qwen2"])]
                writer.write(frame(Submit(request(str(number), digest, prompt, ENDLESS))))
            if round_ % 3:
                await reader.readexactly(draw.randrange(1, 400))  # some of it, mid-message
            writer.transport.abort()

        async def all_back() -> bool:
            return (await client.status()).pool_used == 0

        await until(all_back)
        steps = (await client.status()).steps
        assert (await client.status()).steps == steps  # it sleeps
        assert len(await collect(client, request("after", digests["tiny"], [1]))) == 30


def raw(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def submit(**changes: object) -> bytes:
    fields = {"id": "a", "image": "0" * 64, "tokens": [1], **changes}
    return raw(msgspec.msgpack.encode({"type": "submit", "request": fields}))


HOSTILE = {
    "no hello": frame(Abort("a")),
    "another protocol": frame(Hello(protocol=99)),
    "two hellos": frame(Hello()) + frame(Hello()),
    "an endless message": frame(Hello()) + struct.pack("<I", MAX_MESSAGE + 1),
    "no msgpack": frame(Hello()) + raw(b"\xc1\xc1\xc1"),
    "an empty message": frame(Hello()) + raw(b""),
    "nesting": frame(Hello()) + raw(b"\x91" * 100_000),
    "a lying array length": frame(Hello()) + raw(b"\xdd\xff\xff\xff\xff"),
    "an unknown message": frame(Hello()) + raw(msgspec.msgpack.encode({"type": "shutdown"})),
    "no tokens": frame(Hello()) + submit(tokens=[]),
    "negative tokens": frame(Hello()) + submit(tokens=[-1]),
    "huge tokens": frame(Hello()) + submit(tokens=[1 << 62]),
    "a path for a digest": frame(Hello()) + submit(image="../" * 20 + "etc"),
    "a temperature that is no number": frame(Hello()) + submit(sampling={"temperature": float("nan")}),
    "a fraction out of bounds": frame(Hello()) + submit(sampling={"top_p": 0}),
    "too many stop ids": frame(Hello()) + submit(sampling={"stop_ids": list(range(1000))}),
    "an unknown field": frame(Hello()) + submit(sampling={"best_of": 5}),
    "an endless id": frame(Hello()) + submit(id="a" * 1000),
    "one id twice": frame(Hello()) + submit(tokens=[1] * 5) + submit(),
}


async def test_a_malformed_message_ends_its_own_connection_with_a_reason_and_nothing_else(
    tiny_root: Root, start_engine: Start
) -> None:
    root, _, digests = tiny_root
    process = start_engine(root)
    async with connected(process.socket) as client:
        stream = client.generate(request("stays", digests["tiny"], [1], ENDLESS))
        await anext(stream)
        for name, attack in HOSTILE.items():
            reader, writer = await asyncio.open_unix_connection(process.socket)
            writer.write(attack)
            answer = await asyncio.wait_for(reader.read(), DEADLINE)  # to the end: the connection is closed
            assert b"failed" in answer, name
            writer.close()
            await anext(stream)
        await stream.aclose()
        assert process.process.poll() is None


def test_a_client_that_stalls_in_the_middle_of_a_message_disturbs_nobody(tiny_root: Root, start_engine: Start) -> None:
    process = start_engine(tiny_root[0])
    with socket.socket(socket.AF_UNIX) as stalled:
        stalled.connect(str(process.socket))
        stalled.sendall(frame(Hello())[:3])
        assert asyncio.run(answer_length(process.socket, tiny_root[2]["tiny"])) == 30


def test_a_client_that_only_asks_and_never_reads_loses_its_connection(tiny_root: Root, start_engine: Start) -> None:
    process = start_engine(tiny_root[0])
    question = frame(AskStatus()) * 1000
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.settimeout(DEADLINE)
        deaf.connect(str(process.socket))
        deaf.sendall(frame(Hello()))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                deaf.sendall(question)
    assert asyncio.run(answer_length(process.socket, tiny_root[2]["tiny"])) == 30


def test_a_connection_that_is_refused_ends_though_its_client_reads_nothing(
    tiny_root: Root, start_engine: Start
) -> None:
    process = start_engine(tiny_root[0])
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.settimeout(DEADLINE)
        deaf.connect(str(process.socket))
        deaf.sendall(frame(Hello()) + frame(AskStatus()) * 900)  # the answers are more than a socket holds
        assert asyncio.run(answer_length(process.socket, tiny_root[2]["tiny"])) == 30  # they are on their way
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                deaf.sendall(frame(Hello()) * 1000)


async def answer_length(path: Path, digest: str) -> int:
    async with connected(path) as client:
        return len(await collect(client, request("a", digest, [1])))


async def test_a_killed_engine_ends_streams_with_unavailable_and_the_client_finds_the_next_one(
    tiny_root: Root, start_engine: Start
) -> None:
    root, _, digests = tiny_root
    process = start_engine(root)
    async with connected(process.socket) as client:
        stream = client.generate(request("a", digests["tiny"], [1], ENDLESS))
        await anext(stream)
        process.process.kill()
        with pytest.raises(Unavailable, match="went away"):
            async for _ in stream:
                pass
        process.process.wait()
        with pytest.raises(Unavailable, match="vai serve"):
            await client.status()
        start_engine(root)
        assert len(await collect(client, request("a", digests["tiny"], [1]))) == 30


async def test_sigterm_ends_streams_with_a_reason_and_the_process_with_0(tiny_root: Root, start_engine: Start) -> None:
    root, _, digests = tiny_root
    process = start_engine(root)
    async with connected(process.socket) as client:
        streams = [client.generate(request(str(n), digests["tiny"], [n], ENDLESS)) for n in range(3)]
        for stream in streams:
            await anext(stream)
        process.process.send_signal(signal.SIGTERM)
        for stream in streams:
            with pytest.raises(Unavailable, match="asked to stop"):
                async for _ in stream:
                    pass
    assert process.process.wait(DEADLINE) == 0, process.log.read_text()
    assert not process.socket.exists()
    assert all(segment.holders(segment.image_path(root, digest)) == [] for digest in digests.values())


def test_a_second_engine_of_one_root_refuses_and_names_the_holder(tiny_root: Root, start_engine: Start) -> None:
    first = start_engine(tiny_root[0])
    second = start_engine(tiny_root[0], wait=False)
    assert second.process.wait(DEADLINE) == 3
    assert str(first.process.pid) in second.log.read_text()
    assert asyncio.run(answer_length(first.socket, tiny_root[2]["tiny"])) == 30


def test_the_socket_is_for_this_user_alone(tiny_root: Root, start_engine: Start) -> None:
    assert stat.S_IMODE(start_engine(tiny_root[0]).socket.stat().st_mode) == 0o600


async def test_the_pool_outlives_the_engine_that_used_it(tiny_root: Root, start_engine: Start) -> None:
    root, _, digests = tiny_root
    descriptor = memory.create(2 * SLAB)
    try:
        for _ in range(2):
            process = start_engine(
                root, "--kv-bytes", str(2 * SLAB), "--pool-fd", str(descriptor), pass_fds=(descriptor,)
            )
            async with connected(process.socket) as client:
                assert (await client.status()).pool_bytes == 2 * SLAB
                assert len(await collect(client, request("a", digests["tiny"], [1]))) == 30
            reopened = memory.reopen(process.process.pid)
            assert reopened is not None
            assert os.fstat(reopened).st_ino == os.fstat(descriptor).st_ino
            os.close(reopened)
            process.process.kill()
            process.process.wait()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("more", [["--pool-fd", "999"], ["--kv-bytes", "1", "--lock", "/elsewhere"]])
def test_arguments_that_cannot_be_are_refused_in_a_sentence(
    tiny_root: Root, start_engine: Start, more: list[str]
) -> None:
    process = start_engine(tiny_root[0], *more, wait=False)
    assert process.process.wait(DEADLINE) == 2
    assert process.log.read_text().endswith(".\n")


def test_a_damaged_image_is_refused_by_name_and_the_others_are_served(
    tiny_root: Root, start_engine: Start, tmp_path: Path
) -> None:
    root, _, digests = tiny_root
    damaged = tmp_path / "damaged"
    segment.prepare(damaged)
    for name, digest in digests.items():
        image = bytearray(segment.image_path(root, digest).read_bytes())
        if name == "tiny":
            image[8192] ^= 1
        segment.image_path(damaged, digest).write_bytes(image)
    process = start_engine(damaged)
    assert asyncio.run(answer_length(process.socket, digests["tiny-qwen2"])) == 30


def test_messages_survive_the_wire() -> None:
    message = Submit(request("a", "0" * 64, [1, 2], SAMPLED))
    (length,) = struct.unpack("<I", frame(message)[:4])
    assert msgspec.msgpack.decode(frame(message)[4:], type=ToEngine) == message and length == len(frame(message)) - 4
