"""The native executor: a Program becomes fused instructions over one workspace, and a step one call into C++.

Lowering has three passes. `_Fuser` walks the Program once and joins what the ROM stores together or what a kernel does
in one go (norm with quantization, q|k|v, gate|up with its activation, residuals in place). `_assign` lays the slots
out: two may share memory when no stretch between barriers needs both. `_emit` hands each to the native Plan. Where
there is a fast kind this is done twice, for two native Plans over one workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vai.errors import BadRequest, CorruptImage, NotSupported, Unavailable, UnsupportedModel
from vai.kernels import _native
from vai.kernels.ops import (
    Attention,
    Embed,
    ExpertLinear,
    ExpertSum,
    GatedAdd,
    Glu,
    HeadNorm,
    KvWrite,
    Linear,
    Op,
    RmsNorm,
    Rope,
    Route,
    Rows,
)
from vai.kernels.program import KV_TYPES, PlanLine, Program, StepArgs
from vai.rom.image import BLOCK_TYPES, VECTOR, Part, StoredTensor, TensorTable

BLOCK_ROWS = 16
LINE = 64  # every slot begins on a cache line
RECORD_BYTES = {32: 40, 256: 308}  # of a group of columns that share an activation scale: codes, scale and sums
TYPE_CODES = {
    name: code
    for code, name in enumerate(
        (
            *("Q4_0", "Q8_0", "F16", "BF16", "F32", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1"),
            *("IQ4_NL", "IQ4_XS", "MXFP4"),
            *("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
        ),
    )
}

TILE_COLUMNS = 32  # of bfloat16, in a tile of the fast kind
NO_FAST = ("F16", "F32")  # types of weights that bfloat16 would shorten by more than their activations

ACTS = ("silu", "gelu_tanh")  # by number


class Weights(Protocol):
    """What lowering needs of an image: where its tensors are, and their bytes."""

    @property
    def table(self) -> TensorTable: ...

    @property
    def data(self) -> memoryview: ...


class NativePlan:
    """A Program lowered for one image and this machine; implements `kernels.program.Plan`.

    `workspace_bytes` is exact; the memory itself is taken from the machine as steps first touch it.
    """

    def __init__(self, kinds: dict[str, _Lowered], workspace_bytes: int, kv_type: str, fast: str | None) -> None:
        self.workspace_bytes = workspace_bytes
        self.kv_type = kv_type
        self.fast = fast
        self._kinds = kinds

    def forward(
        self, step: StepArgs, pool: NDArray[np.uint8], seconds: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Run one step: logits [R, vocabulary], valid until the next call. One thread at a time.

        Raises NotSupported for a kind that the plan was not lowered for, BadRequest if the step fits not the model, its
        pages or itself; then nothing was written. Unavailable in a forked child, which has no workers.
        """
        if step.kind not in self._kinds:
            raise NotSupported(f"This plan has no steps of kind '{step.kind}', only {' and '.join(self._kinds)} ones.")
        try:
            return self._kinds[step.kind].native.forward(
                step.tokens,
                step.positions,
                step.seq_start,
                step.context,
                list(step.block_tables),
                step.output_rows,
                pool,
                seconds,
            )
        except ValueError as error:
            raise BadRequest(str(error)) from error
        except RuntimeError as error:
            raise Unavailable(f"The step cannot run here: {error}.") from error

    def describe(self, kind: str = "exact") -> list[PlanLine]:
        """See program.Plan."""
        return [instruction.described() for instruction in self._kinds[kind].instructions]

    def lines(self) -> list[str]:
        """One line for each instruction: what it does, the image's bytes it reads, the Program lines it came from."""
        return [str(instruction) for instruction in self._kinds["exact"].instructions]


def lower(
    program: Program,
    image: Weights,
    *,
    kv_type: str,
    max_rows: int,
    max_sequences: int,
    workers: _native.Workers,
    isa: str,
    fast: str | None = None,
) -> NativePlan:
    """Lower `program` over the bytes of `image`, for steps of at most `max_rows` rows and `max_sequences` output rows.

    `fast`: the implementation of the fast kind; None: exact steps only. Raises UnsupportedModel for an operation this
    executor lacks, CorruptImage where image and Program disagree.
    """
    if kv_type not in KV_TYPES:
        raise NotSupported(f"There is no KV type {kv_type!r}; choose one of {', '.join(KV_TYPES)}.")
    fusers = _fusers(program, image.table, _Shape(max_rows, max_sequences, program.context, workers.threads), fast)
    found = {kind: fuser.instructions() for kind, fuser in fusers.items()}
    size = max(map(_assign, found.values()))
    workspace = _native.Workspace(size)  # of both kinds: no step leaves anything in it for another
    kinds = {}
    for kind, instructions in found.items():
        native = _native.Plan(
            workers=workers,
            isa=isa,
            fast=fast if kind == "fast" else None,
            data=np.frombuffer(image.data, dtype=np.uint8),
            workspace=workspace,
            max_rows=max_rows,
            max_outputs=max_sequences,
            vocabulary=program.vocabulary,
            context=program.context,
            kv_type=kv_type,
            groups=[(group.layers, group.kv_heads, group.head_dim, group.window or 0) for group in program.groups],
        )
        for instruction in instructions:
            _emit(native, instruction)
        result = fusers[kind].result()
        native.result(out=result.place(), columns=result.columns, of_outputs=result.outputs)
        kinds[kind] = _Lowered(native, instructions)
    return NativePlan(kinds, size, kv_type, fast)


def workspace_bytes(
    program: Program, table: TensorTable, *, max_rows: int, max_sequences: int, threads: int, fast: str | None = None
) -> int:
    """The bytes that `lower` would give the workspace, from the tensor table alone. Raises as `lower` does."""
    fusers = _fusers(program, table, _Shape(max_rows, max_sequences, program.context, threads), fast)
    return max(_assign(fuser.instructions()) for fuser in fusers.values())


def _fusers(program: Program, table: TensorTable, shape: _Shape, fast: str | None) -> dict[str, _Fuser]:
    """One for each kind of step."""
    kinds = ["exact"] if fast is None else ["exact", "fast"]
    return {kind: _Fuser(program, table, shape, fast=kind == "fast") for kind in kinds}


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    outputs: int
    context: int
    threads: int


@dataclass(frozen=True, slots=True)
class _Lowered:
    """Steps of one kind."""

    native: _native.Plan
    instructions: list[_Instruction]


@dataclass(eq=False, slots=True)
class _Slot:
    """A piece of workspace; `offset` is known after `_assign`."""

    bytes: int
    offset: int = -1


@dataclass(frozen=True, slots=True)
class _View:
    """Where a value stands: `columns` of each row of a slot, from `first` on. `outputs`: it has R rows instead of M.

    `copies`: of a value that each of a row's experts has a piece of, how many. The pieces stand as rows of their own,
    sorted by expert, and `columns` are those of a piece.
    """

    slot: _Slot
    width: int  # floats from row to row
    first: int
    columns: int
    outputs: bool
    copies: int = 1

    def place(self) -> _native.Place:
        return self.slot.offset + 4 * self.first, self.width


@dataclass(frozen=True, slots=True)
class _Routing:
    """Which rows go to which experts, in a slot of its own; see Routing in csrc/include/vai/ops.h."""

    slot: _Slot
    experts: int
    used: int

    def place(self) -> _native.Routed:
        return self.slot.offset, self.experts, self.used


@dataclass(slots=True)
class _Instruction:
    """One native operation. `slots`: all it touches; `phase`: the stretch between barriers it runs in."""

    kind: str
    lines: list[int]
    outputs: bool
    slots: list[_Slot]
    views: dict[str, _View] = field(default_factory=dict)
    areas: dict[str, _Slot] = field(default_factory=dict)
    weight: _native.Weight | None = None
    vector: _native.Vector | None = None
    op: Op | None = None
    blocks: int = 0
    text: str = ""
    image_bytes: int = 0
    most_bytes: int = 0  # of the image, where rows do not all read the same
    products: int = 0  # multiply-adds with weights for one row
    routing: _Routing | None = None
    copies: int = 1
    phase: int = -1
    barrier: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether a worker that did its rows here may go on with the same rows in the next instruction."""
        apart = ("linear", "gated", "attention", "rows", "sort", "expert_rows", "experts", "gated_experts")
        return self.kind not in apart and self.copies == 1

    def described(self) -> PlanLine:
        unit = "int8" if "packed" in self.areas else "bf16" if "narrow" in self.areas else "f32"
        read = self.image_bytes, max(self.image_bytes, self.most_bytes)
        return PlanLine(self.kind, self.text, tuple(self.lines), *read, self.products, unit, self.outputs)

    def __str__(self) -> str:
        origin = ",".join(str(line) for line in self.lines)
        return f"{self.kind:<10} {self.text:<56} {self.image_bytes:>12,} B  lines {origin}"


class _Fuser:
    """Walks a Program in order and makes the instructions; each operation ends up in exactly one of them.

    `fast`: linear layers are those of the fast kind, where their weights' types have it.
    """

    def __init__(self, program: Program, table: TensorTable, shape: _Shape, *, fast: bool) -> None:
        self._program = program
        self._table = table
        self._shape = shape
        self._fast = fast
        self._narrow: dict[str, _Slot] = {}  # of a value, as bfloat16
        self._fast_scratch = _Slot(0)
        self._views: dict[str, _View] = {}
        self._packed: dict[tuple[str, int], _Slot] = {}  # of a value, in groups of so many columns
        self._angles: dict[tuple[tuple[float, ...], float], _Slot] = {}  # by frequencies and magnitude
        self._scratch: _Slot | None = None
        self._routings: dict[str, _Routing] = {}  # by the value of the chosen experts, and by that of their shares
        self._expert_inputs: dict[tuple[str, int, str], _Slot] = {}  # of a value, in groups of so many columns, sorted
        self._done: set[int] = set()
        self._made: list[_Instruction] = []
        self._readers: dict[str, list[int]] = {}
        for index, op in enumerate(program.ops):
            for value in _reads(op):
                self._readers.setdefault(value, []).append(index)
        for value in program.outputs.values():
            self._readers.setdefault(value, []).append(len(program.ops))

    def instructions(self) -> list[_Instruction]:
        for index, op in enumerate(self._program.ops):
            if index in self._done:
                continue
            match op:
                case Embed():
                    self._embed(index, op)
                case RmsNorm():
                    self._norm(index, op)
                case HeadNorm():
                    self._head_norm(index, op)
                case Linear():
                    self._linear(index, op)
                case Rope():
                    self._rope(index, op)
                case KvWrite():
                    self._kv_write(index, op)
                case Attention():
                    self._attention(index, op)
                case Glu():
                    self._glu(index, op)
                case Route():
                    self._route(index, op)
                case ExpertLinear():
                    self._expert_linear(index, op)
                case ExpertSum():
                    self._expert_sum(index, op)
                case GatedAdd():
                    self._gated_add(index, op)
                case Rows():
                    self._rows(index, op)
        for before, after in zip(self._made, self._made[1:], strict=False):
            before.barrier = not (before.by_rows and after.by_rows and before.outputs == after.outputs)
        phase = 0
        for instruction in self._made:
            instruction.phase = phase
            phase += instruction.barrier
        # What is read after the step must not be overwritten within it.
        self._made[-1].slots.append(self.result().slot)
        return self._made

    def result(self) -> _View:
        if set(self._program.outputs) != {"logits"}:
            raise UnsupportedModel("The native executor gives logits only, and this model has other results.")
        return self._views[self._program.outputs["logits"]]

    # ---- one operation each

    def _embed(self, index: int, op: Embed) -> None:
        stored, part, weight = self._matrix(op.weight)
        out = self._new(op.output, stored.columns, outputs=False)
        row_bytes = stored.bytes // (stored.rows // BLOCK_ROWS)
        self._add(
            "embed",
            [index],
            out,
            views={"out": out},
            weight=weight,
            op=op,
            text=_of(op.weight, stored, part.rows) + (f" times {op.scale:g}" if op.scale != 1 else ""),
            image_bytes=row_bytes,
        )
        self._made[-1].most_bytes = stored.bytes

    def _norm(self, index: int, op: RmsNorm) -> None:
        x = self._views[op.x]
        weight = self._vector(op.weight, x.columns)
        groups = {self._group(reader, op.output, x) for reader in self._readers.get(op.output, [])}
        views = {"x": x}
        if op.residual is not None:
            views["residual"] = self._views[op.residual]
        if 0 in groups:
            out = views.get("residual")
            if out is None or not self._replaceable(index, op, out):
                out = self._new(op.output, x.columns, outputs=x.outputs)
            self._views[op.output] = views["out"] = out
        areas = {}
        for group in sorted(groups - {0}):
            slot = areas[f"packed{group}"] = self._packed_slot(op.output, group, x)
            self._views.setdefault(op.output, _View(slot, 0, 0, x.columns, x.outputs))
        self._add(
            "norm",
            [index],
            x,
            views=views,
            areas=areas,
            vector=weight,
            op=op,
            text=f"{op.weight} {x.columns}{' + residual' if op.residual is not None else ''}",
            image_bytes=4 * x.columns,
        )

    def _head_norm(self, index: int, op: HeadNorm) -> None:
        """Over its input where nobody else reads that, as rope does; no barrier is between the two."""
        x = self._views[op.x]
        out = x
        if self._readers[op.x] != [index]:
            out = self._new(op.output, x.columns, outputs=x.outputs)
        self._views[op.output] = out
        head_dim = x.columns // op.heads
        weight = self._vector(op.weight, head_dim)
        self._add(
            "head_norm",
            [index],
            x,
            views={"x": x, "out": out},
            vector=weight,
            op=op,
            text=f"{op.weight} {op.heads} heads of {head_dim}",
            image_bytes=4 * head_dim,
        )

    def _linear(self, index: int, op: Linear) -> None:
        stored, part, weight = self._matrix(op.weight)
        if self._gated(index, op, stored) or self._joined(index, op, stored):
            return
        x = self._views[op.x]
        blocks = _blocks(part.rows)
        views = {}
        if op.addend is not None:
            views["addend"] = self._views[op.addend]
        if op.residual is not None:
            views["residual"] = self._views[op.residual]
        out = views.get("residual")
        if out is None or not self._replaceable(index, op, out):
            out = self._new(op.output, part.rows, outputs=x.outputs)
        self._views[op.output] = _View(out.slot, out.width, out.first, part.rows, x.outputs)
        bias = None if op.bias is None else self._vector(op.bias, part.rows)
        extra = [f"+ {name}" for name in ("addend", "bias", "residual") if getattr(op, name) is not None]
        extra += [f"softcap {op.softcap:g}"] if op.softcap else []
        self._multiply(
            "linear",
            [index],
            op.x,
            stored,
            weight,
            bias,
            blocks,
            {**views, "out": out},
            " ".join([_of(op.weight, stored, part.rows), *extra]),
            blocks,
            op,
        )

    def _gated(self, index: int, op: Linear, stored: StoredTensor) -> bool:
        """gate and up, interleaved in the ROM and read by one gated unit alone: one pass over both."""
        parts = stored.parts
        if [(p.first_block, p.block_step) for p in parts] != [(0, 2), (1, 2)]:
            return False
        members = self._siblings(index, op, parts)
        if members is None:
            return False
        gate, up = (op for _, op in members)
        readers = self._readers.get(gate.output, []) + self._readers.get(up.output, [])
        if len(readers) != 2 or readers[0] != readers[1] or readers[0] == len(self._program.ops):
            return False
        glu = self._program.ops[readers[0]]
        if (
            not (isinstance(glu, Glu) and (glu.gate, glu.up) == (gate.output, up.output))
            or parts[0].rows != parts[1].rows
        ):
            return False
        _check_act(glu)
        x = self._views[op.x]
        out = self._new(glu.output, parts[0].rows, outputs=x.outputs)
        narrow = self._is_fast(stored, x) and self._read_narrow(glu.output, out)
        if narrow:
            self._narrow[glu.output] = self._narrow_slot(out)
        blocks = _blocks(parts[0].rows)
        lines = [line for line, _ in members] + [readers[0]]
        text = f"{_of(stored.name, stored, stored.rows)}{' + bias' if gate.bias else ''}, {glu.act}"
        self._multiply(
            "gated",
            lines,
            op.x,
            stored,
            self._weight(stored, parts[0]),
            self._bias(members),
            blocks,
            {} if narrow else {"out": out},
            text + (" as bfloat16" if narrow else ""),
            2 * blocks,
            glu,
            narrow_out=self._narrow[glu.output] if narrow else None,
        )
        return True

    def _joined(self, index: int, op: Linear, stored: StoredTensor) -> bool:
        """Neighbours in the ROM (q|k|v) that read the same value: one wide result, each a range of its columns."""
        parts = stored.parts
        if len(parts) < 2 or any(p.block_step != 1 for p in parts):
            return False
        members = self._siblings(index, op, parts)
        if members is None:
            return False
        outputs = self._views[op.x].outputs
        blocks = _blocks(stored.rows)
        width = _width(blocks)
        slot = _Slot(self._count(outputs) * width * 4)
        for (_, member), part in zip(members, parts, strict=True):
            self._views[member.output] = _View(slot, width, BLOCK_ROWS * part.first_block, part.rows, outputs)
        out = _View(slot, width, 0, stored.rows, outputs)
        text = f"{_of(stored.name, stored, stored.rows)}{' + bias' if op.bias else ''}"
        weight = self._weight(stored, Part(stored.name, stored.rows, 0, 1))
        self._multiply(
            "linear",
            [line for line, _ in members],
            op.x,
            stored,
            weight,
            self._bias(members),
            blocks,
            {"out": out},
            text,
            blocks,
        )
        return True

    def _rope(self, index: int, op: Rope) -> None:
        x = self._views[op.x]
        out = x
        if self._readers[op.x] != [index]:
            out = self._new(op.output, x.columns, outputs=False)
        self._views[op.output] = out
        key = op.frequencies, op.magnitude
        angles = self._angles.get(key)
        if angles is None:
            angles = self._angles[key] = _Slot(self._shape.rows * len(op.frequencies) * 8)
            text = f"{len(op.frequencies)} frequencies" + (f" times {op.magnitude:g}" if op.magnitude != 1 else "")
            self._add("angles", [index], x, areas={"out": angles}, op=op, text=text)
        self._add(
            "rope",
            [index],
            x,
            views={"x": x, "out": out},
            areas={"angles": angles},
            op=op,
            text=f"{op.heads} heads of {op.head_dim}, {op.pairing}",
        )

    def _kv_write(self, index: int, op: KvWrite) -> None:
        k = self._views[op.k]
        self._add(
            "kv_write",
            [index],
            k,
            views={"k": k, "v": self._views[op.v]},
            op=op,
            text=f"group {op.group} layer {op.layer}",
        )

    def _attention(self, index: int, op: Attention) -> None:
        q = self._views[op.q]
        if self._scratch is None:
            context = -(-self._shape.context // BLOCK_ROWS) * BLOCK_ROWS
            head_dim = max(group.head_dim for group in self._program.groups)
            bytes_ = 4 * _native.attention_scratch(context, head_dim)
            if self._fast:
                bytes_ = max(bytes_, _native.fast_attention_scratch(context, head_dim))
            self._scratch = _Slot(self._shape.threads * bytes_)
        out = self._new(op.output, op.heads * op.head_dim, outputs=False)
        extra = [f"{name} {getattr(op, name):g}" for name in ("window", "softcap") if getattr(op, name)]
        self._add(
            "attention",
            [index],
            q,
            views={"q": q, "out": out},
            areas={"scratch": self._scratch},
            op=op,
            text=" ".join(
                [f"group {op.group} layer {op.layer}, {op.heads}/{op.kv_heads} heads of {op.head_dim}", *extra]
            ),
        )

    def _glu(self, index: int, op: Glu) -> None:
        _check_act(op)
        gate = self._views[op.gate]
        out = self._new(op.output, gate.columns, outputs=gate.outputs, copies=gate.copies)
        self._add(
            "glu",
            [index],
            gate,
            views={"gate": gate, "up": self._views[op.up], "out": out},
            op=op,
            text=f"{op.act} {gate.columns}",
        )

    def _route(self, index: int, op: Route) -> None:
        logits = self._views[op.logits]
        words = 4 * self._shape.rows * op.used + 2 * (logits.columns + 1)
        routing = _Routing(_Slot(4 * words), logits.columns, op.used)
        self._routings[op.chosen] = self._routings[op.shares] = routing
        text = f"{op.used} of {logits.columns} experts"
        scaled = f"{text}, times {op.scale:g}" if op.scale != 1 else text
        self._add("route", [index], logits, views={"logits": logits}, op=op, text=scaled, routing=routing)
        self._add("sort", [index], logits, text=text, routing=routing)

    def _expert_linear(self, index: int, op: ExpertLinear) -> None:
        stored, part, weight = self._expert_matrix(op)
        if self._expert_gated(index, op, stored):
            return
        out = self._new(op.output, part.rows // op.experts, outputs=False, copies=self._routings[op.chosen].used)
        self._multiply_experts("experts", [index], op, stored, weight, out, _of(op.weight, stored, part.rows))

    def _expert_gated(self, index: int, op: ExpertLinear, stored: StoredTensor) -> bool:
        """gate and up of all experts, interleaved in the ROM and read by one gated unit alone."""
        parts = stored.parts
        if [(p.first_block, p.block_step) for p in parts] != [(0, 2), (1, 2)] or op.weight != parts[0].name:
            return False
        ops = self._program.ops
        siblings = [line for line in self._readers[op.x] if line < len(ops) and _sibling(ops[line], op, parts[1].name)]
        if len(siblings) != 1:
            return False
        up = ops[siblings[0]]
        readers = self._readers.get(op.output, [])
        glu = ops[readers[0]] if len(readers) == 1 and readers[0] < len(ops) else None
        if (
            not (isinstance(glu, Glu) and isinstance(up, ExpertLinear) and (glu.gate, glu.up) == (op.output, up.output))
            or glu.act != "silu"
            or self._readers[up.output] != readers
        ):
            return False
        self._expert_matrix(up)
        lines = [index, siblings[0], readers[0]]
        self._done.update(lines)
        out = self._new(glu.output, parts[0].rows // op.experts, outputs=False, copies=self._routings[op.chosen].used)
        text = f"{_of(stored.name, stored, stored.rows)}, {glu.act}"
        self._multiply_experts("gated_experts", lines, op, stored, self._weight(stored, parts[0]), out, text)
        return True

    def _multiply_experts(
        self,
        kind: str,
        lines: list[int],
        op: ExpertLinear,
        stored: StoredTensor,
        weight: _native.Weight,
        out: _View,
        text: str,
    ) -> None:
        routing = self._routings[op.chosen]
        blocks = _blocks(out.columns)
        read = routing.used * blocks * (2 if kind == "gated_experts" else 1)
        x = self._views[op.x]
        group = BLOCK_TYPES[stored.type].group
        views, areas = {"out": out}, {}
        if group:
            areas["packed"] = self._expert_rows(lines[0], op, group)
        elif x.copies == 1:
            views["x"] = _View(self._expert_rows(lines[0], op, 0), x.columns, 0, x.columns, False, routing.used)
        else:
            views["x"] = x
        self._add(
            kind,
            lines,
            out,
            views=views,
            areas=areas,
            weight=weight,
            blocks=blocks,
            text=f"{text}, {routing.used} of {routing.experts}",
            image_bytes=stored.bytes // (stored.rows // BLOCK_ROWS) * read,
            routing=routing,
        )
        self._made[-1].most_bytes = stored.bytes
        self._made[-1].products = BLOCK_ROWS * read * stored.columns

    def _expert_rows(self, index: int, op: ExpertLinear, group: int) -> _Slot:
        """The rows of a value side by side for each expert: quantized in groups of so many columns, or floats (0)."""
        key = op.x, group, op.chosen
        slot = self._expert_inputs.get(key)
        if slot is None:
            x, routing = self._views[op.x], self._routings[op.chosen]
            row = x.columns // group * RECORD_BYTES[group] if group else 4 * x.columns
            slot = self._expert_inputs[key] = _Slot(self._count(False) * routing.used * row)
            views, areas = {"x": x}, {}
            if group:
                areas[f"packed{group}"] = slot
            else:
                views["out"] = _View(slot, x.columns, 0, x.columns, False, routing.used)
            text = f"{x.columns} by {group}" if group else f"{x.columns}"
            self._add("expert_rows", [index], x, views=views, areas=areas, text=text, routing=routing)
            self._made[-1].copies = routing.used
        return slot

    def _expert_sum(self, index: int, op: ExpertSum) -> None:
        x, routing = self._views[op.x], self._routings[op.shares]
        residual = None if op.residual is None else self._views[op.residual]
        if residual is not None and self._readers.get(op.residual or "", [])[-1] == index and residual.first == 0:
            out = _View(residual.slot, residual.width, 0, x.columns, False)
        else:
            out = self._new(op.output, x.columns, outputs=False)
        self._views[op.output] = out
        views = {"x": x, "out": out} if residual is None else {"x": x, "out": out, "residual": residual}
        text = f"{x.columns} of {routing.used} experts{'' if residual is None else ' + residual'}"
        self._add("expert_sum", [index], out, views=views, text=text, routing=routing)

    def _gated_add(self, index: int, op: GatedAdd) -> None:
        x, gate, residual = self._views[op.x], self._views[op.gate], self._views[op.residual]
        out = residual
        if max(self._readers[op.residual]) != index or op.residual in (op.x, op.gate) or residual.first:
            out = self._new(op.output, x.columns, outputs=x.outputs)
        self._views[op.output] = out
        self._add(
            "gated_add",
            [index],
            x,
            views={"x": x, "gate": gate, "residual": residual, "out": out},
            vector=self._vector(op.weight, gate.columns),
            op=op,
            text=f"{op.weight} {gate.columns} + residual",
            image_bytes=4 * gate.columns,
        )

    def _expert_matrix(self, op: ExpertLinear) -> tuple[StoredTensor, Part, _native.Weight]:
        stored, part, weight = self._matrix(op.weight)
        if part.rows % (op.experts * BLOCK_ROWS):
            raise CorruptImage(f"The image's {op.weight} is not {op.experts} whole matrices; burn the model again.")
        return stored, part, weight

    def _rows(self, index: int, op: Rows) -> None:
        x = self._views[op.x]
        out = self._new(op.output, x.columns, outputs=True)
        self._add("rows", [index], out, views={"x": x, "out": out}, text=f"{x.columns}")

    # ---- what they share

    def _multiply(
        self,
        kind: str,
        lines: list[int],
        x: str,
        stored: StoredTensor,
        weight: _native.Weight,
        bias: _native.Vector | None,
        blocks: int,
        views: dict[str, _View],
        text: str,
        read_blocks: int,
        op: Op | None = None,
        narrow_out: _Slot | None = None,
    ) -> None:
        self._done.update(lines)
        view = self._views[x]
        areas = {}
        group = BLOCK_TYPES[stored.type].group
        if self._is_fast(stored, view):
            areas["narrow"] = self._narrowed(lines[0], x)
            areas["scratch"] = self._fast_scratch
            size = self._shape.threads * _native.fast_scratch(stored.columns)
            self._fast_scratch.bytes = max(self._fast_scratch.bytes, size)
        elif group:
            areas["packed"] = self._quantized(lines[0], x, group)
        else:
            views = {**views, "x": view}
        if narrow_out is not None:
            areas["narrow_out"] = narrow_out
        image_bytes = stored.bytes // (stored.rows // BLOCK_ROWS) * read_blocks + (64 * read_blocks if bias else 0)
        self._add(
            kind,
            lines,
            view,
            views=views,
            areas=areas,
            weight=weight,
            vector=bias,
            op=op,
            blocks=blocks,
            text=text,
            image_bytes=image_bytes,
        )
        self._made[-1].products = BLOCK_ROWS * read_blocks * stored.columns

    def _quantized(self, index: int, value: str, group: int) -> _Slot:
        """The packed codes of a value in groups of `group` columns; made here where its norm did not make them."""
        packed = self._packed.get((value, group))
        if packed is None:
            x = self._views[value]
            packed = self._packed_slot(value, group, x)
            areas = {f"packed{group}": packed}
            self._add("quantize", [index], x, views={"x": x}, areas=areas, text=f"{x.columns} by {group}")
        return packed

    def _is_fast(self, stored: StoredTensor, x: _View) -> bool:
        """Whether a linear layer is one of the fast kind: results asked for are of exact rows only."""
        return self._fast and stored.type not in NO_FAST and not x.outputs

    def _narrowed(self, index: int, value: str) -> _Slot:
        """A value as bfloat16."""
        slot = self._narrow.get(value)
        if slot is None:
            x = self._views[value]
            slot = self._narrow[value] = self._narrow_slot(x)
            self._add("narrow", [index], x, views={"x": x}, areas={"out": slot}, text=f"{x.columns} as bfloat16")
        return slot

    def _narrow_slot(self, x: _View) -> _Slot:
        return _Slot(self._count(x.outputs) * _native.narrow_bytes(x.columns))

    def _read_narrow(self, value: str, x: _View) -> bool:
        """Whether all who read `value` want bfloat16, and its columns fill the tiles that such rows are made of."""
        readers = [self._program.ops[line] for line in self._readers[value] if line < len(self._program.ops)]
        return (
            x.columns % TILE_COLUMNS == 0
            and len(readers) == len(self._readers[value])
            and all(
                isinstance(op, Linear)
                and value not in (op.addend, op.residual)
                and self._is_fast(self._matrix(op.weight)[0], x)
                for op in readers
            )
        )

    def _siblings(self, index: int, op: Linear, parts: tuple[Part, ...]) -> list[tuple[int, Linear]] | None:
        """The Linear operations from `index` on that read what `op` reads and nothing else, one for each part in order.

        None if there is not exactly one for each part, or if their biases are not stored the way their weights are.
        """
        by_part: dict[str, tuple[int, Linear]] = {}
        names = {part.name for part in parts}
        for line in self._readers[op.x]:
            other = self._program.ops[line] if line < len(self._program.ops) else None
            if not isinstance(other, Linear) or other.weight not in names or other.x != op.x:
                continue
            if line < index or line in self._done or other.weight in by_part or other.addend or other.residual:
                return None
            if other.softcap:
                return None
            by_part[other.weight] = (line, other)
        if len(by_part) != len(parts):
            return None
        for part in parts:
            self._check(part.name, part, self._table.find(part.name)[0])
        members = [by_part[part.name] for part in parts]
        biases = [self._table.find(member.bias) if member.bias else None for _, member in members]
        if all(bias is None for bias in biases):
            return members
        for bias, part in zip(biases, parts, strict=True):
            if bias is None or biases[0] is None or bias[0] != biases[0][0] or bias[0].type != VECTOR:
                return None
            if (bias[1].rows, bias[1].first_block, bias[1].block_step) != (
                part.rows,
                part.first_block,
                part.block_step,
            ):
                return None
        return members

    def _bias(self, members: list[tuple[int, Linear]]) -> _native.Vector | None:
        """The fused bias of siblings, from its first block on, in the step of their weights."""
        bias = members[0][1].bias
        if bias is None:
            return None
        stored, part = self._table.find(bias)
        return stored.offset, stored.rows, 0, part.block_step

    def _replaceable(self, index: int, op: Linear | RmsNorm, residual: _View) -> bool:
        """Whether the result may be written over the residual: nobody reads that later, and this reads it only so."""
        if op.residual is None:
            return False
        last = max(self._readers[op.residual])
        own = residual.first == 0 and residual.columns == self._program.constants[op.weight][0]
        others = (op.x, op.addend) if isinstance(op, Linear) else (op.x,)
        return last == index and own and op.residual not in others and residual.outputs == self._views[op.x].outputs

    def _group(self, reader: int, value: str, x: _View) -> int:
        """The group in which operation `reader` reads `value` as quantized codes; 0 if it reads it in another way."""
        op = self._program.ops[reader] if reader < len(self._program.ops) else None
        if not isinstance(op, Linear) or op.x != value or value in (op.addend, op.residual):
            return 0
        stored = self._matrix(op.weight)[0]
        return 0 if self._is_fast(stored, x) else BLOCK_TYPES[stored.type].group

    def _matrix(self, name: str) -> tuple[StoredTensor, Part, _native.Weight]:
        stored, part = self._table.find(name)
        self._check(name, part, stored)
        if stored.type not in TYPE_CODES:
            raise CorruptImage(f"The image holds {name} as {stored.type}, which is no matrix; burn the model again.")
        return stored, part, self._weight(stored, part)

    def _weight(self, stored: StoredTensor, part: Part) -> _native.Weight:
        return stored.offset, TYPE_CODES[stored.type], stored.rows, stored.columns, part.first_block, part.block_step

    def _vector(self, name: str, elements: int) -> _native.Vector:
        stored, part = self._table.find(name)
        if stored.type != VECTOR or part.rows != elements:
            raise CorruptImage(f"The image's {name} is not a vector of {elements} values; burn the model again.")
        return stored.offset, stored.rows, part.first_block, part.block_step

    def _check(self, name: str, part: Part, stored: StoredTensor) -> None:
        expected = self._program.constants[name]
        if (part.rows, stored.columns) != expected:
            raise CorruptImage(
                f"The image's {name} is {part.rows} x {stored.columns} where the model needs "
                f"{expected[0]} x {expected[1]}; burn the model again."
            )

    def _count(self, outputs: bool) -> int:
        return self._shape.outputs if outputs else self._shape.rows

    def _packed_slot(self, value: str, group: int, x: _View) -> _Slot:
        slot = _Slot(self._count(x.outputs) * (x.columns // group) * RECORD_BYTES[group])
        self._packed[value, group] = slot
        return slot

    def _new(self, value: str, columns: int, *, outputs: bool, copies: int = 1) -> _View:
        """A slot of its own for a value; rows are padded to whole blocks, which linear operations write."""
        width = _width(_blocks(columns))
        view = _View(_Slot(self._count(outputs) * copies * width * 4), width, 0, columns, outputs, copies)
        self._views[value] = view
        return view

    def _add(
        self,
        kind: str,
        lines: list[int],
        like: _View,
        *,
        views: dict[str, _View] | None = None,
        areas: dict[str, _Slot] | None = None,
        weight: _native.Weight | None = None,
        vector: _native.Vector | None = None,
        op: Op | None = None,
        blocks: int = 0,
        text: str = "",
        image_bytes: int = 0,
        routing: _Routing | None = None,
    ) -> None:
        """Append an instruction over the rows of `like`."""
        views, areas = views or {}, areas or {}
        slots = [view.slot for view in views.values()] + list(areas.values()) + ([routing.slot] if routing else [])
        self._made.append(
            _Instruction(
                kind,
                [line + 1 for line in lines],
                like.outputs,
                slots,
                views,
                areas,
                weight,
                vector,
                op,
                blocks,
                text,
                image_bytes,
                routing=routing,
                copies=like.copies,
            )
        )


def _reads(op: Op) -> list[str]:
    match op:
        case Embed():
            return []
        case RmsNorm():
            return [value for value in (op.x, op.residual) if value is not None]
        case HeadNorm() | Rope() | Rows():
            return [op.x]
        case Linear():
            return [value for value in (op.x, op.addend, op.residual) if value is not None]
        case KvWrite():
            return [op.k, op.v]
        case Attention():
            return [op.q]
        case Glu():
            return [op.gate, op.up]
        case Route():
            return [op.logits]
        case ExpertLinear():
            return [op.x, op.chosen]
        case ExpertSum():
            return [value for value in (op.x, op.shares, op.residual) if value is not None]
        case GatedAdd():
            return [op.x, op.gate, op.residual]


def _sibling(op: Op, of: ExpertLinear, weight: str) -> bool:
    same = isinstance(op, ExpertLinear) and (op.x, op.chosen, op.experts) == (of.x, of.chosen, of.experts)
    return same and isinstance(op, ExpertLinear) and op.weight == weight


def _blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS)


def _width(blocks: int) -> int:
    """Floats of a row of so many blocks: an odd number of lines, so that columns do not share sets of a cache."""
    return (blocks | 1) * BLOCK_ROWS


def _of(name: str, stored: StoredTensor, rows: int) -> str:
    return f"{name} {stored.type} {rows}x{stored.columns}"


def _check_act(glu: Glu) -> None:
    if glu.act not in ACTS:
        raise UnsupportedModel(f"The native executor has no gated unit with {glu.act!r}, only {', '.join(ACTS)}.")


def _act(op: Op | None) -> int:
    return ACTS.index(op.act) if isinstance(op, Glu) else 0


def _assign(instructions: list[_Instruction]) -> int:
    """Give every slot its offset, lowest first fit; returns the workspace's bytes.

    A slot is needed from the first to the last *phase* that touches it: within one, workers run ahead of each other.
    """
    spans: dict[_Slot, tuple[int, int]] = {}
    for instruction in instructions:
        for slot in instruction.slots:
            first, _ = spans.get(slot, (instruction.phase, 0))
            spans[slot] = (first, instruction.phase)
    alive: list[_Slot] = []  # placed, and needed at or after the phase that is looked at
    end = 0
    for slot in sorted(spans, key=lambda slot: (spans[slot][0], -slot.bytes)):
        first = spans[slot][0]
        alive = [other for other in alive if spans[other][1] >= first]
        offset = 0
        for other in sorted(alive, key=lambda other: other.offset):
            if offset + slot.bytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.bytes))
        slot.offset = offset
        alive.append(slot)
        end = max(end, _aligned(offset + slot.bytes))
    return end


def _aligned(offset: int) -> int:
    return -(-offset // LINE) * LINE


def _emit(native: _native.Plan, made: _Instruction) -> None:
    where = (made.outputs, made.barrier, made.copies)
    place = {name: view.place() for name, view in made.views.items()}
    area = {name: slot.offset for name, slot in made.areas.items()}
    op = made.op
    match made.kind:
        case "embed" if made.weight:
            scale = op.scale if isinstance(op, Embed) else 1.0
            native.embed(table=made.weight, scale=scale, out=place["out"], where=where)
        case "norm" | "quantize" | "head_norm":
            heads = op.heads if isinstance(op, HeadNorm) else 1
            epsilon = op.epsilon if isinstance(op, RmsNorm | HeadNorm) else 0.0
            native.norm(
                x=place["x"],
                heads=heads,
                columns=made.views["x"].columns // heads,
                weight=made.vector,
                epsilon=epsilon,
                residual=place.get("residual"),
                out=place.get("out"),
                packed32=area.get("packed32"),
                packed256=area.get("packed256"),
                where=where,
            )
        case "narrow":
            native.narrow(x=place["x"], columns=made.views["x"].columns, out=area["out"], where=where)
        case "linear" | "gated" if made.weight:
            native.linear(
                weight=made.weight,
                blocks=made.blocks,
                x=place.get("x"),
                packed=area.get("packed"),
                narrow=area.get("narrow"),
                scratch=area.get("scratch"),
                bias=made.vector,
                addend=place.get("addend"),
                residual=place.get("residual"),
                out=place.get("out"),
                narrow_out=area.get("narrow_out"),
                gated=made.kind == "gated",
                act=_act(op),
                softcap=op.softcap if isinstance(op, Linear) else 0.0,
                where=where,
            )
        case "glu":
            native.glu(
                gate=place["gate"],
                up=place["up"],
                act=_act(op),
                columns=made.views["out"].columns,
                out=place["out"],
                where=where,
            )
        case "gated_add" if made.vector:
            native.gated_add(
                x=place["x"],
                columns=made.views["x"].columns,
                gate=place["gate"],
                gate_columns=made.views["gate"].columns,
                weight=made.vector,
                residual=place["residual"],
                out=place["out"],
                where=where,
            )
        case "rows":
            native.rows(x=place["x"], columns=made.views["x"].columns, out=place["out"], where=where)
        case _ if made.routing:
            _emit_routed(native, made, made.routing.place(), place, area, where)
        case _:
            _emit_positional(native, made, place, area, where)


def _emit_routed(
    native: _native.Plan,
    made: _Instruction,
    routed: _native.Routed,
    place: dict[str, _native.Place],
    area: dict[str, int],
    where: _native.Where,
) -> None:
    """The instructions that experts need."""
    match made.kind, made.op:
        case "route", Route() as op:
            native.route(logits=place["logits"], routed=routed, renormalize=op.renormalize, scale=op.scale, where=where)
        case "sort", _:
            native.sort(routed=routed, where=where)
        case "expert_rows", _:
            native.expert_rows(
                x=place["x"],
                columns=made.views["x"].columns,
                routed=routed,
                gathered=made.views["x"].copies == 1,
                out=place.get("out"),
                packed32=area.get("packed32"),
                packed256=area.get("packed256"),
                where=where,
            )
        case "experts" | "gated_experts", _ if made.weight:
            native.expert_linear(
                weight=made.weight,
                blocks=made.blocks,
                x=place.get("x"),
                packed=area.get("packed"),
                out=place["out"],
                gated=made.kind == "gated_experts",
                routed=routed,
                where=where,
            )
        case "expert_sum", _:
            native.expert_sum(
                x=place["x"],
                columns=made.views["x"].columns,
                routed=routed,
                residual=place.get("residual"),
                out=place["out"],
                where=where,
            )
        case unknown:
            raise AssertionError(f"no such instruction: {unknown}")


def _emit_positional(
    native: _native.Plan,
    made: _Instruction,
    place: dict[str, _native.Place],
    area: dict[str, int],
    where: _native.Where,
) -> None:
    """The instructions that depend on positions and pages."""
    match made.kind, made.op:
        case "angles", Rope() as op:
            native.angles(frequencies=op.frequencies, magnitude=op.magnitude, out=area["out"], where=where)
        case "rope", Rope() as op:
            native.rope(
                x=place["x"],
                out=place["out"],
                heads=op.heads,
                head_dim=op.head_dim,
                pairs=len(op.frequencies),
                neox=op.pairing == "neox",
                angles=area["angles"],
                where=where,
            )
        case "kv_write", KvWrite() as op:
            native.kv_write(k=place["k"], v=place["v"], group=op.group, layer=op.layer, where=where)
        case "attention", Attention() as op:
            native.attention(
                q=place["q"],
                out=place["out"],
                group=op.group,
                layer=op.layer,
                heads=op.heads,
                scale=op.scale,
                window=op.window,
                softcap=op.softcap,
                scratch=area["scratch"],
                where=where,
            )
        case unknown:
            raise AssertionError(f"no such instruction: {unknown}")
