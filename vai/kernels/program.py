"""A model's forward pass as data: the Program, the arguments of one step, and what it keeps between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vai.kernels.ops import Op

PAGE_TOKENS = 32  # of one cache group; a constant, never tuned
KERNEL_ABI = 1  # part of every page's key: another number wherever the same tokens would fill a page with other bits
MAX_ROWS = 512  # of one step
MAX_SEQUENCES = 64  # of one model at once
ATTENTION_CHUNK = 1024  # tokens, counted from position 0
KV_TYPES = ("bf16", "f32", "q8_0")
KV_GROUP = 32  # elements of a head that share a scale in "q8_0"


def kv_bytes(kv_type: str, head_dim: int) -> int:
    """What the key, or the value, of one token takes under one KV head. Raises KeyError for no KV type."""
    scales = -(-head_dim // KV_GROUP)
    return {"bf16": 2 * head_dim, "f32": 4 * head_dim, "q8_0": head_dim + 2 * scales}[kv_type]


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose KV lives in the same pages: `layers` of them, each with planes K and V of kv_heads * head_dim.

    A page holds PAGE_TOKENS tokens of all layers. At offset layer * layer_bytes stands K as
    [kv_heads][PAGE_TOKENS / 16][head_dim][16 tokens], then V as [kv_heads][PAGE_TOKENS][head_dim]. "q8_0" has bytes of
    two's complement there, and each of these [head_dim][16 tokens] stands behind its scales, bfloat16, as
    [head_dim / KV_GROUP, rounded up][16 tokens], each [PAGE_TOKENS][head_dim] behind [PAGE_TOKENS][that many].
    `window`: tokens a query reads at most, its own the last; None for all.
    """

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def layer_bytes(self, kv_type: str) -> int:
        return 2 * PAGE_TOKENS * self.kv_heads * kv_bytes(kv_type, self.head_dim)

    def page_bytes(self, kv_type: str) -> int:
        return self.layers * self.layer_bytes(kv_type)


@dataclass(frozen=True, slots=True)
class Program:
    """Operations in order, what they keep (`groups`), and the named results a caller may ask for.

    `outputs` maps a public name ("logits") to a value. `constants` maps each logical tensor name to (rows, columns); a
    vector has (n, 1). `context` is the longest sequence, in tokens.
    """

    ops: tuple[Op, ...]
    groups: tuple[CacheGroup, ...]
    outputs: Mapping[str, str]
    constants: Mapping[str, tuple[int, int]]
    width: int
    vocabulary: int
    context: int


@dataclass(slots=True)  # not frozen: that would set seven fields one by one through a function, before every step
class StepArgs:
    """One step: M rows of S sequences of one model, flattened. All arrays C-contiguous.

    seq_start: sequence s owns rows [seq_start[s], seq_start[s+1]). context[s]: its tokens already in the cache before
    this step. positions[m]: absolute. block_tables[g][s, i]: byte offset in the pool of the page with tokens
    [32 i, 32 i + 32) of group g; entries past the sequence's last page, and those that its first row has behind the
    group's window, are not read. output_rows: indices into the M
    rows, ascending. kind: "exact", or "fast" where the plan has that; a fast step has no output rows.
    """

    tokens: NDArray[np.int32]  # [M]
    positions: NDArray[np.int32]  # [M]
    seq_start: NDArray[np.int32]  # [S + 1]
    context: NDArray[np.int32]  # [S]
    block_tables: tuple[NDArray[np.int64], ...]  # per group [S, pages]
    output_rows: NDArray[np.int32]  # [R]
    kind: str = "exact"

    @classmethod
    def alone(cls, rows: int, kind: str = "exact") -> StepArgs:
        """The first rows of one sequence, all of token 0, for a Program without cache groups: there to be timed."""
        zeros, none = np.zeros(rows, np.int32), np.zeros(0, np.int32)
        return cls(zeros, np.arange(rows, dtype=np.int32), np.array([0, rows], np.int32), zeros[:1], (), none, kind)


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes the logits of R rows before temperature, filters and greedy choice, but not the logprobs.

    Row r has the biases [bias_start[r], bias_start[r + 1]) and the tokens seen [seen_start[r], seen_start[r + 1]), the
    latter distinct: those of its prompt (where repetition is not 1) and of its answer, which has `made` of each. Every
    operation is binary32 and rounded, in this order:
      z = z + bias                                            for each bias
      z = z / repetition if z > 0 else z * repetition         for each token seen (Keskar et al., 2019)
      z = z - frequency * made;  z = z - presence             for each token seen with made > 0
    A bias may be -inf: that token is never drawn.
    """

    repetition: NDArray[np.float32]  # [R], as the next two
    presence: NDArray[np.float32]
    frequency: NDArray[np.float32]
    bias_start: NDArray[np.int64]  # [R + 1]
    bias_ids: NDArray[np.int32]
    biases: NDArray[np.float32]
    seen_start: NDArray[np.int64]  # [R + 1]
    seen_ids: NDArray[np.int32]
    made: NDArray[np.int32]

    @classmethod
    def neutral(cls, rows: int) -> Adjustments:
        """Those that change nothing."""
        zeros, starts, ids = np.zeros(rows, np.float32), np.zeros(rows + 1, np.int64), np.zeros(0, np.int32)
        return cls(np.ones(rows, np.float32), zeros, zeros, starts, ids, zeros[:0], starts, ids, ids)


@dataclass(frozen=True, slots=True)
class Masks:
    """What rows may draw. Row r draws under `bits[of[r]]`, or freely where `of[r]` is -1.

    Bit i % 8 of byte i // 8 is set for a token that may be drawn. The logits of all others are -inf for temperature,
    filters and greedy choice (a NaN stays one), after the adjustments; not for the logprobs.
    """

    bits: NDArray[np.uint8]  # [masks, ceil(vocabulary / 8)]
    of: NDArray[np.int32]  # [R]


@dataclass(frozen=True, slots=True)
class SampleArgs:
    """How each of R rows is drawn; all arrays [R]. `position` is the new token's absolute position.

    `logprobs`: -1 none, else how many alternatives (0..20). `adjustments` None: the logits are drawn from as they are.
    `masks` None: every token may be drawn.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    choice: NDArray[np.uint32]
    position: NDArray[np.uint32]
    logprobs: NDArray[np.int32]
    adjustments: Adjustments | None = None
    masks: Masks | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens [R], -1 for a row with a NaN logit; logprob [R] (NaN where not asked); top_ids and top_logprobs [R, 20],
    the first `logprobs` are valid."""

    tokens: NDArray[np.int32]
    logprob: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


class PlanLine(NamedTuple):
    """One fused operation of a Plan.

    origin: the Program's operations it came from, counted from 1 · image_bytes: what it reads of the image at one row ·
    most_bytes: what it reads at however many, where each may read another token's row or other experts ·
    products: multiply-adds with weights for one row · unit: of what, "int8", "f32" or "bf16" · outputs: whether its
    rows are those asked for, not all.
    """

    kind: str
    text: str
    origin: tuple[int, ...]
    image_bytes: int
    most_bytes: int
    products: int
    unit: str
    outputs: bool


class Plan(Protocol):
    """A Program lowered for one image and one machine. Not thread-safe: one step at a time.

    `fast`: what its steps of the fast kind are computed by, part of the key of every page that they fill; None: it has
    none.
    """

    workspace_bytes: int
    kv_type: str
    fast: str | None

    def forward(
        self, step: StepArgs, pool: NDArray[np.uint8], seconds: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Run one step and return the logits [R, vocabulary], valid until the next call.

        `pool` is the whole scratchpad; the step's pages in it are written. `seconds`, one for each of `describe`, gets
        the time of each added. Releases the interpreter lock.
        """
        ...

    def describe(self, kind: str = "exact") -> list[PlanLine]:
        """The fused operations in order, of steps of one kind."""
        ...

    def lines(self) -> list[str]:
        """One line for each fused operation, for people."""
        ...
