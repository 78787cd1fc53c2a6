"""Determinism over HTTP: what a client is sent does not depend on who else asks, nor on which engine answers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .system import System, start_engine

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
STOPS = {"stop": [" t", "a ", "qu"], "stop_token_ids": [300, 301]}
ASKED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETION, {"prompt": "Once upon a time", "temperature": 0, "logprobs": 3}),
    (COMPLETION, {"prompt": ["one", "two " * 40], "seed": 5, "n": 3, "logprobs": 1, **STOPS}),
    (COMPLETION, {"prompt": "one", "seed": 5, "top_k": 30, "top_p": 0.9, "min_tokens": 4, **STOPS}),
    (COMPLETION, {"prompt": "one", "seed": 6, "repetition_penalty": 1.2, "logit_bias": {"70": 3}, "priority": -1}),
    (CHAT, {"messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 20}),
    (CHAT, {"messages": MESSAGES, "seed": 1, "n": 2, "temperature": 1.3, "min_p": 0.01, "priority": 3}),
    (CHAT, {"messages": MESSAGES, "seed": 9, "speculative.type": "ngram-simple", "stop": ["e"]}),
]


def told(system: System, path: str, asked: dict[str, Any], model: str) -> Any:
    """The choices of an answer and its fingerprint: all that may not depend on anything else."""
    body = {"model": model, "max_tokens": 40, **asked}
    answer = system.http.post(system.url + path, content=json.dumps(body).encode())
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"], found["system_fingerprint"]


def test_answers_are_the_same_alone_among_others_and_from_the_next_engine(system: System) -> None:
    asked = [(path, body, model) for path, body in ASKED for model in ("tiny", "tiny-qwen2")]
    alone = [told(system, *each) for each in asked]
    assert any(choice["finish_reason"] == "stop" for choices, _ in alone for choice in choices)
    assert len({fingerprint for _, fingerprint in alone}) == 2
    with ThreadPoolExecutor(24) as clients:
        others = [{"prompt": f"{number} sheep", "n": 4, "priority": number % 3 - 1} for number in range(10)]
        noise = [clients.submit(told, system, COMPLETION, each, "tiny") for each in others]
        together = list(clients.map(lambda each: told(system, *each), asked * 2))
        assert all(each.result()[0] for each in noise)
    assert together == alone * 2
    system.engine.kill()
    system.engine.wait()
    system.engine = start_engine(system.root)
    assert [told(system, *each) for each in asked] == alone


def test_the_stages_of_a_request_fill_the_time_it_took(system: System) -> None:
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stages": True}
    shares = []
    while not shares or max(shares) <= 0.5:  # on a busy machine a request may wait for things that are no stage
        assert len(shares) < 20, shares
        began = time.perf_counter()
        stages = system.http.post(system.url + COMPLETION, content=json.dumps(body).encode()).json()["stages"]
        seconds = time.perf_counter() - began
        assert all(value > 0 for value in stages.values())
        assert stages["core"] == stages["prefill"] + stages["decode"]
        outside = stages["loader"] + stages["preprocessor"] + stages["queue"] + stages["core"]
        assert outside < seconds
        assert stages["postprocessor"] < seconds
        shares.append(outside / seconds)
