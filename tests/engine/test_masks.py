"""Masks: a constrained answer draws under them and under nothing else, whenever they come, and no other can tell."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from vai.engine import masks
from vai.engine.client import EngineClient
from vai.engine.engine import Engine
from vai.engine.service import EngineThread
from vai.request import Output, Request, SamplingParams, TokenLogprob

Root = tuple[Path, Path, dict[str, str]]
Make = Callable[..., Engine]
Start = Callable[..., Any]  # gives an EngineProcess of conftest.py
Answers = dict[str, tuple[list[int], list[TokenLogprob]]]

VOCABULARY = 523
SAMPLED = SamplingParams(temperature=1.2, seed=5, max_tokens=40, logprobs=3)
GREEDY = SamplingParams(temperature=0, seed=1, max_tokens=30, logprobs=1)
PENALIZED = replace(SAMPLED, repetition_penalty=1.3, logit_bias={7: 5.0}, top_k=20, top_p=0.9)


def mask(position: int, vocabulary: int) -> bytes:
    """A mask of its position alone: sometimes a few tokens, sometimes most."""
    rng = np.random.default_rng(position)
    allowed = rng.random(vocabulary) < (0.02, 0.5, 0.98)[position % 3]
    allowed[position % vocabulary] = True
    return np.packbits(allowed, bitorder="little").tobytes()


def allowed(token: int, position: int, vocabulary: int) -> bool:
    return bool(mask(position, vocabulary)[token // 8] >> token % 8 & 1)


def held(identity: str, image: str, prompt: list[int], sampling: SamplingParams = SAMPLED) -> Request:
    return Request(id=identity, image=image, tokens=prompt, sampling=sampling, constrained=True)


def run(
    engine: Engine, requests: list[Request], *, late: Callable[[int], int] = lambda _: 0, steps: int = 5000
) -> dict[str, list[Output]]:
    """Step to the end of all answers. `late`: steps between the moment a mask is known and the one it is sent, by its
    position; 0 is before the next step.
    """
    outputs: dict[str, list[Output]] = {}
    vocabularies = {each.id: vocabulary_of(engine, each.image) for each in requests}
    due: list[tuple[int, str, int]] = []
    running = {each.id: len(each.tokens) for each in requests if each.constrained}
    for each in requests:
        engine.submit(each)
    due += [(late(position), identity, position) for identity, position in running.items()]
    for now in range(steps):
        for when, identity, position in [entry for entry in due if entry[0] <= now]:
            due.remove((when, identity, position))
            engine.mask(identity, position, mask(position, vocabularies[identity]))
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
            if output.finish is not None:
                running.pop(output.id, None)
            elif output.id in running:
                running[output.id] += len(output.tokens)
                due.append((now + 1 + late(running[output.id]), output.id, running[output.id]))
        if all(each.id in outputs and outputs[each.id][-1].finish is not None for each in requests):
            return outputs
    raise AssertionError("the answers do not come to an end")


def vocabulary_of(engine: Engine, image: str) -> int:
    return engine._bank.select(image).program.vocabulary


def answers(outputs: dict[str, list[Output]]) -> Answers:
    return {
        identity: ([token for each in own for token in each.tokens], [one for each in own for one in each.logprobs])
        for identity, own in outputs.items()
    }


@pytest.fixture
def requests(tiny_root: Root) -> list[Request]:
    """Constrained and free answers of two models."""
    llama, qwen2 = tiny_root[2]["tiny"], tiny_root[2]["tiny-qwen2"]
    return [
        held("sampled", llama, [3, 4, 5]),
        held("greedy", llama, list(range(70)), GREEDY),
        held("penalized", qwen2, list(range(9, 50)), PENALIZED),
        Request(id="free", image=llama, tokens=list(range(40)), sampling=SAMPLED),
        Request(id="other", image=qwen2, tokens=list(range(33)), sampling=replace(GREEDY, max_tokens=60)),
    ]


def test_no_token_leaks_through_its_mask(tiny_root: Root, make_engine: Make, requests: list[Request]) -> None:
    engine = make_engine(tiny_root[0])
    found = answers(run(engine, requests))
    for each in requests[:3]:
        tokens, _ = found[each.id]
        assert len(tokens) == each.sampling.max_tokens
        size = vocabulary_of(engine, each.image)
        assert all(allowed(token, place, size) for place, token in enumerate(tokens, len(each.tokens)))
    assert any(not allowed(token, place, VOCABULARY) for place, token in enumerate(found["free"][0], 40))


@pytest.mark.parametrize(
    "late",
    [lambda _: 1, lambda _: 3, lambda place: place % 4, lambda place: 7 if place % 10 == 0 else 0],
    ids=["a step", "three steps", "now and then", "seldom"],
)
def test_masks_that_come_late_change_no_bit(
    tiny_root: Root, make_engine: Make, requests: list[Request], late: Callable[[int], int]
) -> None:
    assert answers(run(make_engine(tiny_root[0]), requests, late=late)) == answers(
        run(make_engine(tiny_root[0]), requests)
    )


def test_neighbours_of_constrained_answers_keep_their_bits_and_do_not_wait(
    tiny_root: Root, make_engine: Make, requests: list[Request]
) -> None:
    free = [each for each in requests if not each.constrained]
    expected = answers(run(make_engine(tiny_root[0]), free))
    found = answers(run(make_engine(tiny_root[0]), requests, late=lambda place: place % 5))
    assert {each.id: found[each.id] for each in free} == expected
    engine = make_engine(tiny_root[0])  # and where no mask ever comes
    for each in requests:
        engine.submit(each)
    silent: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            silent.setdefault(output.id, []).append(output)
    assert answers(silent) == expected


def test_a_row_that_waits_is_not_computed_again(tiny_root: Root, make_engine: Make) -> None:
    request = held("r", tiny_root[2]["tiny"], [3, 4, 5], replace(SAMPLED, max_tokens=20))
    prompt, late = make_engine(tiny_root[0]), make_engine(tiny_root[0])
    run(prompt, [request])
    run(late, [request], late=lambda _: 2)
    assert late.status().steps == prompt.status().steps == 20


def test_a_row_that_loses_its_pages_while_it_waits_continues_with_the_same_bits(
    wide_root: tuple[Path, str], make_engine: Make
) -> None:
    root, digest = wide_root
    requests = [
        Request(id="old", image=digest, tokens=list(range(100)), sampling=replace(GREEDY, max_tokens=200)),
        held("middle", digest, list(range(50, 150)), replace(SAMPLED, max_tokens=120)),
        held("young", digest, list(range(200, 300)), replace(SAMPLED, max_tokens=120)),
    ]
    expected = {each.id: answers(run(make_engine(root), [each]))[each.id] for each in requests}
    engine = make_engine(root)  # 512 tokens of room for 740
    assert answers(run(engine, requests, late=lambda place: place % 3)) == expected
    assert engine.status().models[0].preemptions > 0
    assert engine.status().pool_used == 0


def test_who_never_sends_a_mask_is_ended_in_time_and_gives_its_pages_back(tiny_root: Root, make_engine: Make) -> None:
    engine, image = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    engine.submit(held("silent", image, [1, 2, 3]))
    engine.submit(held("falls silent", image, [4, 5, 6]))
    engine.mask("falls silent", 3, mask(3, vocabulary_of(engine, image)))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [output.finish for output in outputs] == [None]
    assert engine.status().pool_used > 0
    engine._held._patience = 0.05  # now that the first token is there: on a busy machine that may take longer
    while (patience := engine.patience()) is not None:
        assert patience <= 0.05
        time.sleep(patience)
        outputs += engine.step()
    for ended in outputs[1:]:
        assert ended.finish == "error" and ended.error is not None and ended.error[0] == "interrupted"
    assert {output.id for output in outputs[1:]} == {"silent", "falls silent"}
    assert not engine.has_work() and engine.status().pool_used == 0


def test_rows_that_wait_long_give_their_pages_to_others_and_continue_with_the_same_bits(
    wide_root: tuple[Path, str], make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, digest = wide_root
    waiting = held("waiting", digest, list(range(300)), replace(SAMPLED, max_tokens=10))
    large = Request(id="large", image=digest, tokens=list(range(400)), sampling=replace(GREEDY, max_tokens=20))
    expected = answers(run(make_engine(root), [waiting])) | answers(run(make_engine(root), [large]))
    monkeypatch.setattr(masks, "GRACE", 0.02)
    engine = make_engine(root)  # 512 tokens of room for 740
    size = vocabulary_of(engine, digest)
    engine.submit(waiting)
    engine.mask("waiting", 300, mask(300, size))
    outputs = []
    while not outputs:
        outputs += engine.step()
    engine.submit(large)
    while not any(output.id == "large" and output.finish for output in outputs):
        outputs += engine.step()
        if not engine.has_work():
            time.sleep(engine.patience() or 0)
    for position in range(301, 310):
        engine.mask("waiting", position, mask(position, size))
        made = len(outputs)
        while len(outputs) == made:
            outputs += engine.step()
    found: dict[str, list[Output]] = {"waiting": [], "large": []}
    for output in outputs:
        found[output.id].append(output)
    assert answers(found) == expected


def test_the_engines_thread_sleeps_while_it_waits_for_masks_and_wakes_to_end_who_waits_too_long(
    tiny_root: Root, make_engine: Make
) -> None:
    engine, over, said = make_engine(tiny_root[0], mask_patience=0.3), threading.Event(), []
    steps = 0
    step = engine.step

    def counted() -> list[Output]:
        nonlocal steps
        steps += 1
        return step()

    def deliver(outputs: list[Output]) -> None:
        said.extend(outputs)
        over.set()

    engine.step = counted  # to see that it does not spin
    thread = EngineThread(engine, deliver, over.set)
    thread.do(lambda engine: engine.submit(held("silent", tiny_root[2]["tiny"], [1, 2, 3])))
    assert over.wait(20)
    assert [output.finish for output in said] == ["error"]
    assert steps < 10
    assert thread.stop()


@pytest.mark.parametrize("bits", [b"", b"\xff", b"\xff" * 67, b"\0" * 66], ids=["none", "short", "long", "nothing"])
def test_a_mask_under_which_nothing_can_be_drawn_ends_its_request(
    tiny_root: Root, make_engine: Make, bits: bytes
) -> None:
    engine = make_engine(tiny_root[0])
    image = tiny_root[2]["tiny"]
    engine.submit(held("wrong", image, [1, 2, 3]))
    engine.submit(Request(id="free", image=image, tokens=[1, 2], sampling=GREEDY))
    engine.mask("wrong", 3, bits)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    assert [output.error and output.error[0] for output in outputs["wrong"]] == ["invalid_value"]
    assert outputs["free"][-1].finish == "length"


def test_masks_for_other_places_and_other_requests_are_forgotten(tiny_root: Root, make_engine: Make) -> None:
    engine, image = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    size = vocabulary_of(engine, image)
    free = Request(id="free", image=image, tokens=[1, 2], sampling=GREEDY)
    expected = answers(run(make_engine(tiny_root[0]), [free]))["free"]
    engine.submit(held("held", image, [1, 2, 3]))
    engine.submit(free)
    only = np.packbits(np.arange(size) == 9, bitorder="little").tobytes()
    for identity, position in (("held", 2), ("held", 4), ("held", 0), ("nobody", 3), ("free", 2)):
        engine.mask(identity, position, only)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    assert answers(outputs) == {"free": expected}
    engine.mask("held", 3, only)
    assert engine.has_work()
    [output] = engine.step()
    assert (output.id, output.tokens) == ("held", [9])
    engine.abort("held")
    assert [output.finish for output in engine.step()] == ["abort"]
    assert engine.status().pool_used == 0


def test_a_stop_id_is_drawn_where_the_mask_leaves_nothing_else_and_never_else_before_min_tokens(
    tiny_root: Root, make_engine: Make
) -> None:
    engine, image = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    size = vocabulary_of(engine, image)
    sampling = SamplingParams(temperature=1, seed=3, min_tokens=10, max_tokens=20, stop_ids=(7, 8))
    engine.submit(held("r", image, [1, 2, 3], sampling))
    some = np.packbits(np.isin(np.arange(size), (7, 8, 9)), bitorder="little").tobytes()
    ends = np.packbits(np.isin(np.arange(size), (7, 8)), bitorder="little").tobytes()
    for place in range(3, 9):
        engine.mask("r", place, some)
        assert [(output.tokens, output.finish) for output in engine.step()] == [([9], None)]
    engine.mask("r", 9, ends)
    [output] = engine.step()
    assert output.finish == "stop" and output.tokens[0] in (7, 8)


async def stream(
    client: EngineClient, request: Request, size: int, cuts: tuple[int, ...] = (), next_engine: Any = None
) -> list[Output]:
    """The outputs of a constrained request; its engine is replaced after so many of them, with a mask on its way."""
    outputs: list[Output] = []
    restarts, position = [], len(request.tokens)
    async for output in client.generate(request, mask(position, size)):
        outputs.append(replace(output, timing=None, cached_tokens=0))
        position += len(output.tokens)
        if len(outputs) in cuts:
            restarts.append(asyncio.create_task(asyncio.to_thread(next_engine)))
            await asyncio.sleep(0.05 if len(outputs) % 2 else 0)
        client.mask(request.id, position, mask(position, size))
    await asyncio.gather(*restarts)
    return outputs


async def test_masks_go_over_the_socket_and_to_the_next_engine_where_one_is_killed(
    tiny_root: Root, start_engine: Start, make_engine: Make
) -> None:
    root, _, digests = tiny_root
    engines = [start_engine(root)]

    def next_engine() -> None:
        engines[-1].process.kill()
        engines[-1].process.wait()
        engines.append(start_engine(root))

    request = held("s", digests["tiny-qwen2"], list(range(3, 43)), replace(SAMPLED, max_tokens=200))
    here = make_engine(root)
    expected = answers(run(here, [request]))["s"]
    client = EngineClient(engines[0].socket, patience=30)
    try:
        found = await stream(client, request, vocabulary_of(here, request.image), (1, 60), next_engine)
        assert answers({"s": found})["s"] == expected
        assert len(engines) == 3
        client.mask("s", 43, b"\xff")  # of a stream that is over: nobody's
        again = await stream(client, replace(request, id="again"), vocabulary_of(here, request.image))
        assert answers({"s": again})["s"] == expected
    finally:
        await client.close()
