"""The routes: the OpenAI API over the models that `vai.llm.Frontend` serves, and the health of it all.

Nothing here touches weights. `/v1/models` reads the registry alone and answers while the engine is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from vai.daemon import protocol as daemon
from vai.errors import BadRequest, ModelNotFound, Unavailable, VaiError
from vai.request import MAX_SALT, MAX_SESSION, SamplingParams
from vai.server import schema
from vai.server.caching import SessionEnded
from vai.server.guard import Guard, Hosts, error_response, read_body, status_phrase
from vai.server.metrics import TEXT_FORMAT, Engine, Metrics
from vai.server.render import Answer, ChatAnswer, TextAnswer
from vai.server.stream import EventStream, interleave, until_gone
from vai.server.structured import grammar_of
from vai.telemetry import Stopwatch

if TYPE_CHECKING:
    from vai.llm import Delta, Frontend, Model, Reading

HEALTH_SECONDS = 4.0  # an engine that says nothing this long is not healthy
COMPLETION_TOKENS = 16  # `max_tokens` of /v1/completions where the client names none, as in OpenAI's


class Routes:
    """All endpoints. One per process, on one event loop."""

    def __init__(
        self, frontend: Frontend, engine: Engine, root: Path, daemon_socket: Path | None, deterministic: bool
    ) -> None:
        self._deterministic = deterministic  # what requests are that do not say
        self._frontend = frontend
        self._engine = engine
        self._metrics = Metrics(root, frontend, engine)
        self._daemon_socket = daemon_socket
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._proofs: dict[int, asyncio.Task[None]] = {}  # by pid of the engine: that it has decoded a token

    def app(self) -> ASGIApp:
        """The routes as an application with OpenAI error bodies."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/sessions/{session:path}", self.end_session, methods=["DELETE"]),
            Route("/health", self.health),
            Route("/readyz", self.health),
            Route("/livez", self.live),
            Route("/version", self.version),
            Route("/metrics", self.metrics),
        ]
        # Without Starlette's outer application: its last layer answers a bug before the guard can.
        return ExceptionMiddleware(
            Router(routes, redirect_slashes=False), {VaiError: _refused, HTTPException: _refused}
        )

    # -- models and health -----------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json(schema.ModelList(_entries(self._frontend)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        entries = _entries(self._frontend)
        for entry in entries:
            if entry.id == name:
                return _json(entry)
        known = ", ".join(entry.id for entry in entries) or "none; load one: vai load FILE"
        raise ModelNotFound(f"There is no model '{name[:128]}'. Models here: {known}.", param="model")

    async def end_session(self, request: Request) -> Response:
        """Free what only this session has read. `cache_salt`, as in its requests, stands in the query."""
        session, salt = request.path_params["session"], request.query_params.get("cache_salt", "")
        if len(session) > MAX_SESSION or len(salt) > MAX_SALT:
            raise BadRequest(f"A session id has at most {MAX_SESSION} characters, a salt {MAX_SALT}.")
        return _json(SessionEnded(session, await self._engine.end_session(session, salt)))

    async def live(self, request: Request) -> Response:
        """The event loop answers."""
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return _json({"version": metadata.version("vai")})

    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads."""
        return Response(await self._metrics.page(), media_type=TEXT_FORMAT)

    async def health(self, request: Request) -> Response:
        """200 when a model is resident and the engine answers and has been seen to decode, else 503 with the reason."""
        resident = [card.name for card in self._frontend.models() if card.resident]
        if not resident:
            raise Unavailable("No model is resident, so none can answer. Load one: vai load FILE")
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._proof((await self._engine.status()).pid, resident[0])
        except TimeoutError:
            raise Unavailable(f"The engine did not answer within {HEALTH_SECONDS:g} s.") from None
        return _json({"status": "ok"})

    async def _proof(self, pid: int, name: str) -> None:
        """Returns once the engine `pid` has decoded a token. The proof goes on if its asker stops waiting."""
        proof = self._proofs.get(pid)
        if proof is None or (proof.done() and proof.exception() is not None):
            proof = asyncio.ensure_future(self._decode_one(name))
            self._proofs = {pid: proof}
        await asyncio.shield(proof)

    async def _decode_one(self, name: str) -> None:
        model = await self._frontend.open(name)
        async with aclosing(model.stream([0], SamplingParams(temperature=0, max_tokens=1), [])) as deltas:
            async for _ in deltas:
                pass

    # -- generation ------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response | EventStream:
        body, watch = await read_body(request.scope, request.receive), Stopwatch()
        with watch.preparing():
            asked = schema.decode_chat(body)
            messages = schema.plain_messages(asked.messages)
            tools, variables = schema.tools_of(asked), schema.variables_of(asked)
        with watch.loading():
            model = await self._open(asked.model)
        with watch.preparing():
            ids, reading = await model.chat(messages, tools, grammar_of(asked), variables)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = _sampling(asked, model, asked.max_completion_tokens or asked.max_tokens, logprobs)
        return await self._respond(request, watch, asked, model, [ids], sampling, ChatAnswer, reading=reading)

    async def completions(self, request: Request) -> Response | EventStream:
        body, watch = await read_body(request.scope, request.receive), Stopwatch()
        with watch.preparing():
            asked = schema.decode_completion(body)
            given = schema.prompts(asked)
        with watch.loading():
            model = await self._open(asked.model)
        with watch.preparing():
            prompts = [await model.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
        sampling = _sampling(asked, model, asked.max_tokens or COMPLETION_TOKENS, asked.logprobs)
        echo = [text if isinstance(text, str) else model.decode(text) for text in given] if asked.echo else ()
        return await self._respond(request, watch, asked, model, prompts, sampling, TextAnswer, echo)

    async def _respond(
        self,
        request: Request,
        watch: Stopwatch,
        asked: schema.ChatRequest | schema.CompletionRequest,
        model: Model,
        prompts: list[list[int]],
        sampling: SamplingParams,
        kind: type[Answer],
        echo: Sequence[str] = (),
        reading: Reading | None = None,
    ) -> Response | EventStream:
        """Generate every choice for every prompt, and carry the answer to the client as it asked for it."""
        options, grammar, retain = asked.stream_options, grammar_of(asked), schema.retain(asked)
        answer = kind(
            model,
            [len(prompt) for prompt in prompts],
            n=asked.n or 1,
            logprobs=sampling.logprobs is not None,
            usage_chunk=bool(options and options.include_usage),
            stages=bool(asked.stages),
            watch=watch,
            echo=echo,
        )
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        speculate = model.speculate(schema.SPECULATION[asked.speculative_type], asked.speculative_n_max)
        deltas = interleave(
            [
                self._metrics.watch(answer.name, len(prompt), stream)
                for prompt in prompts
                for stream in model.choices(
                    prompt,
                    asked.n or 1,
                    sampling,
                    stop,
                    cache=asked.cache_prompt is not False,
                    cache_salt=asked.cache_salt or "",
                    session=asked.session_id or "",
                    retain=retain,
                    priority=asked.priority or 0,
                    speculate=speculate,
                    deterministic=self._deterministic if asked.deterministic is None else asked.deterministic,
                    reading=reading,
                    grammar=grammar,
                )
            ]
        )
        notes = request.scope["vai.notes"]
        if asked.stream:
            return EventStream(_frames(answer, deltas, notes, self._metrics))
        body = await until_gone(request.receive, _whole(answer, deltas, notes, self._metrics))
        return Response(body, media_type="application/json")

    async def _open(self, name: str) -> Model:
        """The model of this name, loaded by the daemon first where it is not resident.

        Raises ModelNotFound, Unavailable (with the way out) or NotEnoughRoom.
        """
        try:
            try:
                return await self._frontend.open(name)
            except Unavailable:
                absent = {card.name for card in self._frontend.models() if not card.resident}
                if name not in absent or self._daemon_socket is None:
                    raise
            await self._load(self._daemon_socket, name)
            return await self._frontend.open(name)
        except ModelNotFound as error:
            error.param = "model"
            raise

    async def _load(self, daemon_socket: Path, name: str) -> None:
        """Have the daemon make a model resident. Everybody who waits for one name waits for one load."""
        task = self._loading.get(name)
        if task is None:
            task = asyncio.ensure_future(_ask_to_load(daemon_socket, name))
            self._loading[name] = task
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        await asyncio.shield(task)


def build(
    frontend: Frontend,
    engine: Engine,
    *,
    root: Path,
    daemon_socket: Path | None,
    host: str,
    api_key: str | None,
    deterministic: bool = False,
) -> ASGIApp:
    """The whole server as one ASGI application: the guard around the routes. `host`: the address it is bound to.

    `deterministic`: what requests are that do not say.
    """
    routes = Routes(frontend, engine, root, daemon_socket, deterministic)
    return Guard(routes.app(), hosts=Hosts(host), api_key=api_key)


def _json(value: object) -> Response:
    return Response(schema.encode(value), media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """The answer for one of our errors, or one of the router's: an unknown path, a wrong method."""
    if isinstance(error, VaiError):
        return error_response(error)
    if not isinstance(error, HTTPException):
        raise error
    phrase = status_phrase(error.status_code)
    text = f"{request.method} {request.scope['path'][:200]}: {phrase}. The API is under /v1, as in OpenAI's."
    body = schema.error_body(text, kind="invalid_request_error", code=phrase.lower().replace(" ", "_"))
    headers = {**(error.headers or {}), "x-should-retry": "false"}
    return Response(body, error.status_code, headers, media_type="application/json")


def _entries(frontend: Frontend) -> list[schema.ModelEntry]:
    return [schema.ModelEntry(card.name, card.created, card.context or None) for card in frontend.models()]


async def _ask_to_load(socket: Path, name: str) -> None:
    """Returns when the daemon has loaded a model. On the loop, because a load can take minutes of a thread.

    Raises Unavailable where no daemon is, and what the load failed with.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        raise Unavailable(
            f"The model '{name}' is not resident, and no daemon is running that could load it. Start it: vai serve"
        ) from None
    try:
        writer.write(daemon.encode({"op": "load", "name": name}))
        answer = await daemon.read(reader)
    finally:
        writer.close()
    if answer is None:
        raise Unavailable(f"The daemon ended while it was loading '{name}'; `vai status` shows how it is.")
    daemon.unwrap(answer)


def _sampling(
    asked: schema.ChatRequest | schema.CompletionRequest, model: Model, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The engine's parameters: what the request says over what the model recommends. Raises BadRequest."""
    if max_tokens is not None and asked.min_tokens is not None and asked.min_tokens > max_tokens:
        raise BadRequest("'min_tokens' is over 'max_tokens'.", param="min_tokens")
    stop_ids = tuple(asked.stop_token_ids or ())
    sampling = model.sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=0 if asked.top_k == -1 else asked.top_k,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=asked.logit_bias,
        seed=asked.seed,
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        stop_ids=stop_ids,
        logprobs=logprobs,
    )
    return msgspec.structs.replace(sampling, stop_ids=stop_ids) if asked.ignore_eos else sampling


def _note(notes: dict[str, object], answer: Answer, metrics: Metrics) -> None:
    if answer.finished:
        metrics.staged(answer.name, answer.stages)
    notes.update(
        model=answer.name,
        prompt=answer.prompt_tokens,
        completion=answer.usage.completion_tokens,
        finish=answer.finish,
    )


async def _frames(
    answer: Answer,
    deltas: AsyncGenerator[tuple[int, Delta], None],
    notes: dict[str, object],
    metrics: Metrics,
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(deltas) as items:
            async for index, delta in items:
                began = time.perf_counter()
                chunk = answer.chunk(index, delta)
                answer.watch.postprocessor += time.perf_counter() - began
                yield chunk
    finally:
        _note(notes, answer, metrics)


async def _whole(
    answer: Answer,
    deltas: AsyncGenerator[tuple[int, Delta], None],
    notes: dict[str, object],
    metrics: Metrics,
) -> bytes:
    try:
        async with aclosing(deltas) as items:
            async for index, delta in items:
                began = time.perf_counter()
                answer.add(index, delta)
                answer.watch.postprocessor += time.perf_counter() - began
    finally:
        _note(notes, answer, metrics)
    return answer.whole()
