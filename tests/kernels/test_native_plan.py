"""What a native Plan promises around the arithmetic: hostile steps, memory, threads, forks, and what it prints."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.errors import BadRequest, CorruptImage, NotSupported, Unavailable, UnsupportedModel
from vai.kernels import table
from vai.kernels.ops import Glu
from vai.kernels.program import CacheGroup, Plan, Program, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.segment import attach
from vai.rom.view import Image

Model = tuple[Image, Program]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model, burned and attached, with its Program."""
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o700)
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "tiny.gguf"
    synthesize(checkpoint, shape="tiny", type="Q4_0")
    image = attach(root, burn(checkpoint, root).digest)
    return image, build(Spec.from_bytes(image.spec))


@pytest.fixture
def plan(model: Model) -> Plan:
    return lowered(model)


def lowered(model: Model, threads: int = 2, program: Program | None = None, **options: object) -> Plan:
    image, whole = model
    arguments = {"max_rows": 64, "max_sequences": 4, "workers": table.make_workers(threads), **options}
    return table.lower(program or whole, image, **arguments)


def good(program: Program) -> tuple[StepArgs, NDArray[np.uint8]]:
    """A step of two sequences, 40 and 3 rows, the second with 10 tokens before it, and a pool of five pages."""
    page = program.groups[0].page_bytes("bf16")
    step = StepArgs(
        tokens=np.arange(43, dtype=np.int32),
        positions=np.array([*range(40), 10, 11, 12], np.int32),
        seq_start=np.array([0, 40, 43], np.int32),
        context=np.array([0, 10], np.int32),
        block_tables=(np.array([[3, 0, -1], [4, -1, -1]], np.int64) * page,),
        output_rows=np.array([39, 42], np.int32),
    )
    return step, np.zeros(5 * page, np.uint8)


def changed(name: str, index: object, value: int) -> Callable[[StepArgs], StepArgs]:
    def change(step: StepArgs) -> StepArgs:
        array = getattr(step, name).copy()
        array[index] = value
        return dataclasses.replace(step, **{name: array})

    return change


def table_entry(index: tuple[int, int], value: int) -> Callable[[StepArgs], StepArgs]:
    def change(step: StepArgs) -> StepArgs:
        pages = step.block_tables[0].copy()
        pages[index] = value
        return dataclasses.replace(step, block_tables=(pages,))

    return change


WRONG: dict[str, tuple[Callable[[StepArgs], StepArgs], str]] = {
    "a token past the vocabulary": (changed("tokens", 5, 512), "token 512 is not in the vocabulary of 512"),
    "a negative token": (changed("tokens", 42, -1), "token -1"),
    "a position that jumps": (changed("positions", 41, 4000), "continue from"),
    "a negative position": (changed("positions", 0, -1), "continue from"),
    "a negative context": (changed("context", 1, -1), "context of 4096"),
    "a context past the model's": (changed("context", 1, 4094), "context of 4096"),
    "a context that overflows": (changed("context", 1, 2**31 - 1), "context of 4096"),
    "rows that begin late": (changed("seq_start", 0, 1), "seq_start"),
    "rows that end late": (changed("seq_start", 2, 44), "seq_start"),
    "rows that go back": (changed("seq_start", 1, 60), "at least one row|continue from|every sequence"),
    "a sequence of no rows": (changed("seq_start", 1, 43), "at least one row|continue from"),
    "an output row past the rows": (changed("output_rows", 1, 43), "output_rows"),
    "a negative output row": (changed("output_rows", 0, -1), "output_rows"),
    "output rows out of order": (changed("output_rows", 1, 39), "output_rows"),
    "a page past the pool": (table_entry((0, 1), 1 << 40), "outside the pool"),
    "the page that ends past the pool": (table_entry((0, 1), 4 * 24_576 + 64), "outside the pool"),
    "a negative page": (table_entry((1, 0), -64), "outside the pool"),
    "a page between lines": (table_entry((1, 0), 2), "outside the pool"),
    "a table too short": (
        lambda s: dataclasses.replace(s, block_tables=(s.block_tables[0][:, :1].copy(),)),
        "too short",
    ),
    "a table for one sequence": (
        lambda s: dataclasses.replace(s, block_tables=(s.block_tables[0][:1].copy(),)),
        "one row for each sequence",
    ),
    "no table": (lambda s: dataclasses.replace(s, block_tables=()), "one block table"),
    "no rows": (lambda s: dataclasses.replace(s, tokens=s.tokens[:0]), "0 rows where 1 to 64 fit"),
    "more rows than room": (lambda s: dataclasses.replace(s, tokens=np.zeros(65, np.int32)), "65 rows"),
    "more results than room": (
        lambda s: dataclasses.replace(s, output_rows=np.arange(5, dtype=np.int32)),
        "5 output rows where 4 fit",
    ),
    "positions of another number": (lambda s: dataclasses.replace(s, positions=s.positions[:-1]), "differ in number"),
    "no sequences": (
        lambda s: dataclasses.replace(s, context=s.context[:0], seq_start=s.seq_start[:1]),
        "seq_start",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_is_refused_and_writes_nothing(model: Model, plan: Plan, wrong: str) -> None:
    change, message = WRONG[wrong]
    step, pool = good(model[1])
    with pytest.raises(BadRequest, match=message):
        plan.forward(change(step), pool)
    assert not pool.any()
    plan.forward(step, pool)
    assert pool.any()


def test_an_array_of_another_type_is_refused(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    with pytest.raises(TypeError):
        plan.forward(dataclasses.replace(step, tokens=step.tokens.astype(np.int64)), pool)


def test_a_pool_that_may_not_be_written_is_refused(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    pool.flags.writeable = False
    with pytest.raises(TypeError):
        plan.forward(step, pool)


def test_only_the_pages_of_the_step_are_written(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    plan.forward(step, pool)
    pages = pool.reshape(5, -1)
    assert [bool(page.any()) for page in pages] == [True, False, False, True, True]


def test_a_step_may_ask_for_no_results(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    logits = plan.forward(dataclasses.replace(step, output_rows=np.array([], np.int32)), pool)
    assert logits.shape == (0, 512)
    assert pool.any()


def test_a_longest_sequence_runs_to_the_last_token_of_the_context(model: Model, plan: Plan) -> None:
    program = model[1]
    page = program.groups[0].page_bytes("bf16")
    pages = program.context // 32
    step = StepArgs(
        tokens=np.array([7], np.int32),
        positions=np.array([program.context - 1], np.int32),
        seq_start=np.array([0, 1], np.int32),
        context=np.array([program.context - 1], np.int32),
        block_tables=(np.arange(pages, dtype=np.int64)[None, :] * page,),
        output_rows=np.array([0], np.int32),
    )
    logits = plan.forward(step, np.zeros(pages * page, np.uint8))
    assert np.isfinite(logits).all()


def test_plans_share_workers_and_callers_take_turns(model: Model) -> None:
    workers = table.make_workers(2)
    step, pool = good(model[1])
    expected = lowered(model).forward(step, pool.copy()).copy()
    plans = [lowered(model, workers=workers) for _ in range(3)]
    wrong: list[int] = []

    def drive(index: int) -> None:
        for _ in range(50):
            logits = plans[index].forward(step, pool.copy())
            if not np.array_equal(logits.view(np.uint32), expected.view(np.uint32)):
                wrong.append(index)

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_threads_than_cores_finish(model: Model) -> None:
    step, pool = good(model[1])
    expected = lowered(model, threads=1).forward(step, pool.copy()).copy()
    plan = lowered(model, threads=4 * (os.cpu_count() or 1) + 1)
    for _ in range(3):
        np.testing.assert_array_equal(plan.forward(step, pool.copy()).view(np.uint32), expected.view(np.uint32))


def test_workers_run_five_nicer_than_their_maker(model: Model) -> None:
    before = set(Path("/proc/self/task").iterdir())
    plan = lowered(model, threads=3)
    plan.forward(*good(model[1]))  # by now each of them has run
    made = [int(task.name) for task in set(Path("/proc/self/task").iterdir()) - before]
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19)
    assert [os.getpriority(os.PRIO_PROCESS, task) for task in made] == [nice] * 3


def test_a_fork_has_no_workers_and_says_so(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of just what is tested here
        child = os.fork()
    if child == 0:
        try:
            plan.forward(step, pool)
        except Unavailable as error:
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def anonymous_kib() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1])


def test_lowering_takes_no_memory_that_steps_do_not_touch(model: Model) -> None:
    workers = table.make_workers(1)
    lowered(model, workers=workers)
    before = anonymous_kib()
    plan = lowered(model, workers=workers, max_rows=1 << 16)
    assert plan.workspace_bytes > 100 << 20
    assert anonymous_kib() - before < 4096


def test_the_workspace_has_room_for_what_it_promises_and_no_more(model: Model) -> None:
    small, large = (lowered(model, max_rows=rows, max_sequences=1).workspace_bytes for rows in (64, 128))
    # Per row at least the residual and the gated unit's two forms stand side by side; slots are shared beyond that.
    assert 64 * 4 * (192 + 352) <= large - small < 64 * 4 * (192 + 3 * 704)


def test_the_image_may_be_closed_while_a_plan_reads_it(model: Model) -> None:
    image, program = model
    mine = attach(image.path.parents[1], image.digest)
    step, pool = good(program)
    expected = lowered(model).forward(step, pool.copy()).copy()
    plan = lowered((mine, program))
    mine.close()
    np.testing.assert_array_equal(plan.forward(step, pool).view(np.uint32), expected.view(np.uint32))


def test_lines_name_every_operation_once(model: Model, plan: Plan) -> None:
    named = [int(number) for line in plan.lines() for number in line.rsplit("lines ", 1)[1].split(",")]
    assert set(named) == set(range(1, len(model[1].ops) + 1))
    assert len(plan.lines()) < len(model[1].ops) + 2 * 3 + 2  # angles once and two quantizations a layer are our own
    fused = next(line for line in plan.lines() if "blk.0.attn_qkv.weight" in line)
    assert "Q4_0 320x192" in fused and "34,560 B" in fused and fused.endswith("lines 3,4,5")


def test_implementations_are_printable_and_forced_by_name(model: Model) -> None:
    assert table.isa() == [name for name in table.isas() if name != table.TILES][-1]
    assert table.isas()[0] == "scalar"
    assert table.implementations("scalar") == dict.fromkeys(table.implementations(), "scalar")
    assert table.implementations()["linear"] == table.isa()
    if table.TILES in table.isas():
        own = table.implementations(table.TILES)
        assert (own["linear"], own["attention"], own["rope"]) == ("amx", "avx512", "scalar")
    with pytest.raises(NotSupported, match="'sse9' kernels"):
        lowered(model, isa="sse9")
    with pytest.raises(NotSupported, match="backend 'abacus'"):
        lowered(model, backend="abacus")
    with pytest.raises(NotSupported, match="KV type 'int3'"):
        lowered(model, kv_type="int3")


def test_what_the_executor_lacks_is_refused_by_name(model: Model) -> None:
    _, program = model
    gelu = [dataclasses.replace(op, act="gelu") if isinstance(op, Glu) else op for op in program.ops]
    with pytest.raises(UnsupportedModel, match="'gelu'"):
        lowered(model, program=dataclasses.replace(program, ops=tuple(gelu)))
    hidden = dataclasses.replace(program, outputs={**program.outputs, "hidden": "last"})
    with pytest.raises(UnsupportedModel, match="logits only"):
        lowered(model, program=hidden)


def test_an_image_of_another_shape_is_refused(model: Model) -> None:
    _, program = model
    wider = {**program.constants, "blk.1.attn_k.weight": (96, 192)}
    with pytest.raises(CorruptImage, match=r"blk\.1\.attn_k\.weight is 64 x 192 where the model needs 96 x 192"):
        lowered(model, program=dataclasses.replace(program, constants=wider))


def test_a_plan_lowered_for_other_pages_is_not_built(model: Model) -> None:
    _, program = model
    windowed = dataclasses.replace(program, groups=(dataclasses.replace(program.groups[0], window=64),))
    with pytest.raises(RuntimeError, match="a window wider than its group's"):
        lowered(model, program=windowed)
    fewer = dataclasses.replace(program, groups=(CacheGroup(2, 2, 32),))
    with pytest.raises(RuntimeError, match="no such layer"):
        lowered(model, program=fewer)


def test_threads_out_of_bounds_are_refused() -> None:
    for threads in (0, -1, 1 << 20):
        with pytest.raises(BadRequest, match="1 to 1024 threads, not"):
            table.make_workers(threads)


def test_no_worker_spins_between_steps(model: Model, plan: Plan) -> None:
    step, pool = good(model[1])
    plan.forward(step, pool)
    before = resource.getrusage(resource.RUSAGE_SELF)
    threading.Event().wait(0.2)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 0.05


def test_a_machine_that_gives_no_more_threads_says_so() -> None:
    script = """
import resource
from vai.errors import Unavailable
from vai.kernels import table
alive = table.make_workers(1)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # stacks of 8 MiB: some start, not all
try:
    table.make_workers(1024)
except Unavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "gives no 1024 threads" in done.stdout
