"""The routes: the OpenAI API over the models that `vai.llm.Frontend` serves, and the health of it all.

Nothing here touches weights. `/v1/models` reads the registry alone and answers while the engine is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vai.daemon import client as daemon
from vai.errors import BadRequest, ContextTooLong, ModelNotFound, Unavailable, VaiError
from vai.request import SamplingParams
from vai.server import schema
from vai.server.guard import Guard, Hosts, error_response, read_body, status_phrase
from vai.server.render import Answer, ChatAnswer, TextAnswer
from vai.server.stream import EventStream, interleave, until_gone

if TYPE_CHECKING:
    from vai.engine.port import EnginePort
    from vai.llm import Delta, Frontend, Model

HEALTH_SECONDS = 4.0  # an engine that says nothing this long is not healthy
COMPLETION_TOKENS = 16  # `max_tokens` of /v1/completions where the client names none, as in OpenAI's
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")


class Routes:
    """All endpoints. One per process, on one event loop."""

    def __init__(self, frontend: Frontend, port: EnginePort, daemon_socket: Path | None) -> None:
        self._frontend = frontend
        self._port = port
        self._daemon_socket = daemon_socket
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._proven_engine = 0  # pid of the last engine seen to decode

    def app(self) -> Starlette:
        """The routes as a Starlette application with OpenAI error bodies."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/health", self.health),
            Route("/readyz", self.health),
            Route("/livez", self.live),
            Route("/version", self.version),
        ]
        app = Starlette(routes=routes, exception_handlers={VaiError: _refused, HTTPException: _refused})
        app.router.redirect_slashes = False
        return app

    # -- models and health -----------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json(schema.ModelList(_entries(self._frontend)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        entries = _entries(self._frontend)
        for entry in entries:
            if entry.id == name:
                return _json(entry)
        raise ModelNotFound(_no_such_model(name, entries), param="model")

    async def live(self, request: Request) -> Response:
        """The event loop answers."""
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return _json({"version": metadata.version("vai")})

    async def health(self, request: Request) -> Response:
        """200 when the engine answers and a model has been seen to decode in it, else 503 with the reason."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                status = await self._port.status()
                if status.pid != self._proven_engine:
                    await self._decode_one()
                    self._proven_engine = status.pid
        except TimeoutError:
            raise Unavailable(f"The engine did not answer within {HEALTH_SECONDS:g} s.") from None
        return _json({"status": "ok", "models": len(status.models)})

    async def _decode_one(self) -> None:
        cards = [card for card in self._frontend.models() if card.resident]
        if not cards:
            raise Unavailable("No model is resident. Load one: vai load FILE")
        model = await self._frontend.open(cards[0].name)
        async with aclosing(model.stream([0], SamplingParams(temperature=0, max_tokens=1), [])) as deltas:
            async for _ in deltas:
                pass

    # -- generation ------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response | EventStream:
        asked = schema.decode_chat(await read_body(request.scope, request.receive))
        messages = schema.plain_messages(asked.messages)
        model = await self._open(asked.model)
        ids = await model.encode_chat(messages)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = _sampling(asked, model, asked.max_completion_tokens or asked.max_tokens, logprobs)
        return await self._respond(request, asked, model, [ids], sampling, ChatAnswer)

    async def completions(self, request: Request) -> Response | EventStream:
        asked = schema.decode_completion(await read_body(request.scope, request.receive))
        given = schema.prompts(asked)
        model = await self._open(asked.model)
        prompts = [await model.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        sampling = _sampling(asked, model, asked.max_tokens or COMPLETION_TOKENS, asked.logprobs)
        return await self._respond(request, asked, model, prompts, sampling, TextAnswer)

    async def _respond(
        self,
        request: Request,
        asked: schema.ChatRequest | schema.CompletionRequest,
        model: Model,
        prompts: list[list[int]],
        sampling: SamplingParams,
        kind: type[Answer],
    ) -> Response | EventStream:
        for prompt in prompts:
            _check_length(prompt, model)
        options = asked.stream_options
        answer = kind(
            model,
            [len(prompt) for prompt in prompts],
            logprobs=sampling.logprobs is not None,
            usage_chunk=bool(options and options.include_usage),
        )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        deltas = interleave([model.stream(prompt, sampling, stop) for prompt in prompts])
        notes = request.scope["vai.notes"]
        if asked.stream:
            return EventStream(_frames(answer, deltas, notes))
        body = await until_gone(request.receive, _whole(answer, deltas, notes))
        return Response(body, media_type="application/json")

    async def _open(self, name: str) -> Model:
        """The model of this name, loaded by the daemon first where it is not resident.

        Raises ModelNotFound, Unavailable (with the way out) or NotEnoughRoom.
        """
        entries = {card.name: card for card in self._frontend.models()}
        card = entries.get(name)
        if card is None:
            raise ModelNotFound(_no_such_model(name, _entries(self._frontend)), param="model")
        if not card.resident:
            await self._load(name)
        return await self._frontend.open(name)

    async def _load(self, name: str) -> None:
        """Have the daemon make a model resident. Everybody who waits for one name waits for one load."""
        if self._daemon_socket is None:
            raise Unavailable(
                f"The model '{name}' is not resident and no daemon is here to load it. Start it: vai serve"
            )
        task = self._loading.get(name)
        if task is None:
            task = asyncio.ensure_future(asyncio.to_thread(_ask_to_load, self._daemon_socket, name))
            self._loading[name] = task
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        await asyncio.shield(task)


def build(
    frontend: Frontend, port: EnginePort, *, daemon_socket: Path | None, host: str, api_key: str | None
) -> ASGIApp:
    """The whole server as one ASGI application: the guard around the routes. `host`: the address it is bound to."""
    return Guard(Routes(frontend, port, daemon_socket).app(), hosts=Hosts(host), api_key=api_key)


def _json(value: object) -> Response:
    return Response(schema.encode(value), media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """The answer for one of our errors, or one of the router's: an unknown path, a wrong method."""
    if isinstance(error, VaiError):
        return error_response(error)
    if not isinstance(error, HTTPException):
        raise error
    phrase = status_phrase(error.status_code)
    text = f"{request.method} {request.url.path[:200]}: {phrase}. The API is under /v1, as in OpenAI's."
    body = schema.error_body(text, kind="invalid_request_error", code=phrase.lower().replace(" ", "_"))
    headers = {**(error.headers or {}), "x-should-retry": "false"}
    return Response(body, error.status_code, headers, media_type="application/json")


def _entries(frontend: Frontend) -> list[schema.ModelEntry]:
    return [schema.ModelEntry(card.name, card.created, card.context) for card in frontend.models()]


def _no_such_model(name: str, entries: list[schema.ModelEntry]) -> str:
    known = ", ".join(entry.id for entry in entries) or "none; load one: vai load FILE"
    return f"There is no model '{name[:80]}'. Models here: {known}."


def _ask_to_load(socket: Path, name: str) -> None:
    daemon.call(socket, "load", timeout=None, name=name)


def _check_length(prompt: list[int], model: Model) -> None:
    """The engine checks this too; here nothing of a batch has started yet."""
    context = model.card.context
    if not prompt:
        raise BadRequest("The prompt is empty; it needs at least one token.", param="prompt")
    if len(prompt) >= context:
        raise ContextTooLong(
            f"The prompt has {len(prompt)} tokens, but the context of '{model.card.name}' holds {context}, "
            "answer included. Shorten it.",
            param="prompt",
        )


def _sampling(
    asked: schema.ChatRequest | schema.CompletionRequest, model: Model, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The engine's parameters: what the request says, else what the model's file recommends, else the API's defaults.

    Raises BadRequest where values contradict each other.
    """
    if max_tokens is not None and asked.min_tokens is not None and asked.min_tokens > max_tokens:
        raise BadRequest("'min_tokens' is over 'max_tokens'.", param="min_tokens")
    chosen: dict[str, object] = {name: model.defaults[name] for name in _DEFAULTS if name in model.defaults}
    for name in (*_DEFAULTS, "seed", "min_tokens"):
        value = getattr(asked, name)
        if value is not None:
            chosen[name] = value
    if asked.top_k == -1:
        chosen["top_k"] = 0
    if max_tokens is not None:
        chosen["max_tokens"] = max_tokens
    stops = tuple(asked.stop_token_ids or ())
    chosen["stop_ids"] = stops if asked.ignore_eos else (*model.eog, *stops)
    return msgspec.convert({**chosen, "logprobs": logprobs}, SamplingParams)


def _note(notes: dict[str, object], answer: Answer) -> None:
    notes.update(
        model=answer.name,
        prompt=answer.prompt_tokens,
        completion=answer.usage.completion_tokens,
        finish=answer.finish,
    )


async def _frames(
    answer: Answer, deltas: AsyncGenerator[tuple[int, Delta], None], notes: dict[str, object]
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(deltas) as items:
            async for index, delta in items:
                yield answer.chunk(index, delta)
    finally:
        _note(notes, answer)


async def _whole(answer: Answer, deltas: AsyncGenerator[tuple[int, Delta], None], notes: dict[str, object]) -> bytes:
    try:
        async with aclosing(deltas) as items:
            async for index, delta in items:
                answer.add(index, delta)
    finally:
        _note(notes, answer)
    return answer.whole()
