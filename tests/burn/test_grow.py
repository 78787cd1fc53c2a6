"""A grown model computes what the small one does: the same bits where the width allows, greedy tokens everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vai.burn.burn import burn, preview
from vai.burn.gguf import GgufFile
from vai.burn.grow import grow
from vai.burn.synth import SHAPES, synthesize
from vai.errors import BadRequest, ModelNotFound, UnsupportedModel
from vai.kernels import table
from vai.kernels.program import PAGE_TOKENS, StepArgs
from vai.llm import LLM
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.request import SamplingParams
from vai.rom.registry import Name, Registry
from vai.rom.segment import attach

SMALL = msgspec.structs.replace(
    SHAPES["tiny"], layers=2, width=64, ffn=160, heads=4, kv_heads=2, head_dim=16, rope_dims=16, norm_epsilon=1e-5
)
SMALL_QWEN2 = msgspec.structs.replace(
    SHAPES["tiny-qwen2"], layers=2, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, rope_dims=16
)
TOKENS = 64


def logits(path: Path, root: Path) -> np.ndarray:
    """[TOKENS, vocabulary] after the same tokens, from the native executor."""
    tokens = np.random.default_rng(3).integers(0, SMALL.vocabulary, TOKENS).astype(np.int32)
    with ExitStack() as undo:
        image = undo.enter_context(attach(root, burn(path, root).digest))
        program = build(Spec.from_bytes(image.spec))
        workers = table.make_workers(2)
        plan = table.lower(program, image, max_rows=TOKENS, max_sequences=TOKENS, workers=workers)
        page = program.groups[0].page_bytes(plan.kv_type)
        step = StepArgs(
            tokens=tokens,
            positions=np.arange(TOKENS, dtype=np.int32),
            seq_start=np.array([0, TOKENS], np.int32),
            context=np.zeros(1, np.int32),
            block_tables=(np.arange(TOKENS // PAGE_TOKENS, dtype=np.int64)[None] * page,),
            output_rows=np.arange(TOKENS, dtype=np.int32),
        )
        result = plan.forward(step, np.zeros(TOKENS // PAGE_TOKENS * page, np.uint8)).copy()
        del plan
    return result


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "root").mkdir(mode=0o700)
    return tmp_path / "root"


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q5_1", "BF16", "F32"])
@pytest.mark.parametrize("small", [SMALL, SMALL_QWEN2], ids=["llama", "qwen2"])
def test_a_width_four_times_as_large_gives_the_same_bits(small: Spec, type: str, tmp_path: Path, root: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape=small, type=type, seed=4)
    grown = grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape="tiny-256")
    assert grown.exact
    before, after = (logits(tmp_path / f"{name}.gguf", root) for name in ("small", "large"))
    assert before.std() > 0.5
    assert np.array_equal(before.view(np.uint32), after.view(np.uint32))


@pytest.mark.parametrize("width", [160, 192, 128])
def test_any_other_width_differs_by_the_rounding_of_its_norms(width: int, tmp_path: Path, root: Path) -> None:
    shape = msgspec.structs.replace(SHAPES["tiny-256"], width=width, layers=7)
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="F32", seed=4)
    grown = grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape=shape)
    assert not grown.exact
    before, after = (logits(tmp_path / f"{name}.gguf", root) for name in ("small", "large"))
    # A norm rounds its weight, epsilon, mean and root: about 2^-22 of each value. K and V are rounded to bf16, where
    # such a difference may fall on the other side: 2^-8 of a value, in few of them.
    assert 0 < np.abs(before - after).max() < 2**-8 * np.abs(before).max()
    assert np.array_equal(before.argmax(axis=1), after.argmax(axis=1))


def test_greedy_tokens_are_equal_over_hundreds_of_tokens(tmp_path: Path, root: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="Q4_0", seed=9)
    grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape="tiny-256")
    registry = Registry(root, tmp_path / "names")
    answers = []
    for name in ("small", "large"):
        source = tmp_path / f"{name}.gguf"
        registry.put(Name(name, str(source), digest=burn(source, root).digest))
        with LLM(name, root=root, names=tmp_path / "names", threads=1, kv_bytes=64 << 20) as llm:
            prompt = list(b"def main():")
            answers.append(llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=300, stop_ids=())).token_ids)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 20


def test_what_was_planned_is_what_is_in_the_file(tmp_path: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="Q8_0")
    grown = grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape="tiny-256")
    assert preview(tmp_path / "large.gguf").spec == grown.spec
    large = SHAPES["tiny-256"]
    assert (grown.spec.layers, grown.spec.width, grown.spec.ffn) == (large.layers, large.width, large.ffn)
    assert grown.spec.heads * grown.spec.head_dim == large.heads * large.head_dim
    assert grown.spec.kv_heads * grown.spec.head_dim == large.kv_heads * large.head_dim
    assert (grown.spec.vocabulary, grown.spec.context) == (SMALL.vocabulary, SMALL.context)
    assert grown.bytes == (tmp_path / "large.gguf").stat().st_size
    with GgufFile(tmp_path / "small.gguf") as small, GgufFile(tmp_path / "large.gguf") as made:
        assert made.metadata["tokenizer.ggml.merges"] == small.metadata["tokenizer.ggml.merges"]
        assert made.metadata["general.name"] == "llama-synthetic (synthetic) grown to tiny-256"
        assert bytes(made.data("blk.3.attn_q.weight")) == bytes(made.data("blk.1.attn_q.weight"))
        assert not any(made.data("blk.3.ffn_down.weight"))
        assert any(made.data("blk.1.ffn_down.weight"))


def test_the_same_model_grows_to_the_same_file(tmp_path: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="Q8_0")
    for name in ("a.gguf", "b.gguf"):
        grow(tmp_path / "small.gguf", tmp_path / name, shape="tiny-256")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 1}, "layers"),
        ({"width": 32}, "width"),
        ({"ffn": 128}, "feed-forward"),
        ({"heads": 4, "kv_heads": 4, "head_dim": 16}, "query heads"),
        ({"kv_heads": 1, "heads": 4, "head_dim": 16, "rope_dims": 16}, "key-value heads"),
        ({"head_dim": 24, "rope_dims": 24}, "Heads of 16"),
        ({"width": 272}, "would cut Q8_0 blocks"),
        ({"heads": 6, "kv_heads": 2, "head_dim": 16, "rope_dims": 16}, "would cut Q8_0 blocks"),
        ({"ffn": 1 << 20, "layers": 1024}, "the limit is"),
    ],
)
def test_a_shape_that_does_not_hold_the_model_is_refused(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="Q8_0")
    shape = msgspec.structs.replace(SHAPES["tiny-256"], **{"rope_dims": 16, **changes})
    with pytest.raises(BadRequest, match=words):
        grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape=shape)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_source_or_a_shape_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        grow(tmp_path / "none.gguf", tmp_path / "large.gguf", shape="tiny")
    synthesize(tmp_path / "small.gguf", shape=SMALL, type="Q8_0")
    with pytest.raises(BadRequest, match="no shape 'huge'"):
        grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape="huge")
    with pytest.raises(BadRequest, match="same file"):
        grow(tmp_path / "small.gguf", tmp_path / "small.gguf", shape="tiny-256")


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    synthesize(tmp_path / "small.gguf", shape="tiny-qwen3", type="Q8_0")
    with pytest.raises(
        UnsupportedModel, match=r"'qwen3' with blk\.0\.attn_q_norm\.weight cannot be grown; .* llama and qwen2"
    ):
        grow(tmp_path / "small.gguf", tmp_path / "large.gguf", shape="tiny-256")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
