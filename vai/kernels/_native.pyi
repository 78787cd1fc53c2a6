"""The native executor (csrc/bind). Places are (byte offset in the workspace, floats per row); see csrc/core/plan.h."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]
Weight = tuple[int, int, int, int, int, int]  # offset, block type, stored rows, columns, first block, block step
Vector = tuple[int, int, int, int]  # offset, stored elements, first block, block step
Where = tuple[bool, bool, int]  # over the output rows, barrier after, rows for each of them
Routed = tuple[int, int, int]  # offset, experts, used

def isas() -> list[str]: ...
def refused_isas() -> list[tuple[str, str]]: ...
def self_test(name: str) -> str: ...
def attention_scratch(context: int, head_dim: int) -> int: ...

class Workers:
    ahead: int
    def __init__(self, threads: int, lease: str = "") -> None: ...
    @property
    def threads(self) -> int: ...

def fasts() -> list[str]: ...
def refused_fasts() -> list[tuple[str, str]]: ...
def fast_scratch(columns: int) -> int: ...
def fast_attention_scratch(context: int, head_dim: int) -> int: ...
def narrow_bytes(columns: int) -> int: ...

class Workspace:
    def __init__(self, bytes: int) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        workers: Workers,
        isa: str,
        fast: str | None,
        data: NDArray[np.uint8],
        workspace: Workspace,
        max_rows: int,
        max_outputs: int,
        vocabulary: int,
        context: int,
        kv_type: str,
        groups: Sequence[tuple[int, int, int, int]],  # layers, KV heads, head_dim, window or 0
    ) -> None: ...
    def embed(self, *, table: Weight, scale: float, out: Place, where: Where) -> None: ...
    def norm(
        self,
        *,
        x: Place,
        heads: int,
        columns: int,
        weight: Vector | None,
        epsilon: float,
        residual: Place | None,
        out: Place | None,
        packed32: int | None,
        packed256: int | None,
        where: Where,
    ) -> None: ...
    def narrow(self, *, x: Place, columns: int, out: int, where: Where) -> None: ...
    def linear(
        self,
        *,
        weight: Weight,
        blocks: int,
        x: Place | None,
        packed: int | None,
        narrow: int | None,
        scratch: int | None,
        bias: Vector | None,
        addend: Place | None,
        residual: Place | None,
        out: Place | None,
        narrow_out: int | None,
        gated: bool,
        act: int,
        softcap: float,
        where: Where,
    ) -> None: ...
    def glu(self, *, gate: Place, up: Place, act: int, columns: int, out: Place, where: Where) -> None: ...
    def angles(self, *, frequencies: Sequence[float], magnitude: float, out: int, where: Where) -> None: ...
    def rope(
        self,
        *,
        x: Place,
        out: Place,
        heads: int,
        head_dim: int,
        pairs: int,
        neox: bool,
        angles: int,
        where: Where,
    ) -> None: ...
    def kv_write(self, *, k: Place, v: Place, group: int, layer: int, where: Where) -> None: ...
    def attention(
        self,
        *,
        q: Place,
        out: Place,
        group: int,
        layer: int,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        scratch: int,
        where: Where,
    ) -> None: ...
    def route(self, *, logits: Place, routed: Routed, renormalize: bool, scale: float, where: Where) -> None: ...
    def sort(self, *, routed: Routed, where: Where) -> None: ...
    def expert_rows(
        self,
        *,
        x: Place,
        columns: int,
        routed: Routed,
        gathered: bool,
        out: Place | None,
        packed32: int | None,
        packed256: int | None,
        where: Where,
    ) -> None: ...
    def expert_linear(
        self,
        *,
        weight: Weight,
        blocks: int,
        x: Place | None,
        packed: int | None,
        out: Place,
        gated: bool,
        routed: Routed,
        where: Where,
    ) -> None: ...
    def expert_sum(
        self, *, x: Place, columns: int, routed: Routed, residual: Place | None, out: Place, where: Where
    ) -> None: ...
    def gated_add(
        self,
        *,
        x: Place,
        columns: int,
        gate: Place,
        gate_columns: int,
        weight: Vector,
        residual: Place,
        out: Place,
        where: Where,
    ) -> None: ...
    def rows(self, *, x: Place, columns: int, out: Place, where: Where) -> None: ...
    def result(self, *, out: Place, columns: int, of_outputs: bool) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        seq_start: NDArray[np.int32],
        context: NDArray[np.int32],
        tables: list[NDArray[np.int64]],
        output_rows: NDArray[np.int32],
        pool: NDArray[np.uint8],
        seconds: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]: ...

def sample(
    *,
    isa: str,
    workers: Workers | None,
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int32],
    top_p: NDArray[np.float32],
    min_p: NDArray[np.float32],
    seed: NDArray[np.uint64],
    choice: NDArray[np.uint32],
    position: NDArray[np.uint32],
    logprobs: NDArray[np.int32],
    repetition: NDArray[np.float32],
    presence: NDArray[np.float32],
    frequency: NDArray[np.float32],
    bias_start: NDArray[np.int64],
    bias_ids: NDArray[np.int32],
    biases: NDArray[np.float32],
    seen_start: NDArray[np.int64],
    seen_ids: NDArray[np.int32],
    made: NDArray[np.int32],
    masks: NDArray[np.uint8],
    mask_of: NDArray[np.int32],
    tokens: NDArray[np.int32],
    logprob: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float32],
) -> None: ...
def multiply_rate(*, workers: Workers, isa: str, unit: str, seconds: float) -> float: ...
def read_rate(*, workers: Workers, isa: str, data: NDArray[np.uint8]) -> float: ...
