"""The engine over real tiny models: an answer belongs to its request alone, bit for bit, and every page comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from vai.burn.burn import burn
from vai.burn.gguf import GgufFile
from vai.burn.synth import synthesize
from vai.daemon.pool import SLAB
from vai.engine.engine import Engine
from vai.errors import BadRequest, ContextTooLong, ModelNotFound, NotEnoughRoom
from vai.kernels import table, tuning
from vai.request import Output, Request, SamplingParams, TokenLogprob
from vai.rom import segment

Root = tuple[Path, Path, dict[str, str]]
Make = Callable[..., Engine]
Answer = tuple[list[int], list[TokenLogprob]]

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=40, logprobs=0)
HOT = SamplingParams(temperature=1.5, min_p=0.01, seed=1 << 62, max_tokens=33, logprobs=20)


def request(identity: str, image: str, prompt: Iterable[int], sampling: SamplingParams = GREEDY) -> Request:
    return Request(id=identity, image=image, tokens=list(prompt), sampling=sampling)


def run(engine: Engine, requests: Iterable[Request], *, steps_between: int = 0) -> dict[str, list[Output]]:
    """Submit, with some steps between one request and the next, and step to the end."""
    outputs: dict[str, list[Output]] = {}

    def step() -> None:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)

    for each in requests:
        engine.submit(each)
        for _ in range(steps_between):
            step()
    while engine.has_work():
        step()
    return outputs


def answer(own: list[Output]) -> Answer:
    """Tokens and logprobs of a request, which are compared bit for bit."""
    return [token for each in own for token in each.tokens], [one for each in own for one in each.logprobs]


def answers(outputs: dict[str, list[Output]]) -> dict[str, Answer]:
    return {identity: answer(own) for identity, own in outputs.items()}


def alone(make_engine: Make, root: Path, requests: Iterable[Request], **options: object) -> dict[str, Answer]:
    return {each.id: answers(run(make_engine(root, **options), [each]))[each.id] for each in requests}


@pytest.fixture
def mixed(tiny_root: Root) -> list[Request]:
    """Requests of both models: short and long prompts, across page and chunk boundaries, every way of drawing."""
    llama, qwen2 = tiny_root[2]["tiny"], tiny_root[2]["tiny-qwen2"]
    return [
        request("one-token", llama, [5]),
        request("page", llama, range(32), SAMPLED),
        request("long", llama, [3 * i % 500 for i in range(200)], HOT),
        request("other", qwen2, range(100, 133), SAMPLED),
        request("other-long", qwen2, [7 * i % 500 for i in range(150)]),
        request("same-prompt", llama, range(32), replace(SAMPLED, seed=8)),
        request("other-short", qwen2, [1, 2, 3], HOT),
    ]


def test_an_answer_is_the_same_alone_in_company_and_among_other_models(
    tiny_root: Root, make_engine: Make, mixed: list[Request]
) -> None:
    expected = alone(make_engine, tiny_root[0], mixed)
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(mixed)
    together = run(make_engine(tiny_root[0], slabs=2), mixed)
    assert answers(together) == expected
    staggered = run(make_engine(tiny_root[0], slabs=2), reversed(mixed), steps_between=3)
    assert answers(staggered) == expected


@pytest.mark.parametrize("max_rows", [1, 7])
def test_an_answer_does_not_depend_on_how_its_prompt_is_chunked(
    tiny_root: Root, make_engine: Make, mixed: list[Request], max_rows: int
) -> None:
    expected = alone(make_engine, tiny_root[0], mixed)
    assert answers(run(make_engine(tiny_root[0], slabs=2, max_rows=max_rows), mixed)) == expected


def test_an_answer_does_not_depend_on_the_number_of_threads(
    tiny_root: Root, make_engine: Make, mixed: list[Request]
) -> None:
    expected = answers(run(make_engine(tiny_root[0], slabs=2), mixed))
    assert answers(run(make_engine(tiny_root[0], slabs=2, threads=3), mixed)) == expected


def test_an_engine_uses_what_was_found_to_be_the_fastest(
    tiny_root: Root, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for when the first image that is large enough is attached, and the next engine finds it."""
    monkeypatch.setattr(tuning, "WEIGHTS", 1 << 10)
    monkeypatch.setattr(tuning, "fastest_distance", lambda *_, **__: 6912)
    monkeypatch.setattr(tuning, "fastest_isa", lambda *_: table.TILES)
    root, _, images = tiny_root
    make_engine(root).submit(request("first", images["tiny"], [5]))
    try:
        monkeypatch.undo()
        engine = make_engine(root)
        engine.submit(request("again", images["tiny"], [5]))
        workers = engine._bank.select(images["tiny"]).workers
        assert workers is not None and workers.ahead == 6912
        assert engine.status().isa == (table.TILES if table.TILES in table.isas() else table.isa())
    finally:
        (root / "run" / "tuned.json").unlink()


def test_a_preempted_request_continues_with_the_same_bits(wide_root: tuple[Path, str], make_engine: Make) -> None:
    root, digest = wide_root
    requests = [
        request("old", digest, range(100), replace(SAMPLED, max_tokens=200)),
        request("middle", digest, range(50, 150), replace(HOT, max_tokens=150)),
        request("young", digest, range(200, 300), replace(GREEDY, max_tokens=120)),
    ]
    expected = alone(make_engine, root, requests)
    engine = make_engine(root)  # 512 tokens of room for 770
    running = []
    for each in requests:
        engine.submit(each)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        running.append(engine.status().models[0].running)
    assert running[0] == 3 and running != sorted(running, reverse=True)  # somebody left and came back
    assert answers(outputs) == expected
    assert engine.status().pool_used == 0


def test_the_reference_gives_the_same_tokens(tiny_root: Root, make_engine: Make, mixed: list[Request]) -> None:
    short = [each for each in mixed if len(each.tokens) < 40]
    few = [replace(each, sampling=replace(each.sampling, max_tokens=4)) for each in short]
    native = answers(run(make_engine(tiny_root[0], slabs=2), few))
    reference = answers(run(make_engine(tiny_root[0], slabs=2, backend="reference"), few))
    assert native == reference


def test_what_the_step_reports_adds_up(tiny_root: Root, make_engine: Make) -> None:
    digest = tiny_root[2]["tiny"]
    own = run(make_engine(tiny_root[0]), [request("a", digest, [1, 2], SAMPLED)])["a"]
    assert [len(each.tokens) for each in own] == [1] * 40
    assert [each.seed for each in own] == [7] + [None] * 39
    assert [each.finish for each in own] == [None] * 39 + ["length"]
    timing = own[-1].timing
    assert timing is not None and min(timing.queued, timing.prefill, timing.decode) >= 0
    assert all(each.logprobs[0].logprob < 0 and each.logprobs[0].top_ids == [] for each in own)


def test_a_request_without_a_seed_gets_one_that_reproduces_it(tiny_root: Root, make_engine: Make) -> None:
    digest = tiny_root[2]["tiny"]
    free = SamplingParams(temperature=1.0, max_tokens=30)
    engine = make_engine(tiny_root[0])
    first, second = (run(engine, [request(name, digest, [1, 2], free)])[name] for name in "ab")
    assert answers({"a": first}) != answers({"a": second})
    again = run(engine, [request("a", digest, [1, 2], replace(free, seed=first[0].seed))])
    assert answers(again) == answers({"a": first})


def test_a_stop_id_ends_the_answer_and_is_its_last_token(tiny_root: Root, make_engine: Make) -> None:
    digest = tiny_root[2]["tiny"]
    engine = make_engine(tiny_root[0])
    tokens, _ = answers(run(engine, [request("a", digest, [9])]))["a"]
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    cut = tokens.index(stop) + 1
    own = run(engine, [request("b", digest, [9], replace(GREEDY, stop_ids=(stop,)))])["b"]
    assert [token for each in own for token in each.tokens] == tokens[:cut]
    assert own[-1].finish == "stop"


def test_below_min_tokens_no_stop_id_is_drawn(tiny_root: Root, make_engine: Make) -> None:
    digest = tiny_root[2]["tiny"]
    engine = make_engine(tiny_root[0])
    tokens, _ = answers(run(engine, [request("a", digest, [9])]))["a"]
    stops = tuple(set(tokens[:6]))
    sampling = replace(GREEDY, stop_ids=stops, min_tokens=10)
    own, _ = answers(run(engine, [request("b", digest, [9], sampling)]))["b"]
    assert len(own) >= 10
    assert not set(own[:10]) & set(stops)


def test_prompts_that_cannot_fit_are_refused_with_both_numbers(
    tiny_root: Root, wide_root: tuple[Path, str], make_engine: Make
) -> None:
    engine = make_engine(tiny_root[0])
    with pytest.raises(ContextTooLong, match=r"4096 tokens.* 4096"):
        engine.submit(request("a", tiny_root[2]["tiny"], [1] * 4096))
    wide = make_engine(wide_root[0])
    with pytest.raises(NotEnoughRoom, match=r"512 tokens.* 512"):
        wide.submit(request("a", wide_root[1], [1] * 512))
    assert not engine.has_work() and not wide.has_work()


def test_an_answer_ends_where_context_or_scratchpad_do(
    short_root: tuple[Path, str], wide_root: tuple[Path, str], make_engine: Make
) -> None:
    for (root, digest), room in ((short_root, 100), (wide_root, 512)):
        own = run(make_engine(root), [request("a", digest, [1] * (room - 5), SamplingParams(temperature=0))])["a"]
        assert sum(len(each.tokens) for each in own) == 5
        assert own[-1].finish == "length"


def test_token_ids_that_the_model_does_not_have_are_refused(tiny_root: Root, make_engine: Make) -> None:
    engine, digest = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    with pytest.raises(BadRequest, match=r"512 does not exist.* 0 to 511"):
        engine.submit(request("a", digest, [1, 512, 3]))
    with pytest.raises(BadRequest, match="-1 does not exist"):
        engine.submit(request("a", digest, [1, -1]))
    with pytest.raises(BadRequest, match="empty"):
        engine.submit(request("a", digest, []))


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 2.0}, {"logprobs": 99}, {"max_tokens": 0}]
)
def test_values_out_of_bounds_are_refused_also_from_this_process(
    tiny_root: Root, make_engine: Make, changes: dict[str, float]
) -> None:
    with pytest.raises(BadRequest, match="cannot be used"):
        make_engine(tiny_root[0]).submit(request("a", tiny_root[2]["tiny"], [1], replace(GREEDY, **changes)))


def test_a_stop_id_that_the_model_cannot_draw_changes_nothing(tiny_root: Root, make_engine: Make) -> None:
    engine, digest = make_engine(tiny_root[0]), tiny_root[2]["tiny"]
    strange = replace(GREEDY, stop_ids=(512, 1 << 23), min_tokens=5)
    outputs = run(engine, [request("a", digest, [9]), request("b", digest, [9], strange)])
    assert answers(outputs)["a"] == answers(outputs)["b"]


def test_an_image_that_is_not_there_is_refused(tiny_root: Root, make_engine: Make) -> None:
    with pytest.raises(ModelNotFound):
        make_engine(tiny_root[0]).submit(request("a", "0" * 64, [1]))


def test_pages_are_back_after_an_abort_in_queue_prefill_and_decode(tiny_root: Root, make_engine: Make) -> None:
    engine = make_engine(tiny_root[0], max_rows=40)
    for number, digest in enumerate([*tiny_root[2].values()] * 3):
        engine.submit(request(str(number), digest, range(100), SAMPLED))
    for _ in range(8):
        engine.step()
    for number in range(6):
        engine.abort(str(number))
    assert engine.status().pool_used == 0
    assert {output.finish for output in engine.step()} == {"abort"}
    assert not engine.has_work()


def test_releasing_an_image_gives_its_lease_back_and_a_later_request_attaches_it_again(
    tiny_root: Root, make_engine: Make
) -> None:
    root, _, digests = tiny_root
    engine, path = make_engine(root), segment.image_path(root, digests["tiny"])
    before = len(segment.holders(path))
    engine.submit(request("gone", digests["tiny"], [1], SAMPLED))
    engine.submit(request("stays", digests["tiny-qwen2"], [1], SAMPLED))
    engine.step()
    assert len(segment.holders(path)) == before + 1
    engine.release(digests["tiny"])
    assert len(segment.holders(path)) == before
    outputs = run(engine, [])
    assert outputs["gone"][-1].finish == "abort" and outputs["stays"][-1].finish == "length"
    assert run(engine, [request("again", digests["tiny"], [1])])["again"][-1].finish == "length"


def test_switch_times_are_kept_by_class_and_forgotten_when_taken(tiny_root: Root, make_engine: Make) -> None:
    engine, digests = make_engine(tiny_root[0], slabs=2), tiny_root[2]
    for number in range(10):
        name = "tiny" if number % 2 else "tiny-qwen2"
        run(engine, [request("a", digests[name], [1], replace(GREEDY, max_tokens=4))])
    times = engine.switches()
    assert len(times.switched) == 10 and len(times.same) == 30
    assert sorted(times.switched)[5] < 0.005
    assert engine.switches().same == []


def test_the_pool_is_one_for_all_models_and_nothing_of_it_is_reserved(tiny_root: Root, make_engine: Make) -> None:
    engine, digests = make_engine(tiny_root[0]), tiny_root[2]  # one slab: one model at a time
    both = [request(name, digest, range(40)) for name, digest in digests.items()]
    outputs = run(engine, both)
    assert {own[-1].finish for own in outputs.values()} == {"length"}
    assert engine.status().pool_bytes == SLAB


def test_a_prompt_that_computes_to_no_number_ends_its_own_request_and_leaves_no_trace(
    tmp_path: Path, make_engine: Make
) -> None:
    source, root = tmp_path / "model.gguf", tmp_path / "root"
    synthesize(source, shape="tiny", type="F32", seed=1)
    with GgufFile(source) as checkpoint:
        embedding = checkpoint.tensors["token_embd.weight"]
    poisoned = 7
    with source.open("r+b") as file:
        file.seek(embedding.offset + poisoned * embedding.shape[1] * 4)
        file.write(np.full(embedding.shape[1], np.nan, "<f4").tobytes())
    digest = burn(source, root).digest
    good = [request("good", digest, range(10, 50)), request("later", digest, range(20, 70), SAMPLED)]
    expected = alone(make_engine, root, good)
    engine = make_engine(root)
    outputs = run(engine, [request("bad", digest, [1, poisoned, *range(60)]), good[0]])
    assert [each.finish for each in outputs["bad"]] == ["error"]
    assert outputs["bad"][0].error is not None and "not a number" in outputs["bad"][0].error[1]
    assert answers(outputs)["good"] == expected["good"]
    assert answers(run(engine, [good[1]]))["later"] == expected["later"]  # in the pages that held the NaNs
