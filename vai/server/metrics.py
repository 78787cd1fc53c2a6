"""`GET /metrics`: what Prometheus reads. Under vLLM's names where they mean the same, so that its dashboards work.

Counters and histograms are what this server saw happen; gauges are asked of the engine and of the files at each scrape.
One answer to one prompt (a choice) is one request here, as it is for the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vai.errors import Overloaded, Unavailable, VaiError
from vai.rom.holders import holders
from vai.rom.room import free_room

if TYPE_CHECKING:
    from vai.llm import Delta, Frontend
    from vai.telemetry import Stages

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
ENGINE_SECONDS = 2.0  # an engine that says nothing this long is reported as away

# vLLM's buckets: histograms of other servers can be laid beside ours.
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_STAGE = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 5, 10, 60, 600)
_SWITCH = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1, 1)

_MODEL = ("model_name",)
_KIND = (*_MODEL, "kind")

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asked for


class _ModelStatus(Protocol):
    @property
    def image(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prompt_exact(self) -> int: ...
    @property
    def prompt_fast(self) -> int: ...
    @property
    def cached_exact(self) -> int: ...
    @property
    def cached_fast(self) -> int: ...


class _Status(Protocol):
    @property
    def pid(self) -> int: ...
    @property
    def pool_bytes(self) -> int: ...
    @property
    def pool_used(self) -> int: ...
    @property
    def pool_cached(self) -> int: ...
    @property
    def pool_pinned(self) -> int: ...
    @property
    def adopted_pages(self) -> int: ...
    @property
    def native_seconds(self) -> float: ...
    @property
    def host_seconds(self) -> float: ...
    @property
    def models(self) -> Iterable[_ModelStatus]: ...


class _Switches(Protocol):
    @property
    def switched(self) -> list[float]: ...


class Engine(Protocol):
    """What metrics ask of the engine's port."""

    async def status(self) -> _Status: ...

    async def switches(self) -> _Switches: ...

    async def end_session(self, session: str, cache_salt: str) -> int: ...


class _Image(NamedTuple):
    model: str
    bytes: int
    leases: int


class Metrics:
    """Everything this server counts, in a registry of its own."""

    def __init__(self, root: Path, frontend: Frontend, engine: Engine) -> None:
        self._root = root
        self._frontend = frontend
        self._engine = engine
        self._registry = CollectorRegistry()
        self._prompt = self._counter("prompt_tokens", "Tokens of the prompts.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hit = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._drafts = self._counter("spec_decode_num_drafts", "Steps of a request that verified guessed tokens.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Guessed tokens that were verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that stood.")
        self._rejected = self._counter("admission_rejections", "Requests refused because too many waited.")
        self._ended = self._counter(
            "request_success", "Requests that ended, by how: stop, length, abort or error.", "finished_reason"
        )
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token.", _FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.", _BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to last token.", _WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting in the engine.", _WHOLE)
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt.", _WHOLE)
        self._decode = self._histogram("request_decode_time_seconds", "From first to last token.", _WHOLE)
        self._inference = self._histogram("request_inference_time_seconds", "Computing prompt and answer.", _WHOLE)
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "From one token to the next, on the mean of an answer.", _BETWEEN
        )
        self._stage = Histogram(
            "vai_request_stage_seconds",
            "What each stage of an HTTP request took; vai/telemetry.py says what they are.",
            (*_MODEL, "stage"),
            registry=self._registry,
            buckets=_STAGE,
        )
        self._prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_length = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._switch = Histogram(
            "vai_model_switch_seconds",
            "From the pick of another model than the last step's to the native call.",
            registry=self._registry,
            buckets=_SWITCH,
        )

    async def watch(
        self, model: str, prompt_tokens: int, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[Delta, None]:
        """The same deltas, counted as they pass. Left early, the request counts as aborted."""
        began = last = time.monotonic()
        made, finish, end = 0, "abort", None
        between, generated = self._between.labels(model), self._generated.labels(model)  # a lookup costs a lock
        try:
            async with aclosing(deltas) as items:
                async for delta in items:
                    now, new = time.monotonic(), len(delta.token_ids)
                    if new and not made:  # the prompt is computed
                        self._prompt.labels(model).inc(prompt_tokens)
                        self._queried.labels(model).inc(prompt_tokens)
                        self._hit.labels(model).inc(delta.cached_tokens)
                        self._first.labels(model).observe(now - began)
                    elif new:
                        between.observe((now - last) / new)
                    if delta.guessed:
                        self._drafts.labels(model).inc()
                        self._drafted.labels(model).inc(delta.guessed)
                        self._accepted.labels(model).inc(delta.accepted)
                    if new:
                        generated.inc(new)
                        made, last = made + new, now
                    if delta.finish is not None:
                        finish = "stop" if delta.finish == "tool_calls" else delta.finish  # the engine's word
                        end = delta
                    yield delta
        except VaiError as error:
            finish = "error"
            if isinstance(error, Overloaded):
                self._rejected.labels(model).inc()
            raise
        finally:
            self._ended.labels(model, finish).inc()
            if end is not None:
                self._complete(model, prompt_tokens, made, end, last - began)

    def _complete(self, model: str, prompt_tokens: int, made: int, end: Delta, seconds: float) -> None:
        """What is known of a request that came to its end."""
        self._prompt_length.labels(model).observe(prompt_tokens)
        self._answer_length.labels(model).observe(made)
        self._whole.labels(model).observe(seconds)
        if end.timing is not None:
            self._queue.labels(model).observe(end.timing.queued)
            self._prefill.labels(model).observe(end.timing.prefill)
            self._decode.labels(model).observe(end.timing.decode)
            self._inference.labels(model).observe(end.timing.prefill + end.timing.decode)
            if made > 1:
                self._token.labels(model).observe(end.timing.decode / (made - 1))

    def staged(self, model: str, stages: Stages) -> None:
        """What an HTTP request took that came to its end."""
        for stage in ("loader", "preprocessor", "queue", "core", "postprocessor"):
            self._stage.labels(model, stage).observe(getattr(stages, stage))

    async def page(self) -> bytes:
        """All of it in the text format. Answers while the engine is away, then without what only that knows."""
        names: dict[str, str] = {}
        for card in self._frontend.models():
            if card.digest:
                names.setdefault(card.digest, card.name)
        status = None
        try:
            async with asyncio.timeout(ENGINE_SECONDS):
                status = await self._engine.status()
                for seconds in (await self._engine.switches()).switched:
                    self._switch.observe(seconds)
        except (Unavailable, TimeoutError):
            pass
        images, free = await asyncio.to_thread(_files, self._root, names)
        gauges = [*_of_engine(status, names), *_of_files(images, free)]
        return generate_latest(self._registry) + generate_latest(_Once(gauges))

    def _counter(self, name: str, help: str, *more: str) -> Counter:
        return Counter(f"vllm:{name}", help, (*_MODEL, *more), registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", help, _MODEL, registry=self._registry, buckets=buckets)


class _Once(Collector):
    """Gauges of one scrape."""

    def __init__(self, gauges: list[Metric]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        return self._gauges


def _of_engine(status: _Status | None, names: dict[str, str]) -> list[Metric]:
    """What the engine says of itself. The pool is one for all models, so its share is the same for each."""
    up = GaugeMetricFamily("vai_engine_up", "Whether the engine answers.", value=float(status is not None))
    if status is None:
        return [up]
    running = GaugeMetricFamily("vllm:num_requests_running", "Requests being computed.", labels=_MODEL)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for the engine.", labels=_MODEL)
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the scratchpad in use; 1 is all.", labels=_MODEL)
    preempted = CounterMetricFamily(
        "vllm:num_preemptions", "Times that a running request gave its pages up.", labels=_MODEL
    )
    computed = CounterMetricFamily(
        "vai_prompt_tokens_computed",
        "Tokens of prompts that the engine computed, by the kind of arithmetic; after a preemption again.",
        labels=_KIND,
    )
    cached = CounterMetricFamily(
        "vai_prompt_tokens_cached",
        "Tokens that requests found in the cache, by the kind of their pages.",
        labels=_KIND,
    )
    for model in status.models:
        label = [names.get(model.image, model.image[:12])]
        running.add_metric(label, model.running)
        waiting.add_metric(label, model.waiting)
        usage.add_metric(label, status.pool_used / status.pool_bytes)
        preempted.add_metric(label, model.preemptions)
        computed.add_metric([*label, "exact"], model.prompt_exact)
        computed.add_metric([*label, "fast"], model.prompt_fast)
        cached.add_metric([*label, "exact"], model.cached_exact)
        cached.add_metric([*label, "fast"], model.cached_fast)
    native = CounterMetricFamily(
        "vai_engine_native_seconds", "Time the engine spent computing.", value=status.native_seconds
    )
    host = CounterMetricFamily(
        "vai_engine_host_cpu_seconds", "CPU time of the engine beside computing.", value=status.host_seconds
    )
    pool = [
        GaugeMetricFamily("vai_kv_cached_bytes", "Scratchpad that the prefix cache keeps.", value=status.pool_cached),
        GaugeMetricFamily("vai_kv_pinned_bytes", "Scratchpad kept at a client's wish.", value=status.pool_pinned),
        GaugeMetricFamily(
            "vai_kv_adopted_pages", "Cached pages taken over from the engine before.", value=status.adopted_pages
        ),
    ]
    return [up, running, waiting, usage, preempted, computed, cached, native, host, *pool]


def _files(root: Path, names: dict[str, str]) -> tuple[list[_Image], int]:
    """The images in memory, those without a name under their first digits, and the bytes that another may take."""
    images = []
    for path in sorted((root / "images").glob("*.rom")):
        try:
            count = path.stat().st_size
        except FileNotFoundError:
            continue  # removed meanwhile
        images.append(_Image(names.get(path.stem, path.stem[:12]), count, len(holders(path))))
    return images, free_room(root).free


def _of_files(images: list[_Image], free: int) -> list[Metric]:
    size = GaugeMetricFamily("vai_rom_bytes", "Bytes of a model's image in shared memory.", labels=("model",))
    leases = GaugeMetricFamily("vai_rom_leases", "Processes that use a model's image.", labels=("model",))
    for image in images:
        size.add_metric([image.model], image.bytes)
        leases.add_metric([image.model], image.leases)
    return [size, leases, GaugeMetricFamily("vai_shm_free_bytes", "Bytes another image may take.", value=free)]
