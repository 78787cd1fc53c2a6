"""The prefix cache over real tiny models: a hit changes when an answer comes, and no bit of it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from vai.request import Output, Request, SamplingParams

from .test_engine import Answer, Make, Root, answer, answers, run

GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=5)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=40, logprobs=20)


def request(identity: str, image: str, prompt: Iterable[int], sampling: SamplingParams = GREEDY) -> Request:
    return Request(id=identity, image=image, tokens=list(prompt), sampling=sampling)


def hits(outputs: dict[str, list[Output]]) -> dict[str, int]:
    return {identity: own[0].cached_tokens for identity, own in outputs.items()}


def uncached(make_engine: Make, root: Path, requests: Iterable[Request]) -> dict[str, Answer]:
    engine = make_engine(root, slabs=2)
    return {each.id: answer(run(engine, [replace(each, cache=False, id="alone")])["alone"]) for each in requests}


def test_an_answer_after_a_hit_has_the_same_tokens_and_logprobs(tiny_root: Root, make_engine: Make) -> None:
    engine = make_engine(tiny_root[0], slabs=2)
    for digest in tiny_root[2].values():
        prompt = [3 * i % 500 for i in range(150)]
        for sampling in (GREEDY, SAMPLED):
            expected = uncached(make_engine, tiny_root[0], [request("a", digest, prompt, sampling)])
            first, second = (run(engine, [request("a", digest, prompt, sampling)]) for _ in range(2))
            assert answers(first) == answers(second) == expected
            assert hits(second) == {"a": 128}
        strange = [replace(request("a", digest, prompt), cache_salt="other"), request("b", digest, [9, *prompt[1:]])]
        assert hits(run(engine, strange)) == {"a": 0, "b": 0}


def test_a_conversation_recomputes_its_new_turn_and_at_most_a_page_before_it(
    tiny_root: Root, make_engine: Make
) -> None:
    digest, draw = tiny_root[2]["tiny"], random.Random(3)
    engine = make_engine(tiny_root[0], slabs=2)
    said: list[int] = []
    for turn in range(8):
        prompt = [*said, *(draw.randrange(500) for _ in range(draw.randrange(1, 80)))]
        asked = request("a", digest, prompt, replace(SAMPLED, max_tokens=draw.randrange(1, 70)))
        own = run(engine, [asked])["a"]
        assert answer(own) == uncached(make_engine, tiny_root[0], [asked])["a"], turn
        assert min(len(said), len(prompt) - 1) - own[0].cached_tokens <= 32
        assert sum(each.cached_tokens for each in own[1:]) == 0
        said = [*prompt, *answer(own)[0]]


def test_answers_are_the_same_among_others_that_share_evict_and_preempt(
    wide_root: tuple[Path, str], tiny_root: Root, make_engine: Make
) -> None:
    """Conversations that branch off one beginning, in a pool that holds a fraction of them."""
    root, digest = wide_root
    stem = [7 * i % 500 for i in range(130)]
    requests = [
        request(
            f"{n}", digest, [*stem[: 130 - 20 * (n % 4)], n, n + 1], replace(sampling, max_tokens=20 + 25 * (n % 3))
        )
        for n, sampling in enumerate([GREEDY, SAMPLED] * 5)
    ]
    expected = uncached(make_engine, root, requests)
    for steps_between in (0, 5):
        engine = make_engine(root)  # sixteen pages: the requests together take more than forty
        outputs = run(engine, requests, steps_between=steps_between)
        assert answers(outputs) == expected
        assert sum(hits(outputs).values()) > 0
        again = run(engine, reversed(requests), steps_between=3)
        assert answers(again) == expected
        status = engine.status()
        assert status.pool_used == 0 < status.pool_cached
        assert status.pool_cached + status.pool_free == status.pool_bytes


def test_pages_of_a_model_are_found_again_after_another_has_run(tiny_root: Root, make_engine: Make) -> None:
    engine, digests = make_engine(tiny_root[0], slabs=3), tiny_root[2]
    prompt = [5 * i % 500 for i in range(100)]
    both = [request(name, digest, prompt, SAMPLED) for name, digest in digests.items()]
    expected = uncached(make_engine, tiny_root[0], both)
    for turn in range(3):
        for each in both:
            outputs = run(engine, [each])
            assert answers(outputs) == {each.id: expected[each.id]}
            assert hits(outputs) == {each.id: 96 if turn else 0}


def test_releasing_an_image_frees_its_cached_pages(tiny_root: Root, make_engine: Make) -> None:
    engine, digest = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    asked = request("a", digest, range(100))
    expected = run(engine, [asked])
    assert engine.status().pool_cached > 0
    engine.release(digest)
    assert (engine.status().pool_cached, engine.status().pool_free) == (0, engine.status().pool_bytes)
    again = run(engine, [asked])
    assert hits(again) == {"a": 0} and answers(again) == answers(expected)


def test_cached_pages_make_room_for_whoever_needs_it(tiny_root: Root, make_engine: Make) -> None:
    engine, digests = make_engine(tiny_root[0]), tiny_root[2]  # one slab: a model at a time
    for name in ("tiny", "tiny-qwen2", "tiny"):
        own = run(engine, [request("a", digests[name], range(100))])["a"]
        assert (own[-1].finish, own[0].cached_tokens) == ("length", 0)
