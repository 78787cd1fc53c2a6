"""`deterministic` through the whole path: asked for in one request, or of a server for all that do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2

from .system import System, running_server, start_engine


def ask(system: System, seed: int, **more: Any) -> tuple[Any, str]:
    prompt = [(61 * i * i + 17 * i + seed) % 512 for i in range(200)]
    answer = system.api.completions.create(
        model="tiny", prompt=prompt, max_tokens=4, temperature=0, logprobs=2, extra_body=more
    )
    return answer.choices[0].logprobs, answer.system_fingerprint


def test_an_answer_is_deterministic_where_its_request_or_else_the_server_says_so(place: tuple[Path, Path]) -> None:
    root, names = place
    engine = start_engine(root, "--fast", "portable")
    try:
        with running_server(root, names) as (server, port), httpx2.Client(timeout=60) as http:
            system = System(root, names, engine, server, port, http)
            assert system.status().fast == "portable"
            fast, exact, longest = ask(system, 1), ask(system, 1, deterministic=True), ask(system, 1)
        with running_server(root, names, "--deterministic") as (server, port), httpx2.Client(timeout=60) as http:
            system = System(root, names, engine, server, port, http)
            always, unlike = ask(system, 2), ask(system, 3, deterministic=False)
    finally:
        engine.kill()
        engine.wait()
    assert fast[0] != exact[0]
    assert longest == exact  # both chains are cached, equally long: the exact one is taken
    assert fast[1] == unlike[1] == f"{exact[1]}-portable"
    assert always[1] == exact[1]
