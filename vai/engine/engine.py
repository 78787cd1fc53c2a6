"""The engine: requests of all models in, one step at a time, outputs out. Synchronous, one thread, no sockets."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Batch
from vai.engine.port import EngineStatus, ModelStatus, Switches
from vai.engine.runner import Runner
from vai.engine.sampler import sample
from vai.engine.scheduler import Scheduler
from vai.engine.select import Bank, Entry
from vai.engine.sequence import Sequence
from vai.errors import BadRequest, ContextTooLong, NotEnoughRoom, VaiError
from vai.kernels import table
from vai.kernels.program import MAX_ROWS, MAX_SEQUENCES
from vai.request import MAX_SALT, Output, Request, SamplingParams
from vai.scratchpad.budget import tokens_that_fit
from vai.scratchpad.pages import PagePool

log = logging.getLogger(__name__)


class Engine:
    """Runs every model of `root` over one pool of pages. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        root: Path,
        *,
        threads: int,
        pool: NDArray[np.uint8],
        isa: str | None = None,
        kv_type: str = "bf16",
        backend: str = "native",
        max_rows: int = MAX_ROWS,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """`pool`: see scratchpad.pages.map_pool; the engine alone writes it. `isa`: force a lower instruction set."""
        self._began = time.perf_counter()
        self._threads = threads
        self._isa = isa
        self._arrivals = 0
        self._steps = 0
        self._pages = PagePool(pool.nbytes)
        self._bank = Bank(
            root,
            workers=table.make_workers(threads),
            backend=backend,
            isa=isa,
            kv_type=kv_type,
            max_rows=max_rows,
            max_sequences=max_sequences,
        )
        self._scheduler = Scheduler(self._pages, max_rows=max_rows, max_sequences=max_sequences)
        self._runner = Runner(pool)

    def step(self) -> list[Output]:
        """Compute one step of one model, and say what happened since the last; [] where there was nothing to do."""
        batch = self._scheduler.pick()
        if batch is not None:
            self._run(batch)
        return self._scheduler.take_outputs()

    def has_work(self) -> bool:
        """Whether another step would bring anything."""
        return self._scheduler.has_work()

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs come from `step`.

        Raises ModelNotFound or CorruptImage where its image cannot be attached, BadRequest for values out of bounds,
        token ids that this model does not have or a request id in use, ContextTooLong or NotEnoughRoom for a prompt
        that can never fit, Overloaded where too many wait.
        """
        _check(request)
        entry = self._bank.select(request.image)
        limit = self._limit(request, entry)
        self._arrivals += 1
        self._scheduler.add(Sequence(request, entry, arrival=self._arrivals, limit=limit, now=time.perf_counter()))

    def abort(self, identity: str) -> None:
        """End a request with reason "abort". One that is not there (any more) is fine."""
        self._scheduler.abort(identity)

    def attach(self, image: str) -> None:
        """Attach an image before its first request. Raises ModelNotFound, CorruptImage, WrongVersion."""
        self._bank.select(image)

    def release(self, image: str) -> None:
        """Abort every request of an image, give back its pages and its lease. One that is not attached is fine."""
        self._scheduler.forget(image)
        self._bank.release(image)

    def status(self) -> EngineStatus:
        """The engine at this moment."""
        return EngineStatus(
            pid=os.getpid(),
            device="cpu",
            isa=self._isa or table.isa(),
            threads=self._threads,
            uptime=time.perf_counter() - self._began,
            steps=self._steps,
            pool_bytes=self._pages.size,
            pool_used=self._pages.used_bytes,
            pool_cached=self._pages.cached_bytes,
            pool_free=self._pages.free_bytes,
            models=[self._model_status(entry) for entry in self._bank.entries()],
        )

    def switches(self) -> Switches:
        """Times from pick to native call since the last call of this."""
        return self._runner.take_switches()

    def close(self) -> None:
        """Release every image."""
        for digest in [entry.digest for entry in self._bank.entries()]:
            self.release(digest)

    def _run(self, batch: Batch) -> None:
        """Forward, sample, commit. A step that fails ends the requests in it, not the engine."""
        try:
            draws = sample(batch, self._runner.forward(batch))
        except Exception as error:
            log.exception("a step of %s failed", batch.entry.digest)
            self._scheduler.fail(batch, VaiError(f"The engine failed in a step of this request: {error!r}."))
            return
        self._steps += 1
        self._scheduler.commit(batch, draws)

    def _limit(self, request: Request, entry: Entry) -> int:
        """Tokens that prompt and answer may have together; raises where not even the first answer token fits."""
        program, prompt = entry.program, len(request.tokens)
        answer = request.sampling.max_tokens - request.emitted
        for wrong in (min(request.tokens), max(request.tokens)):
            if not 0 <= wrong < program.vocabulary:
                raise BadRequest(
                    f"Token id {wrong} does not exist: this model has the ids 0 to {program.vocabulary - 1}.",
                    param="tokens",
                )
        unknown = [id for id in request.sampling.logit_bias if id >= program.vocabulary]
        if unknown:
            raise BadRequest(
                f"Token id {unknown[0]} has a bias but does not exist: this model has the ids 0 to "
                f"{program.vocabulary - 1}.",
                param="logit_bias",
            )
        if prompt >= program.context:
            raise ContextTooLong(
                f"The prompt has {prompt} tokens, but this model's context holds {program.context}, answer included. "
                "Send a shorter prompt.",
                param="tokens",
            )
        room = tokens_that_fit(self._pages.size, entry.owners)
        if room is not None and prompt >= room:
            raise NotEnoughRoom(
                f"The prompt has {prompt} tokens, but the scratchpad of {self._pages.size} bytes holds {room} of this "
                "model, answer included. Send a shorter prompt, or start VAI with a larger scratchpad (VAI_KV)."
            )
        longest = program.context if room is None else min(program.context, room)
        return min(prompt + answer, longest)

    def _model_status(self, entry: Entry) -> ModelStatus:
        running, waiting, tokens = self._scheduler.counts(entry.digest)
        return ModelStatus(
            image=entry.digest,
            running=running,
            waiting=waiting,
            pages=self._pages.held(entry.digest),
            tokens=tokens,
            attach_seconds=entry.attach_seconds,
            workspace_bytes=entry.plan.workspace_bytes,
        )


def _check(request: Request) -> None:
    """The bounds of the types, which only decoding enforces: a caller in this process may have set anything."""
    if not request.tokens:
        raise BadRequest("The prompt is empty; it needs at least one token.", param="tokens")
    try:
        msgspec.convert(msgspec.to_builtins(request.sampling), SamplingParams)
    except msgspec.ValidationError as error:
        raise BadRequest(f"These sampling parameters cannot be used: {error}.") from None
    if len(request.cache_salt) > MAX_SALT:
        raise BadRequest(f"A cache salt has at most {MAX_SALT} characters.", param="cache_salt")
    if not 0 <= request.emitted < min(len(request.tokens), request.sampling.max_tokens):
        raise BadRequest(
            f"Of {len(request.tokens)} tokens, {request.emitted} cannot be an answer of at most "
            f"{request.sampling.max_tokens} that is not complete.",
            param="emitted",
        )
