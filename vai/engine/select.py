"""Context select: from a digest to everything a step of that model needs.

The first selection of an image attaches it and lowers its Program, milliseconds each; every later one is a lookup. The
first large one after the machine's start also measures which kernels are the fastest there, two thirds of a second.
Here the two memories meet: weights that never change, and the pages that every step rewrites.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vai.engine.fingerprint import fingerprint
from vai.kernels import table, tuning
from vai.kernels.program import Plan, Program
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom import segment
from vai.rom.view import Image
from vai.scratchpad.pages import Owner


class StandIn:
    """A second plan of a model, for what the first cannot do: lowered when it is first needed, which it rarely is."""

    def __init__(self, lower: Callable[[], Plan]) -> None:
        self._lower = lower
        self._plan: Plan | None = None

    def plan(self) -> Plan:
        """The plan. Raises what table.lower does."""
        if self._plan is None:
            self._plan = self._lower()
        return self._plan

    @property
    def workspace_bytes(self) -> int:
        """0 until it is needed."""
        return 0 if self._plan is None else self._plan.workspace_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One attached model. `owners`: in whose name its cache groups hold pages, in the Program's order.

    `weights`: the id that its pages' keys begin with. `fingerprint`: what its answers' bits depend on. `workers`: the
    threads that draw its tokens; None: the caller's. `fast`: what computes its fast pages; None: it has none. Those of
    answers that another engine began are then computed by `stand_in`.
    """

    digest: str
    program: Program
    plan: Plan
    owners: tuple[Owner, ...]
    attach_seconds: float
    weights: str
    fingerprint: str = ""
    workers: table.Workers | None = None
    fast: str | None = None
    stand_in: StandIn | None = None

    @property
    def fast_plan(self) -> Plan:
        """What computes steps of the fast kind."""
        return self.plan if self.stand_in is None else self.stand_in.plan()

    @property
    def workspace_bytes(self) -> int:
        """What steps need beside weights and pages."""
        return self.plan.workspace_bytes + (0 if self.stand_in is None else self.stand_in.workspace_bytes)


class Bank:
    """The attached models of one engine, all lowered for the same thread pool, KV type and step size."""

    def __init__(
        self,
        root: Path,
        *,
        workers: table.Workers,
        backend: str,
        isa: str | None,
        fast: str | None,
        kv_type: str,
        max_rows: int,
        max_sequences: int,
    ) -> None:
        self._root = root
        self._workers = workers
        self._backend = backend
        self._isa = isa
        self.isa = isa or table.isa()  # what the last image was lowered for
        self._fast = fast
        self._kv_type = kv_type
        self._max_rows = max_rows
        self._max_sequences = max_sequences
        self._entries: dict[str, tuple[Entry, Image]] = {}

    def select(self, digest: str) -> Entry:
        """The entry of an image, attached now if it was not. Raises ModelNotFound, CorruptImage, WrongVersion."""
        found = self._entries.get(digest)
        return found[0] if found is not None else self._attach(digest)

    def release(self, digest: str) -> None:
        """Let go of an image and its lease. Nobody may hold its entry any more. Unknown digests are fine."""
        found = self._entries.pop(digest, None)
        if found is not None:
            image = found[1]
            del found  # the plan reads the mapping: it goes first
            image.close()

    def entries(self) -> list[Entry]:
        """Every attached model, in order of attachment."""
        return [entry for entry, _ in self._entries.values()]

    def _attach(self, digest: str) -> Entry:
        began = time.perf_counter()
        image = segment.attach(self._root, digest)
        try:
            program = build(Spec.from_bytes(image.spec))
            if self._backend == "native":
                self.isa = tuning.tune(self._workers, image.data, self._root / "run", isa=self._isa)
            lower = partial(
                table.lower,
                program,
                image,
                backend=self._backend,
                kv_type=self._kv_type,
                max_rows=self._max_rows,
                max_sequences=self._max_sequences,
                workers=self._workers,
                isa=self.isa,
            )
            plan = lower(fast=self._fast)
        except BaseException:
            image.close()
            raise
        owners = tuple(
            Owner(digest, group, shape.page_bytes(self._kv_type)) for group, shape in enumerate(program.groups)
        )
        name = fingerprint(image.weights, program, self._kv_type)
        seconds = time.perf_counter() - began
        stand_in = StandIn(partial(lower, fast=table.PORTABLE_FAST)) if plan.fast is None else None
        entry = Entry(
            digest,
            program,
            plan,
            owners,
            seconds,
            image.weights,
            name,
            workers=self._workers,
            fast=plan.fast,
            stand_in=stand_in,
        )
        self._entries[digest] = (entry, image)
        return entry
