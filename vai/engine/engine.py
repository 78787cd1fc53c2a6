"""The engine: requests of all models in, one step at a time, outputs out. Synchronous, one thread, no sockets."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vai.engine import kinds, masks
from vai.engine.batch import Batch
from vai.engine.port import EngineStatus, ModelStatus, Switches
from vai.engine.runner import Runner
from vai.engine.scheduler import Scheduler
from vai.engine.select import Bank, Entry
from vai.engine.sequence import Sequence
from vai.errors import BadRequest, ContextTooLong, Interrupted, ModelNotFound, NotEnoughRoom, VaiError
from vai.kernels import table
from vai.kernels.program import MAX_ROWS, MAX_SEQUENCES
from vai.request import MAX_GUESSES, MAX_PRIORITY, MAX_RETAIN, MAX_SALT, MAX_SESSION, Output, Request, SamplingParams
from vai.scratchpad.budget import bytes_that_hold, pages_at_once, tokens_that_fit
from vai.scratchpad.pages import PagePool
from vai.scratchpad.retention import Name

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
        fast: str | None = None,
        kv_type: str = "bf16",
        backend: str = "native",
        max_rows: int = MAX_ROWS,
        max_sequences: int = MAX_SEQUENCES,
        mask_patience: float = masks.PATIENCE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`pool`: see scratchpad.pages.map_pool; the engine alone writes it. `isa`: force an instruction set.

        `fast`: what computes the pages of prompts in the fast kind, one of table.fasts(); None: all pages are exact.

        `max_rows`: of one step, at most MAX_ROWS.

        `mask_patience`: seconds that a constrained request waits for the mask of its next token before it ends.
        `clock`: seconds, which decide about turns, chunks, guesses and pins, never about tokens; the machine's, as
        the next engine over the same pool goes on with the pins.
        """
        self._began = time.perf_counter()
        for name, reason in [*table.refused(), *table.refused_fasts()]:
            log.warning("The %s kernels are not used, though the processor promises them: %s.", name, reason)
        self._threads = threads
        self._fast = fast
        self._kv_type = kv_type
        self._max_rows = max_rows
        self._arrivals = 0
        self._steps = 0
        self._pages = PagePool(pool)
        self._bank = Bank(
            root,
            workers=table.make_workers(threads, root / "run" / "cores.lock"),
            backend=backend,
            isa=isa,
            fast=fast,
            kv_type=kv_type,
            max_rows=max_rows,
            max_sequences=max_sequences,
        )
        self._clock = clock
        self._scheduler = Scheduler(self._pages, max_rows=max_rows, max_sequences=max_sequences, clock=clock)
        self._runner = Runner(pool)
        self._held = masks.Held(mask_patience)
        self._idle = False  # the last step brought nothing, and nothing has changed since

    def step(self) -> list[Output]:
        """Compute one step of one model, and say what happened since the last; [] where there was nothing to do.

        Rows whose masks have come are drawn from first, and said at once: the next masks depend on them.
        """
        self._draw_held()
        outputs = self._scheduler.take_outputs()
        if outputs:
            return outputs
        batch = self._scheduler.pick()
        if batch is not None:
            self._run(batch)
        outputs = self._scheduler.take_outputs()
        self._idle = batch is None and not outputs
        return outputs

    def has_work(self) -> bool:
        """Whether another step would bring anything."""
        return self._scheduler.has_work() and not self._idle

    def patience(self) -> float | None:
        """Seconds until a step brings something though nothing was asked for: the end of a request that waits too
        long for a mask. None where there is no such request.
        """
        return self._held.patience()

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs come from `step`.

        Raises ModelNotFound or CorruptImage where its image cannot be attached, BadRequest for values out of bounds,
        token ids that this model does not have or a request id in use, ContextTooLong or NotEnoughRoom for a prompt
        that can never fit, NotSupported where it was begun with fast pages that nothing here gives again, Overloaded
        where too many wait.
        """
        _check(request)
        came = self._clock()
        entry = self._bank.select(request.image)
        attach = self._clock() - came
        limit = self._limit(request, entry)
        kinds.check(request, entry.fast)
        draft = self._draft(request, entry)
        self._arrivals += 1
        self._idle = False
        now = self._clock()
        sequence = Sequence(request, entry, arrival=self._arrivals, limit=limit, now=now, draft=draft, attach=attach)
        self._scheduler.add(sequence)
        self._held.expect(sequence)

    def abort(self, identity: str) -> None:
        """End a request with reason "abort". One that is not there (any more) is fine."""
        self._idle = False
        self._scheduler.abort(identity)

    def mask(self, identity: str, position: int, bits: bytes) -> None:
        """The mask of the token at `position` of a constrained request (see port.Mask).

        One for another place than the next is forgotten. One that allows nothing ends the request.
        """
        sequence = self._scheduler.find(identity)
        if sequence is None or not sequence.request.constrained or position != len(sequence.tokens):
            return
        self._idle = False
        wrong = masks.check(bits, sequence.entry.program.vocabulary)
        if wrong is not None:
            self._scheduler.end(sequence, wrong)
        else:
            sequence.mask = bits
            self._held.arrived(sequence)
            self._scheduler.wake(sequence)

    def attach(self, image: str) -> None:
        """Attach an image before its first request. Raises ModelNotFound, CorruptImage, WrongVersion."""
        self._bank.select(image)

    def adopt(self) -> None:
        """Take over the pages that an engine before this one left in the pool, as far as they are of attached images,
        with their pins and what was learned of pauses.

        Before the first request.
        """
        self._scheduler.cache.adopt([entry.owners for entry in self._bank.entries()])

    def end_session(self, session: str, cache_salt: str) -> int:
        """Free the pages that only the conversations of a session have read; how many. Unknown ones are fine."""
        return self._scheduler.cache.end(Name(cache_salt, session))

    def release(self, image: str) -> None:
        """Abort every request of an image, give back its pages and its lease. One that is not attached is fine."""
        self._idle = False
        self._scheduler.forget(image)
        self._scheduler.cache.forget(image)
        self._bank.release(image)

    def status(self) -> EngineStatus:
        """The engine at this moment."""
        return EngineStatus(
            pid=os.getpid(),
            device="cpu",
            isa=self._bank.isa,
            threads=self._threads,
            uptime=time.perf_counter() - self._began,
            steps=self._steps,
            native_seconds=self._runner.native.wall,
            host_seconds=self._runner.native.host_seconds(),
            pool_bytes=self._pages.size,
            pool_used=self._pages.used_bytes,
            pool_cached=self._pages.cached_bytes,
            pool_free=self._pages.free_bytes,
            pool_pinned=self._scheduler.retention.pinned_bytes,
            adopted_pages=self._scheduler.cache.adopted,
            kv_type=self._kv_type,
            fast=self._fast,
            models=[self._model_status(entry) for entry in self._bank.entries()],
        )

    def switches(self) -> Switches:
        """Times from pick to native call since the last call of this."""
        return self._runner.take_switches()

    def close(self) -> None:
        """Abort every request and release every image. What is cached in the pool stays for the next engine."""
        for digest in [entry.digest for entry in self._bank.entries()]:
            self._scheduler.forget(digest)
            self._bank.release(digest)
        self._pages.headers.close()

    def _run(self, batch: Batch) -> None:
        """Forward, sample, commit. A step that fails ends the requests in it, not the engine."""
        try:
            draws = self._held.draw(batch.places, self._runner.forward(batch), self._runner.native)
        except Exception as error:
            log.exception("a step of %s failed", batch.entry.digest)
            self._scheduler.fail(batch, VaiError(f"The engine failed in a step of this request: {error!r}."))
            return
        self._steps += 1
        self._scheduler.commit(batch, draws)

    def _draw_held(self) -> None:
        for places, logits in self._held.take():
            self._scheduler.take(places, self._held.draw(places, logits, self._runner.native))
        self._held.forget(lambda sequence: self._scheduler.find(sequence.request.id) is sequence)
        for sequence in self._held.slow():
            self._scheduler.suspend(sequence)
        for sequence in self._held.overdue():
            self._scheduler.end(sequence, Interrupted("The mask of the next token did not come in time."))

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
        at_once = [pages_at_once(group.window, 1) for group in program.groups]
        room = tokens_that_fit(self._pages.size, entry.owners, at_once)
        if room is not None and prompt >= room:
            least = bytes_that_hold(prompt + 1, entry.owners, at_once)
            raise NotEnoughRoom(
                f"The prompt has {prompt} tokens, but the scratchpad of {self._pages.size} bytes holds {room} of this "
                "model, answer included. Send a shorter prompt, or start VAI with a scratchpad of at least "
                f"{least >> 20} MiB (VAI_KV={least >> 20}M)."
            )
        longest = program.context if room is None else min(program.context, room)
        return min(prompt + answer, longest)

    def _draft(self, request: Request, entry: Entry) -> Entry | None:
        """The model that guesses for a request. Raises ModelNotFound, BadRequest for one of another vocabulary."""
        image = request.speculate.draft
        if (request.speculate.kind == "draft") != (image is not None):
            raise BadRequest("Guesses of kind 'draft', and no others, need the digest of a draft model.", param="draft")
        if image is None:
            return None
        try:
            draft = self._bank.select(image)
        except ModelNotFound:
            if request.emitted:  # it was there when the answer began, which must not end for that
                return None
            raise
        if draft.program.vocabulary != entry.program.vocabulary:
            raise BadRequest(
                f"The draft model {image[:12]} has {draft.program.vocabulary} tokens, the model "
                f"{entry.program.vocabulary}: guesses of the one mean nothing to the other. Choose a smaller model of "
                "the same family, or none.",
                param="draft",
            )
        return draft

    def _model_status(self, entry: Entry) -> ModelStatus:
        running, waiting, tokens, preemptions = self._scheduler.counts(entry.digest)
        tally, prompts = self._scheduler.tally(entry.digest), self._scheduler.prompts(entry.digest)
        return ModelStatus(
            image=entry.digest,
            running=running,
            waiting=waiting,
            pages=self._pages.held(entry.digest),
            tokens=tokens,
            preemptions=preemptions,
            guessed=tally.guessed,
            accepted=tally.accepted,
            attach_seconds=entry.attach_seconds,
            workspace_bytes=entry.workspace_bytes,
            prompt_exact=prompts.exact,
            prompt_fast=prompts.fast,
            cached_exact=prompts.cached_exact,
            cached_fast=prompts.cached_fast,
        )


def _check(request: Request) -> None:
    """The bounds of the types, which only decoding enforces: a caller in this process may have set anything."""
    if not request.tokens:
        raise BadRequest("The prompt is empty; it needs at least one token.", param="tokens")
    try:
        msgspec.convert(msgspec.to_builtins(request.sampling), SamplingParams)
    except msgspec.ValidationError as error:
        raise BadRequest(f"These sampling parameters cannot be used: {error}.") from None
    if not 1 <= request.speculate.max_tokens <= MAX_GUESSES:
        raise BadRequest(f"At most {MAX_GUESSES} tokens are guessed at a time, and at least 1.", param="max_tokens")
    if len(request.cache_salt) > MAX_SALT:
        raise BadRequest(f"A cache salt has at most {MAX_SALT} characters.", param="cache_salt")
    if len(request.session) > MAX_SESSION:
        raise BadRequest(f"A session id has at most {MAX_SESSION} characters.", param="session_id")
    if request.retain is not None and not 0 <= request.retain <= MAX_RETAIN:
        raise BadRequest(f"Pages are kept for 0 to {MAX_RETAIN} seconds.", param="cache_control")
    if not -MAX_PRIORITY <= request.priority < MAX_PRIORITY:
        raise BadRequest(f"A priority is a number from {-MAX_PRIORITY} to {MAX_PRIORITY - 1}.", param="priority")
    if not 0 <= request.emitted < min(len(request.tokens), request.sampling.max_tokens):
        raise BadRequest(
            f"Of {len(request.tokens)} tokens, {request.emitted} cannot be an answer of at most "
            f"{request.sampling.max_tokens} that is not complete.",
            param="emitted",
        )
