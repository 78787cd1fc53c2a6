"""The routes over real sockets: what a client sees, whole and streamed, when all is well and when it is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from vai.daemon import protocol
from vai.errors import CorruptImage, NotEnoughRoom, Overloaded, Unavailable, VaiError
from vai.server import render

from .conftest import ANSWER, CONTEXT, Delta, Model, Served, until

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 40}


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, http_client=served.http)


def events(body: str) -> list[Any]:
    """The events of a stream, parsed; comments dropped; the end mark as a string."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_chat_answer_has_the_shape_the_openai_client_reads(served: Served) -> None:
    answer = client(served).chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    prompt, made = len(b"user:hi"), len(ANSWER.encode()) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, made)
    assert answer.usage.total_tokens == prompt + made
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_a_stream_says_what_the_whole_answer_says(served: Served, chunk: int) -> None:
    served.script.chunk = chunk
    api = client(served)
    pieces = list(api.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    whole = api.chat.completions.create(**CHAT)
    *first, last = pieces
    assert "".join(p.choices[0].delta.content or "" for p in first) == whole.choices[0].message.content == ANSWER
    assert first[0].choices[0].delta.role == "assistant"
    assert all(p.choices[0].delta.role is None for p in first[1:])
    assert [p.choices[0].finish_reason for p in first if p.choices[0].finish_reason] == ["stop"]
    assert first[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({p.id for p in pieces}) == 1


def test_a_stream_ends_with_the_end_mark_and_has_usage_only_when_asked(served: Served) -> None:
    plain = events(served.post("/v1/chat/completions", CHAT | {"stream": True}).text)
    assert plain[-1] == "[DONE]"
    assert all("usage" not in event for event in plain[:-1])
    asked = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    counted = events(served.post("/v1/chat/completions", asked).text)
    assert counted[-1] == "[DONE]"
    assert [event["usage"] for event in counted[:-2]] == [None] * len(counted[:-2])
    assert counted[-2]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("prompt", ["hi", ["hi", "you"], [104, 105], [[104, 105], [1]]])
def test_completions_take_every_form_of_prompt_streaming_and_not(served: Served, prompt: Any) -> None:
    api = client(served)
    whole = api.completions.create(model="tiny", prompt=prompt, max_tokens=40)
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice.index for choice in whole.choices] == list(range(count))
    assert [choice.text for choice in whole.choices] == [ANSWER] * count
    texts = [""] * count
    for piece in api.completions.create(model="tiny", prompt=prompt, max_tokens=40, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [ANSWER] * count
    assert [104, 105] in [ids for ids, _, _ in served.script.seen]


def test_completions_stop_at_sixteen_tokens_unless_told_otherwise(served: Served) -> None:
    answer = client(served).completions.create(model="tiny", prompt="hi")
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_chat_logprobs_have_the_bytes_of_every_token(served: Served) -> None:
    answer = client(served).chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    places = answer.choices[0].logprobs.content
    made = bytes(byte for place in places for byte in place.bytes)
    assert made == ANSWER.encode()
    assert [(top.token, top.logprob) for top in places[0].top_logprobs] == [("A", -1.0), ("B", -1.0)]
    assert places[0].logprob == -0.5
    streamed = client(served).chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=True)
    parts = [place for piece in streamed if piece.choices[0].logprobs for place in piece.choices[0].logprobs.content]
    assert parts == places


def test_completion_logprobs_are_parallel_lists_with_offsets_into_the_text(served: Served) -> None:
    answer = client(served).completions.create(model="tiny", prompt="x", max_tokens=40, logprobs=1)
    places = answer.choices[0].logprobs
    assert places is not None
    assert len(places.tokens) == len(places.token_logprobs) == len(places.top_logprobs) == len(places.text_offset)
    assert places.tokens[:4] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc"]
    assert places.text_offset[:5] == [0, 1, 2, 2, 3]
    assert places.top_logprobs[0] == {"A": -1.0}


def test_a_minus_infinite_logprob_is_written_as_a_number() -> None:
    assert render._finite(float("-inf")) == render.LOWEST_LOGPROB


def test_sampling_values_reach_the_engine_as_they_were_sent(served: Served) -> None:
    served.post(
        "/v1/chat/completions",
        CHAT
        | {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 3, "max_completion_tokens": 9}
        | {"stop": "x", "stop_token_ids": [5], "min_tokens": 2}
        | {"repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"7": -100}},
    ).raise_for_status()
    _, sampling, stop = served.script.seen[-1]
    assert stop == ["x"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens, sampling.logprobs) == (3, 9, 2, None)
    assert 5 in sampling.stop_ids
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 2)
    assert sampling.logit_bias == {7: -100}


def test_choices_have_indices_by_prompt_and_a_prompt_is_counted_once(served: Served) -> None:
    api = client(served)
    asked: Any = {"model": "tiny", "prompt": ["hi", "you"], "n": 3, "max_tokens": 40, "logprobs": 0}
    whole = api.completions.create(**asked)
    assert [(choice.index, choice.text) for choice in whole.choices] == [(index, ANSWER) for index in range(6)]
    assert whole.usage is not None
    made = len(ANSWER.encode()) + 1
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 6 * made)
    assert whole.usage.prompt_tokens_details.cached_tokens == 4
    assert [ids for ids, _, _ in served.script.seen] == [list(b"hi")] * 3 + [list(b"you")] * 3
    order = []
    texts, tokens = [""] * 6, [list[str]() for _ in range(6)]
    for piece in api.completions.create(**asked, stream=True):
        choice = piece.choices[0]
        order.append(choice.index)
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [ANSWER] * 6
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert order != sorted(order)  # they come side by side


def test_every_choice_of_a_chat_stream_has_a_role_and_an_end(served: Served) -> None:
    pieces = events(served.post("/v1/chat/completions", CHAT | {"stream": True, "n": 2}).text)[:-1]
    for index in range(2):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("prompt", ["Grüße", list("Grüße".encode())])
def test_echo_begins_every_choice_with_its_prompt(served: Served, prompt: Any) -> None:
    api = client(served)
    whole = api.completions.create(model="tiny", prompt=prompt, max_tokens=40, echo=True, n=2)
    assert [choice.text for choice in whole.choices] == ["Grüße" + ANSWER] * 2
    texts = ["", ""]
    for piece in api.completions.create(model="tiny", prompt=prompt, max_tokens=40, echo=True, n=2, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == ["Grüße" + ANSWER] * 2


def test_models_are_listed_and_found_by_ids_with_slashes_and_colons(served: Served) -> None:
    api = client(served)
    assert [model.id for model in api.models.list()] == ["tiny", "org/other:Q4_0", "cold"]
    assert api.models.retrieve("org/other:Q4_0").id == "org/other:Q4_0"
    assert served.get("/v1/models/org%2Fother%3AQ4_0").json()["max_model_len"] == CONTEXT
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("nobody")
    assert "tiny" in caught.value.message


def test_an_unknown_model_is_404_and_the_message_lists_those_there_are(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(served).chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
    assert "tiny" in caught.value.message


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_wrong_paths_and_methods_get_openai_error_bodies(
    served: Served, method: str, path: str, status: int, code: str
) -> None:
    answer = served.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Overloaded("The queue is full.", retry_after=3), 429, True),
        (Unavailable("No engine."), 503, True),
        (NotEnoughRoom("No room."), 503, False),
        (CorruptImage("Bad."), 500, False),
        (RuntimeError("a bug"), 500, False),
    ],
)
def test_an_error_before_the_first_token_is_an_http_error_that_says_whether_to_retry(
    served: Served, error: Exception, status: int, retry: bool, stream: bool
) -> None:
    served.script.error = error
    answer = served.post("/v1/chat/completions", CHAT | {"stream": stream})
    assert answer.status_code == status
    assert answer.headers.get("x-should-retry") == (None if retry else "false")
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert answer.json()["error"]["type"]
    assert "a bug" not in answer.text
    if status == 429:
        assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("error", [VaiError("It broke."), RuntimeError("a bug")])
def test_an_error_in_the_middle_of_a_stream_is_one_error_event(served: Served, error: Exception) -> None:
    served.script.error, served.script.error_after = error, 3
    got = events(served.post("/v1/chat/completions", CHAT | {"stream": True}).text)
    assert "error" in got[-1]
    assert sum("error" in event for event in got) == 1
    with pytest.raises(openai.APIError):
        list(client(served).chat.completions.create(**CHAT, stream=True))


def test_a_request_the_engine_aborted_is_an_error_and_not_a_short_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def aborted(self: Model, *_: object) -> Any:
        yield Delta("x", [120])
        yield Delta("", [], finish="abort")

    monkeypatch.setattr(Model, "stream", aborted)
    assert served.post("/v1/chat/completions", CHAT).status_code == 503
    got = events(served.post("/v1/chat/completions", CHAT | {"stream": True}).text)
    assert got[-1]["error"]["code"] == "interrupted"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", ["hi", ["a", "b", "c"]])
def test_a_client_that_leaves_ends_its_generation(served: Served, stream: bool, prompts: Any) -> None:
    served.script.stall_after = 4
    count = len(prompts) if isinstance(prompts, list) else 1
    with served.connect() as connection:
        connection.sendall(served.raw_request("/v1/completions", TEXT | {"prompt": prompts, "stream": stream}))
        until(lambda: served.script.open_streams == count)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    until(lambda: served.script.open_streams == 0)
    served.script.stall_after = None
    assert served.post("/v1/completions", TEXT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopping_server_ends_what_it_cannot_finish_with_an_error(
    stoppable: tuple[Served, Callable[[], None]], stream: bool
) -> None:
    served, ask_to_stop = stoppable
    served.script.stall_after = 4
    with served.connect() as connection:
        connection.sendall(served.raw_request("/v1/chat/completions", CHAT | {"stream": stream}))
        until(lambda: served.script.open_streams == 1)
        got = connection.recv(50) if stream else b""
        ask_to_stop()
        while data := connection.recv(65536):
            got += data
    assert got.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert got.count(b'"code":"interrupted"') == 1
    assert b"[DONE]" not in got
    assert served.script.open_streams == 0


def test_one_failing_prompt_of_a_batch_ends_the_others(served: Served) -> None:
    served.script.error, served.script.error_after = VaiError("It broke."), 2
    assert served.post("/v1/completions", TEXT | {"prompt": ["a", "b"]}).status_code == 500
    assert served.script.open_streams == 0


def test_a_silent_generation_is_kept_alive_by_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from vai.server import app, stream

    monkeypatch.setattr(app, "EventStream", lambda frames: stream.EventStream(frames, keep_alive=0.05))
    served.script.stall_after = 0
    with served.connect() as connection:
        connection.sendall(served.raw_request("/v1/chat/completions", CHAT | {"stream": True}))
        got = b""
        while got.count(b": ping\n\n") < 3:
            got += connection.recv(1000)
    assert got.startswith(b"HTTP/1.1 200")
    until(lambda: served.script.open_streams == 0)


def test_health_is_200_only_while_the_engine_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from vai.server import app

    monkeypatch.setattr(app, "HEALTH_SECONDS", 0.2)
    assert served.get("/health").json()["status"] == "ok"
    assert served.script.seen[-1][1].max_tokens == 1, "health decodes one token of a new engine"
    served.get("/readyz").raise_for_status()
    assert len(served.script.seen) == 1, "and then believes the engine's own answer"
    served.script.engine_alive = False
    down = served.get("/health")
    assert down.status_code == 503
    assert "engine" in down.json()["error"]["message"]
    assert served.get("/livez").status_code == 200
    assert served.get("/v1/models").status_code == 200


def test_health_is_503_when_the_model_cannot_decode(served: Served) -> None:
    served.script.error = Unavailable("No engine.")
    assert served.get("/health").status_code == 503
    served.script.error = None
    assert served.get("/health").status_code == 200


def test_health_is_503_while_there_is_no_model_to_answer(served: Served) -> None:
    assert served.get("/health").status_code == 200
    served.script.empty = True
    answer = served.get("/health")
    assert answer.status_code == 503
    assert "vai load" in answer.json()["error"]["message"]


def test_the_version_is_told(served: Served) -> None:
    assert served.get("/version").json()["version"]


class LoadingDaemon:
    """A real daemon socket that answers "load"."""

    def __init__(self, path: Path, answer: dict[str, Any]) -> None:
        import socket

        self.asked: list[dict[str, Any]] = []
        self.before_answer: Callable[[], None] = lambda: None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            self.asked.append(protocol.receive(connection))
            self.before_answer()
            connection.sendall(protocol.encode(self._answer))

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


def test_a_named_model_that_is_not_resident_is_loaded_by_the_daemon(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    daemon = LoadingDaemon(tmp_path / "d.sock", {"ok": True})
    served = serve(daemon_socket=tmp_path / "d.sock")
    daemon.before_answer = lambda: setattr(served.script, "loaded", True)
    assert served.post("/v1/chat/completions", CHAT | {"model": "cold"}).status_code == 200
    daemon.close()
    assert [(ask["op"], ask["name"]) for ask in daemon.asked] == [("load", "cold")]


def test_a_load_without_room_is_503_with_the_daemons_own_sentence(serve: Callable[..., Served], tmp_path: Path) -> None:
    error = {"code": "not_enough_room", "message": "Needs 4 GB, 1 GB is free; `vai rm other` frees 3 GB."}
    daemon = LoadingDaemon(tmp_path / "d.sock", {"error": error})
    served = serve(daemon_socket=tmp_path / "d.sock")
    answer = served.post("/v1/chat/completions", CHAT | {"model": "cold"})
    daemon.close()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, error["message"])


def test_a_load_whose_file_is_gone_is_404_for_the_model(serve: Callable[..., Served], tmp_path: Path) -> None:
    daemon = LoadingDaemon(tmp_path / "d.sock", {"error": {"code": "model_not_found", "message": "It is gone."}})
    served = serve(daemon_socket=tmp_path / "d.sock")
    answer = served.post("/v1/chat/completions", CHAT | {"model": "cold"})
    daemon.close()
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("daemon", [True, False])
def test_without_a_daemon_an_absent_model_is_503_saying_what_to_run(
    serve: Callable[..., Served], tmp_path: Path, daemon: bool
) -> None:
    served = serve(daemon_socket=tmp_path / "nobody.sock" if daemon else None)
    answer = served.post("/v1/chat/completions", CHAT | {"model": "cold"})
    assert answer.status_code == 503
    assert ("vai serve" if daemon else "vai load") in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, {"cache": True, "cache_salt": "", "priority": 0}),
        ({"cache_prompt": True, "cache_salt": "mine"}, {"cache": True, "cache_salt": "mine"}),
        ({"cache_prompt": False, "cache_salt": None}, {"cache": False, "cache_salt": ""}),
        ({"priority": -3}, {"priority": -3}),
        ({"priority": 7}, {"priority": 7}),
        ({}, {"speculate": (None, None)}),
        ({"speculative.type": "ngram-simple", "speculative.n_max": 4}, {"speculate": ("ngram", 4)}),
        ({"speculative.type": "none", "speculative.n_max": 0}, {"speculate": ("off", 0)}),
        ({"speculative.type": "draft"}, {"speculate": ("draft", None)}),
        ({}, {"deterministic": False}),
        ({"deterministic": True}, {"deterministic": True}),
        ({}, {"session": "", "retain": None}),
        ({"session_id": "a", "cache_control": {"type": "ephemeral"}}, {"session": "a", "retain": 300}),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, {"session": "", "retain": 3600}),
        ({"cache_control": {"type": "ephemeral", "ttl": "0s"}}, {"retain": 0}),
    ],
)
def test_how_a_request_is_to_be_treated_reaches_the_engine(
    served: Served, asked: dict[str, Any], told: dict[str, Any]
) -> None:
    assert served.post("/v1/chat/completions", CHAT | asked).status_code == 200
    assert served.post("/v1/completions", TEXT | asked).status_code == 200
    assert len(served.script.hows) == 2
    assert all(told.items() <= how.items() for how in served.script.hows)


def test_requests_that_do_not_say_are_deterministic_where_the_server_says_so(serve: Callable[..., Served]) -> None:
    served = serve(deterministic=True)
    for asked in ({}, {"deterministic": None}, {"deterministic": False}):
        assert served.post("/v1/chat/completions", CHAT | asked).status_code == 200
    assert [how["deterministic"] for how in served.script.hows] == [True, True, False]


def test_pages_are_kept_as_long_as_any_part_of_a_message_asks_for(served: Served) -> None:
    ttls = [("long", "5400s"), ("short", "5m")]
    parts = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": ttl}} for text, ttl in ttls]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "hi"}]
    assert served.post("/v1/chat/completions", CHAT | {"messages": messages}).status_code == 200
    assert served.script.hows[-1]["retain"] == 5400


def test_a_session_is_ended_by_name(served: Served) -> None:
    answer = served.request("DELETE", "/v1/sessions/agent/7?cache_salt=mine")
    assert answer.json() == {"id": "agent/7", "pages_freed": 3, "deleted": True, "object": "session"}
    assert served.script.ended == [("agent/7", "mine")]
    assert served.request("DELETE", "/v1/sessions/" + "x" * 257).status_code == 400
    assert served.request("GET", "/v1/sessions/agent").status_code == 405


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("usage", [False, True])
def test_an_answer_says_what_each_stage_took_where_it_is_asked(served: Served, path: str, usage: bool) -> None:
    body = (CHAT if "chat" in path else TEXT) | {"stages": True}
    whole = served.post(path, body).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *_, last, end = events(served.post(path, body | {"stream": True} | options).text)
    assert (end, last["choices"], "usage" in last) == ("[DONE]", [], usage)
    for stages in (whole["stages"], last["stages"]):
        assert list(stages) == ["loader", "preprocessor", "queue", "core", "prefill", "decode", "postprocessor"]
        assert (stages["queue"], stages["prefill"], stages["decode"], stages["core"]) == (0.25, 0.5, 1.0, 1.5)
        assert 0.5 < stages["loader"] < 0.7 and 0.125 < stages["postprocessor"] < 0.3 and stages["preprocessor"] > 0
    assert "stages" not in served.post(path, body | {"stages": False}).json()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_fingerprint_is_the_engines_in_every_answer_and_chunk(served: Served, path: str) -> None:
    body = CHAT if "chat" in path else TEXT
    assert served.post(path, body).json()["system_fingerprint"] == "vai-of-the-script"
    *chunks, _ = events(served.post(path, body | {"stream": True}).text)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"vai-of-the-script"}
