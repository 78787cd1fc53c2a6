"""The server process over the engine process, with real (tiny) models, asked by the `openai` client."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from vai.engine.client import EngineClient
from vai.engine.port import EngineStatus
from vai.engine.scheduler import MAX_WAITING_OF_ONE
from vai.engine.waiting import LONGEST
from vai.errors import Overloaded
from vai.kernels.program import MAX_SEQUENCES
from vai.request import Request, SamplingParams
from vai.rom.registry import Registry

from .system import System, running_server, server_argv, start_engine, until

PROMPT = "Once upon a time"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story."}]
LONG = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
KEY = "sk-a-key-of-this-test"


def chat(system: System, model: str = "tiny", **more: Any) -> Any:
    return system.api.chat.completions.create(model=model, messages=MESSAGES, **{"max_tokens": 24} | more)


def complete(system: System, prompt: Any = PROMPT, model: str = "tiny", **more: Any) -> Any:
    return system.api.completions.create(model=model, prompt=prompt, **{"max_tokens": 24} | more)


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen2"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7, "top_p": 0.9}])
def test_a_stream_says_what_the_whole_answer_says(system: System, model: str, sampling: dict[str, Any]) -> None:
    for ask, text in (
        (chat, lambda choice: choice.delta.content if hasattr(choice, "delta") else choice.message.content),
        (complete, lambda choice: choice.text),
    ):
        whole = ask(system, model=model, **sampling)
        pieces = list(ask(system, model=model, **sampling, stream=True, stream_options={"include_usage": True}))
        assert "".join(text(piece.choices[0]) or "" for piece in pieces[:-1]) == text(whole.choices[0]) != ""
        assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        streamed, counted = pieces[-1].usage, whole.usage
        assert (streamed.prompt_tokens, streamed.completion_tokens) == (
            counted.prompt_tokens,
            counted.completion_tokens,
        )
        assert counted.total_tokens == counted.prompt_tokens + counted.completion_tokens
        assert 0 <= counted.prompt_tokens_details.cached_tokens < counted.prompt_tokens


def test_a_chat_that_goes_on_finds_what_was_computed_of_it_unless_told_not_to(system: System) -> None:
    messages = [{"role": "user", "content": "A conversation that nobody else has. " * 8}]
    asked = {"model": "tiny", "max_tokens": 24, "temperature": 0}

    def ask(**more: Any) -> Any:
        more["deterministic"] = True  # what is found may otherwise be of another kind than what is computed
        return system.api.chat.completions.create(messages=messages, **asked, extra_body=more)

    first = ask()
    said = first.usage.prompt_tokens
    assert first.usage.prompt_tokens_details.cached_tokens < 32 < said
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Go"}]
    second, uncached, stranger = ask(), ask(cache_prompt=False), ask(cache_salt="another")
    assert second.usage.prompt_tokens_details.cached_tokens >= said - 32
    for other in (uncached, stranger):
        assert other.usage.prompt_tokens_details.cached_tokens == 0
        assert other.choices[0].message.content == second.choices[0].message.content
    assert ask(cache_salt="another").usage.prompt_tokens_details.cached_tokens > said


def test_a_conversation_is_pinned_while_its_client_says_so_and_free_when_it_is_over(system: System) -> None:
    prompt = [11 * n % 500 for n in range(200)]

    def cached(**more: Any) -> int:
        answer = complete(system, prompt, temperature=0, extra_body={"session_id": "agent/1", **more})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(cache_control={"type": "ephemeral", "ttl": "1h"}) == 0
    assert system.status().pool_pinned > 0
    assert cached() == 192
    ended = httpx2.delete(f"{system.url}/v1/sessions/agent/1").json()
    assert (ended["deleted"], ended["pages_freed"]) == (True, 6)
    assert system.status().pool_pinned == 0
    assert cached(cache_control={"type": "ephemeral", "ttl": "0s"}) == 0
    assert cached() == 0


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(system: System) -> None:
    first, again, other = (complete(system, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6))
    assert first == again != other


def test_both_models_answer_in_turn_and_differently(system: System) -> None:
    answers = [complete(system, model=model, temperature=0).choices[0].text for model in ("tiny", "tiny-qwen2") * 2]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]


def test_a_batch_of_prompts_says_what_each_alone_says(system: System) -> None:
    prompts = ["One", "Two two", "Three three three"]
    batch = complete(system, prompts, temperature=0)
    assert [choice.index for choice in batch.choices] == [0, 1, 2]
    alone = [complete(system, prompt, temperature=0) for prompt in prompts]
    assert [choice.text for choice in batch.choices] == [answer.choices[0].text for answer in alone]
    assert batch.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)


PENALIZED: dict[str, Any] = {
    "temperature": 1,
    "seed": 11,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {"40": 2, "41": -100},
    "extra_body": {"repetition_penalty": 1.2},
}


@pytest.mark.parametrize("sampling", [{"temperature": 1, "seed": 7}, PENALIZED])
def test_a_choice_is_the_same_however_many_there_are_and_after_a_restart(
    system: System, sampling: dict[str, Any]
) -> None:
    four = complete(system, n=4, logprobs=2, **sampling)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in four.choices}) == 4
    assert complete(system, logprobs=2, **sampling).choices == four.choices[:1]
    assert complete(system, n=2, logprobs=2, **sampling).choices == four.choices[:2]
    system.engine.kill()
    system.engine.wait()
    system.engine = start_engine(system.root)
    texts = [""] * 3
    for piece in complete(system, n=3, **sampling, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in four.choices[:3]]
    made = [len(choice.logprobs.tokens) for choice in four.choices]
    assert four.usage.prompt_tokens == complete(system).usage.prompt_tokens
    assert sum(made) <= four.usage.completion_tokens <= sum(made) + 4


def test_choices_of_a_chat_without_a_seed_differ(system: System) -> None:
    answer = chat(system, n=16, temperature=1)
    assert len({choice.message.content for choice in answer.choices}) > 1
    greedy = chat(system, n=3, temperature=0)
    assert len({choice.message.content for choice in greedy.choices}) == 1


def test_penalties_and_biases_change_the_answer(system: System) -> None:
    def text(**more: Any) -> str:
        body = {"ignore_eos": True} | more.pop("extra_body", {})
        return str(complete(system, temperature=0, max_tokens=120, **more, extra_body=body).choices[0].text)

    plain = text()
    assert plain == text(presence_penalty=0, frequency_penalty=0, extra_body={"repetition_penalty": 1}, logit_bias={})
    for more in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 2}}):
        assert text(**more) != plain
    forced = complete(system, temperature=0, logit_bias={"65": 100}, max_tokens=5, logprobs=0)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        complete(system, logit_bias={"16000000": 1})
    assert caught.value.param == "logit_bias"


def test_echo_repeats_the_prompt_as_it_was_sent(system: System) -> None:
    plain = complete(system, temperature=0).choices[0].text
    assert complete(system, temperature=0, echo=True).choices[0].text == PROMPT + plain


def test_token_ids_are_a_prompt(system: System) -> None:
    ids = [5, 6, 7, 8]
    one = complete(system, ids, temperature=0)
    assert one.usage.prompt_tokens == len(ids)
    assert [c.text for c in complete(system, [ids, ids], temperature=0).choices] == [one.choices[0].text] * 2
    with pytest.raises(openai.BadRequestError) as caught:
        complete(system, [1, 9_999_999])
    assert caught.value.param == "prompt"


def test_a_stop_string_ends_the_answer_before_it(system: System) -> None:
    text = complete(system, temperature=0).choices[0].text
    stop = text[8:11]
    cut = text[: text.index(stop)]
    for stream in (False, True):
        answer = complete(system, temperature=0, stop=[stop, "never said"], stream=stream)
        pieces = list(answer) if stream else [answer]
        assert "".join(piece.choices[0].text for piece in pieces) == cut
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_stop_id_ends_the_answer_and_min_tokens_hold_it_off(system: System) -> None:
    places = complete(system, temperature=0, logprobs=0).choices[0].logprobs.tokens
    assert len(places) == 24
    made = complete(system, temperature=0, max_tokens=5, extra_body={"ignore_eos": True}).usage.completion_tokens
    assert made == 5
    held = complete(
        system, temperature=0, max_tokens=8, extra_body={"stop_token_ids": list(range(30)), "min_tokens": 8}
    )
    assert held.usage.completion_tokens == 8


def test_logprobs_are_probabilities_and_the_best_comes_first(system: System) -> None:
    places = chat(system, temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(places) == 24
    for place in places:
        values = [top.logprob for top in place.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert place.logprob == values[0] <= 0
        assert place.bytes == place.top_logprobs[0].bytes
    whole = complete(system, temperature=0, logprobs=2).choices[0].logprobs
    parts = [piece.choices[0].logprobs for piece in complete(system, temperature=0, logprobs=2, stream=True)]
    for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in parts if part for value in getattr(part, field)] == getattr(whole, field)


def test_a_prompt_past_the_context_is_refused_with_both_numbers(system: System) -> None:
    context = next(iter(system.api.models.list())).max_model_len
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(system, [1] * (context + 5), stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert str(context) in caught.value.message
        assert str(context + 5) in caught.value.message
    with pytest.raises(openai.BadRequestError):
        system.api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * context}])


def test_an_answer_that_fills_the_context_ends_with_length(system: System) -> None:
    context = next(iter(system.api.models.list())).max_model_len
    answer = complete(system, [1] * (context - 3), max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens <= 4


def test_unknown_models_are_404_and_the_message_lists_those_there_are(system: System) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(system, model="nobody")
    assert caught.value.code == "model_not_found"
    assert "tiny-qwen2" in caught.value.message


def test_wrong_messages_are_400(system: System) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        system.api.chat.completions.create(model="tiny", messages=[])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_pages_back(system: System, stream: bool) -> None:
    body = {"model": "tiny", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    before = system.status()
    with socket.create_connection(("127.0.0.1", system.port)) as connection:
        request = httpx2.Request("POST", system.url, json=body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request.content)}\r\n\r\n"
        connection.sendall(head.encode() + request.content)
        until(lambda: any(model.running for model in system.status().models))
        assert system.status().pool_used > 0
    until(system.idle)
    made = sum(model.tokens for model in system.status().models) - sum(model.tokens for model in before.models)
    assert made < 8000, "the generation went on to its end"


def test_two_hundred_disconnects_leave_neither_pages_nor_descriptors(system: System) -> None:
    chance = random.Random(1)
    descriptors = Path(f"/proc/{system.server.pid}/fd")
    chat(system, model="tiny-qwen2")  # what stays open from the first chat on is there now
    before = len(list(descriptors.iterdir()))
    for _ in range(200):
        prompt = [chance.randrange(400) for _ in range(chance.choice([1, 50, 600]))]
        body = {
            "model": chance.choice(["tiny", "tiny-qwen2"]),
            "prompt": chance.choice([prompt, [prompt, prompt[:1]]]),
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": chance.random() < 0.5,
        }
        request = httpx2.Request("POST", system.url, json=body)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request.content)}\r\n\r\n"
        whole = head.encode() + request.content
        with socket.create_connection(("127.0.0.1", system.port), timeout=20) as connection:
            connection.sendall(whole if chance.random() < 0.9 else whole[: chance.randrange(len(whole))])
            if chance.random() < 0.3 and body["stream"]:
                connection.settimeout(0.05)
                with suppress(TimeoutError):
                    connection.recv(1000)
            if chance.random() < 0.5:  # by a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(system.idle)
    until(lambda: len(list(descriptors.iterdir())) <= before)
    assert complete(system, temperature=0).choices[0].text


def test_models_are_listed_while_the_engine_is_stopped_and_health_says_so(system: System) -> None:
    assert system.http.get(system.url + "/health").status_code == 200
    system.engine.send_signal(signal.SIGSTOP)
    try:
        health = system.http.get(system.url + "/readyz")
        assert health.status_code == 503
        assert [model.id for model in system.api.models.list()]
        assert system.http.get(system.url + "/livez").status_code == 200
    finally:
        system.engine.send_signal(signal.SIGCONT)
    assert system.http.get(system.url + "/health").status_code == 200


def test_without_patience_an_engine_killed_in_mid_stream_is_one_error_and_the_next_is_found(system: System) -> None:
    stream = complete(system, stream=True, **LONG)
    next(iter(stream))
    system.engine.kill()
    with pytest.raises(openai.APIError):
        list(stream)
    system.engine.wait()
    down = system.http.post(system.url + "/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (down.status_code, down.headers["retry-after"]) == (503, "1")
    system.engine = start_engine(system.root)
    assert complete(system, temperature=0).choices[0].text


def test_a_full_queue_says_in_how_many_seconds_to_try_again(system: System) -> None:
    """It is filled at the engine's socket, with more than may wait of one client besides those who run."""
    image = Registry(system.root, system.names).get("tiny").digest
    sampling = SamplingParams(max_tokens=1000, logit_bias={2: -100})

    async def refused() -> openai.RateLimitError:
        client = EngineClient(system.root / "run/engine.sock")

        async def ask(number: int) -> None:
            request = Request(id=str(number), image=image, tokens=[5], sampling=sampling)
            while True:  # refused before the first of them run, it takes one of their places
                with suppress(Overloaded):
                    async for _ in client.generate(request):
                        pass
                await asyncio.sleep(0.1)  # not sooner: a hundred that ask all the time leave the engine no time

        def full(status: EngineStatus) -> bool:
            return any(m.running == MAX_SEQUENCES and m.waiting == MAX_WAITING_OF_ONE for m in status.models)

        tasks = [asyncio.ensure_future(ask(number)) for number in range(MAX_SEQUENCES + MAX_WAITING_OF_ONE + 16)]
        while not full(await client.status()):
            await asyncio.sleep(0.01)
        try:
            with pytest.raises(openai.RateLimitError) as error:
                await asyncio.to_thread(complete, system)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()
        return error.value

    wait = int(asyncio.run(refused()).response.headers["retry-after"])
    assert 1 <= wait <= LONGEST
    again = system.api.with_options(max_retries=5).completions.create(model="tiny", prompt=[5], max_tokens=2)
    assert again.choices[0].finish_reason


def test_metrics_agree_with_the_engine_and_with_the_files(system: System) -> None:
    complete(system, max_tokens=8, extra_body={"ignore_eos": True})
    lines = dict(line.rsplit(" ", 1) for line in system.http.get(system.url + "/metrics").text.splitlines())
    images = {
        name: system.root / "images" / f"{Registry(system.root, system.names).get(name).digest}.rom"
        for name in ("tiny", "tiny-qwen2")
    }
    for name, image in images.items():
        assert float(lines[f'vai_rom_bytes{{model="{name}"}}']) == image.stat().st_size
        assert float(lines[f'vai_rom_leases{{model="{name}"}}']) == 1
        assert float(lines[f'vllm:num_requests_running{{model_name="{name}"}}']) == 0
    assert float(lines["vai_engine_up"]) == 1
    assert float(lines['vllm:generation_tokens_total{model_name="tiny"}']) >= 8
    assert float(lines['vllm:request_decode_time_seconds_sum{model_name="tiny"}']) > 0


def test_a_running_server_has_no_kernels_loaded_and_holds_no_lease(system: System) -> None:
    chat(system)
    maps = Path(f"/proc/{system.server.pid}/maps").read_text()
    assert "_native" not in maps
    assert "numpy" not in maps
    assert str(system.root / "images") not in maps
    images = {path.stat().st_ino for path in (system.root / "images").iterdir()}
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if str(system.server.pid) in words:
            assert int(words[5].split(":")[-1]) not in images


def test_the_server_listens_on_one_loopback_port_only(system: System) -> None:
    sockets = [str(link.readlink()) for link in Path(f"/proc/{system.server.pid}/fd").iterdir()]
    inodes = {name[8:-1] for name in sockets if name.startswith("socket:[")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                listening.append(words[1])
    assert listening == [f"0100007F:{system.port:04X}"]


def test_a_second_server_of_the_root_refuses_and_names_the_first(system: System) -> None:
    second = subprocess.run(server_argv(system.root, system.names), capture_output=True, text=True, timeout=30)
    assert second.returncode == 3
    assert f"process {system.server.pid}" in second.stderr


def test_an_address_beyond_this_machine_is_refused_without_a_key(place: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    refused = subprocess.run(
        server_argv(root, place[1], "--host", "0.0.0.0"), capture_output=True, text=True, timeout=30
    )
    assert refused.returncode == 2
    assert "VAI_API_KEY" in refused.stderr
    assert not root.exists()


@pytest.mark.parametrize(
    "more", [("--port", "70000"), ("--host", "no such host"), ("--api-key-fd", "99"), ("--patience", "nan")]
)
def test_an_argument_that_cannot_be_is_a_sentence(
    place: tuple[Path, Path], tmp_path: Path, more: tuple[str, str]
) -> None:
    argv = [*server_argv(tmp_path / "root", place[1]), *more]
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert refused.returncode == 2
    assert more[0] in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_a_sentence(place: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        argv = [*server_argv(tmp_path / "root", place[1]), "--port", str(port)]
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert refused.returncode == 7
    assert str(port) in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_key_comes_through_a_descriptor_and_a_stop_is_clean(place: tuple[Path, Path], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, KEY.encode() + b"\n")
    os.close(writer)
    more = ("--api-key-fd", str(reader))
    with running_server(tmp_path / "root", place[1], *more, pass_fds=(reader,)) as (process, port):
        os.close(reader)
        url = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        assert list(openai.OpenAI(base_url=url, api_key=KEY, max_retries=0).models.list()) is not None
        assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


# --- structured output ---

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "sex": {"enum": ["f", "m", None]}},
    "required": ["age", "sex"],
    "additionalProperties": False,
}
AS_PERSON: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def is_person(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"age", "sex"} and 0 <= found["age"] <= 150 and found["sex"] in ("f", "m", None)


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen2"])
def test_a_chat_answers_in_json_that_satisfies_its_schema(system: System, model: str) -> None:
    asked = {"response_format": AS_PERSON, "temperature": 1, "max_tokens": 400}
    many = chat(system, model=model, n=8, seed=3, **asked)
    for choice in many.choices:
        assert choice.finish_reason == "stop" and is_person(choice.message.content)
    assert len({choice.message.content for choice in many.choices}) > 4
    for seed in range(8):
        pieces = chat(system, model=model, seed=seed, stream=True, **asked)
        assert is_person("".join(piece.choices[0].delta.content or "" for piece in pieces))
    one = chat(system, model=model, seed=3, **asked)
    assert one.choices[0].message.content == many.choices[0].message.content


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"guided_regex": "[a-f]{3}-[0-9]+x"}, "[a-f]{3}-[0-9]+x"),
        ({"structured_outputs": {"regex": "(ab|c){2,4}"}}, "(ab|c){2,4}"),
        ({"guided_choice": ["yes", "no", "naïve\n"]}, "yes|no|naïve\n"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"grammar": 'root ::= "<" [a-z]{2,3} ">" root?'}, "(<[a-z]{2,3}>)+"),
        ({"guided_grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
        (
            {"json_schema": {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 2}},
            r"\[\s*((1|22)(\s*,\s*(1|22))?\s*)?\]",
        ),
    ],
)
def test_a_completion_matches_what_it_must(system: System, constraint: dict[str, Any], pattern: str) -> None:
    found = complete(system, n=4, temperature=1, max_tokens=300, extra_body=constraint)
    for choice in found.choices:
        assert choice.finish_reason == "length" or re.fullmatch(pattern, choice.text), choice.text
    assert any(choice.finish_reason == "stop" for choice in found.choices)


def test_what_limits_other_answers_limits_those_under_a_grammar(system: System) -> None:
    constraint = {"guided_regex": "(ab)*"}
    short = complete(system, temperature=1, max_tokens=3, seed=1, extra_body=constraint)
    assert short.choices[0].finish_reason in ("length", "stop") and short.usage.completion_tokens <= 3
    stopped = complete(system, temperature=0, max_tokens=50, stop=["b"], extra_body={"guided_regex": "ab[0-9]{9}"})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("a", "stop")
    # The grammar is stronger: it allows nothing but the end where min_tokens would hold that off.
    ended = complete(system, temperature=1, max_tokens=50, extra_body={"guided_choice": ["a"], "min_tokens": 20})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("a", "stop")
    forever = {"guided_regex": "[ab]*", "min_tokens": 40}
    assert complete(system, temperature=1, max_tokens=60, extra_body=forever).usage.completion_tokens >= 40
    ignoring = {"guided_choice": ["yes", "no"], "ignore_eos": True}
    assert complete(system, max_tokens=50, extra_body=ignoring).choices[0].text in ("yes", "no")


def test_logprobs_under_a_grammar_are_the_models_own(system: System) -> None:
    free = complete(system, temperature=0, max_tokens=1, logprobs=5)
    held = complete(system, temperature=0, max_tokens=1, logprobs=5, extra_body={"guided_regex": "[0-9]{30}"})
    assert held.choices[0].text.isdigit()
    assert held.choices[0].logprobs.top_logprobs == free.choices[0].logprobs.top_logprobs
    assert held.choices[0].logprobs.token_logprobs[0] <= free.choices[0].logprobs.token_logprobs[0]


def test_neighbours_of_a_constrained_answer_keep_their_bits(system: System) -> None:
    asked = {"temperature": 1, "seed": 5, "max_tokens": 60, "logprobs": 3, "extra_body": {"ignore_eos": True}}
    alone = complete(system, **asked)
    held = {"guided_regex": "[a-z0-9 ]{200}"}
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(complete, system, max_tokens=60, temperature=1, extra_body=held) for _ in range(4)]
        again = [threads.submit(complete, system, **asked) for _ in range(4)]
        for answer in again:
            assert answer.result().choices[0].text == alone.choices[0].text
            assert answer.result().choices[0].logprobs == alone.choices[0].logprobs
        assert all(re.fullmatch("[a-z0-9 ]*", other.result().choices[0].text) for other in others)


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_regex": "(" * 50_000 + "a" + ")" * 50_000}, "regex"),
        ({"guided_grammar": "root ::= missing"}, "missing"),
        (
            {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"\n'},
            "more than it may",
        ),
    ],
)
def test_a_grammar_that_cannot_be_used_is_a_bad_request_at_once(system: System, constraint: Any, named: str) -> None:
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            list(complete(system, stream=streamed, extra_body=constraint))
        assert named in caught.value.message
    assert complete(system).choices[0].text


def test_a_client_that_leaves_a_constrained_answer_leaves_nothing_behind(system: System) -> None:
    for _ in range(5):
        stream = complete(
            system, stream=True, max_tokens=4000, extra_body={"guided_regex": "(?s:.*)", "min_tokens": 4000}
        )
        next(iter(stream))
        stream.close()
    until(system.idle)
