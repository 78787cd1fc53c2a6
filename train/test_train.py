"""From text to a model that VAI serves, in small. Run: pytest train (with the extra "train"; `make test` does not)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from train import corpus, evaluate, quantize, tokenizer
from train.export import export
from train.model import SHAPES, greedy
from train.muon import orthogonal
from train.score import score
from train.ship import ship
from train.train import Recipe, load, train
from vai.burn.burn import burn
from vai.burn.gguf import GgufFile, GgufTensor
from vai.burn.grow import grow
from vai.burn.synth import synthesize
from vai.llm import LLM
from vai.request import SamplingParams
from vai.rom.registry import Name, Registry

PROMPT = "def main() -> None:\n    for index in range(100):\n"
COUNT = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of a part of the standard library, encoded."""
    out = tmp_path_factory.mktemp("corpus")
    whole = corpus.standard_library()
    small = [(name, path) for name, path in whole.files if name.startswith(("python/asyncio/", "python/json/"))]
    corpus.write(out, [whole._replace(files=small)])
    learned = tokenizer.learn(corpus.read(out, "train"), 512)
    learned.save(str(out / "tokenizer.json"))
    np.save(out / "train.tokens.npy", tokenizer.encode(learned, corpus.read(out, "train")))
    return out


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(
        shape="micro",
        vocabulary=512,
        context=128,
        steps=20,
        batch=4,
        rate=3e-3,
        warmup=2,
        decay=0.1,
        seed=1,
        teacher_weight=0.0,
    )


@pytest.fixture(scope="module")
def trained(text: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(text, out, recipe, save_every=100, compiled=False)
    return out


def test_the_same_sources_give_the_same_corpus_and_vocabulary(text: Path, tmp_path: Path) -> None:
    whole = corpus.standard_library()
    small = [(name, path) for name, path in whole.files if name.startswith(("python/asyncio/", "python/json/"))]
    corpus.write(tmp_path, [whole._replace(files=small)])
    tokenizer.learn(corpus.read(tmp_path, "train"), 512).save(str(tmp_path / "tokenizer.json"))
    for name in ("train.text", "held.text", "manifest.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (text / name).read_bytes()


def test_a_content_is_in_the_corpus_once(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("print('the same')\n")
    files = [(f"x/{path.name}", path) for path in sorted(tmp_path.iterdir())]
    assert [d.name for d in corpus.documents([corpus.Source("x", "1", "MIT", files)])] == ["x/a.py"]


def test_tests_of_a_project_are_no_text_to_learn_from(tmp_path: Path) -> None:
    for name in ("a.py", "tests/b.py", "contest/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"print({name!r})\n")
    files = ((f"x/{path.relative_to(tmp_path).as_posix()}", path) for path in tmp_path.rglob("*.py"))
    assert [name for name, _ in corpus._eligible(files)] == ["x/a.py", "x/contest/c.py"]


def test_a_prompt_that_ends_with_its_line_is_cut_as_the_text_is(text: Path) -> None:
    learned = Tokenizer.from_file(str(text / "tokenizer.json"))
    whole = learned.encode("def main():\n    return 0\n").tokens
    line = learned.encode("def main():\n").tokens
    assert whole[: len(line)] == line


def test_training_lowers_the_loss(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20
    assert lines[-1]["loss"] < np.log(512) - 0.3


def test_a_run_that_was_stopped_ends_as_one_that_was_not(text: Path, recipe: Recipe, tmp_path: Path) -> None:
    student = replace(recipe, steps=8, teacher_weight=0.5)
    ends = []
    for name, stops in (("through", ()), ("stopped", (7, 16))):
        for until in (*stops, None):
            train(text, tmp_path / name, recipe, student=student, until=until, save_every=5, compiled=False)
        ends.append([load(tmp_path / name / f"{which}.npz")[0] for which in ("checkpoint", "student")])
    for through, stopped in zip(*ends, strict=True):
        for name, parameter in through.named_parameters():
            assert torch.equal(parameter, dict(stopped.named_parameters())[name]), name


def test_a_student_with_fewer_steps_learns_in_the_last_ones(text: Path, recipe: Recipe, tmp_path: Path) -> None:
    student = replace(recipe, steps=8, teacher_weight=0.5)
    train(text, tmp_path, recipe, student=student, until=12, save_every=100, compiled=False)
    with np.load(tmp_path / "student.npz") as before:
        assert before["step"] == 0
    train(text, tmp_path, recipe, student=student, save_every=100, compiled=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: "student" in line for line in lines} == {10: False, 12: False, 20: True}
    with np.load(tmp_path / "student.npz") as after:
        assert after["step"] == 8


@pytest.mark.filterwarnings("default")  # torch's compiler warns itself
def test_a_compiled_step_loses_what_a_plain_one_does(text: Path, recipe: Recipe, tmp_path: Path) -> None:
    student, told = replace(recipe, teacher_weight=0.5), []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        train(text, out, recipe, student=student, until=3, save_every=100, compiled=compiled)
        line = json.loads((out / "log.jsonl").read_text())
        told.append((line["loss"], line["student"]))
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_a_student_that_was_saved_when_its_teacher_was_not_waits_for_it(
    text: Path, recipe: Recipe, tmp_path: Path
) -> None:
    student = replace(recipe, teacher_weight=0.5)
    for until in (5, 8):
        train(text, tmp_path, recipe, student=student, until=until, save_every=100, compiled=False)
        (tmp_path / "checkpoint.npz").rename(tmp_path / f"{until}.npz")
        if until == 5:
            shutil.copy(tmp_path / "5.npz", tmp_path / "checkpoint.npz")
    (tmp_path / "5.npz").rename(tmp_path / "checkpoint.npz")
    ahead = load(tmp_path / "student.npz")[0]
    train(text, tmp_path, recipe, student=student, until=8, save_every=100, compiled=False)
    for name, parameter in ahead.named_parameters():
        assert torch.equal(parameter, dict(load(tmp_path / "student.npz")[0].named_parameters())[name]), name
    with np.load(tmp_path / "checkpoint.npz") as found, np.load(tmp_path / "8.npz") as goal:
        assert all(np.array_equal(found[name], goal[name]) for name in goal)


def test_how_many_steps_there_are_may_be_changed_until_the_rate_falls(
    text: Path, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    train(text, tmp_path, replace(recipe, steps=30), until=10, save_every=100, compiled=False)
    train(text, tmp_path, recipe, save_every=100, compiled=False)
    with np.load(tmp_path / "checkpoint.npz") as found, np.load(trained / "checkpoint.npz") as goal:
        assert all(np.array_equal(found[name], goal[name]) for name in goal)
    with pytest.raises(SystemExit, match="another recipe"):
        train(text, tmp_path, replace(recipe, steps=30), save_every=100, compiled=False)


def test_another_recipe_does_not_go_on_from_a_checkpoint(text: Path, recipe: Recipe, trained: Path) -> None:
    with pytest.raises(SystemExit, match="another recipe"):
        train(text, trained, replace(recipe, seed=2), save_every=100, compiled=False)


def test_a_student_is_pulled_towards_its_teacher(text: Path, recipe: Recipe, tmp_path: Path) -> None:
    ids = torch.from_numpy(np.load(text / "train.tokens.npy")[:128].astype(np.int64))[None]
    distances = []
    for weight in (0.0, 1.0):
        student = replace(recipe, seed=3, teacher_weight=weight)
        train(text, tmp_path / str(weight), recipe, student=student, save_every=100, compiled=False)
        with torch.no_grad():
            goal, scores = (
                load(tmp_path / str(weight) / f"{which}.npz")[0](ids).log_softmax(-1)
                for which in ("checkpoint", "student")
            )
        distances.append(float((goal.exp() * (goal - scores)).sum(-1).mean()))
    assert distances[1] < distances[0]


@pytest.mark.parametrize("shape", [(48, 160), (160, 48), (64, 64)])
def test_a_step_counts_every_direction_alike(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    # Singular values a thousand apart, as gradients have them.
    left, right = (torch.linalg.qr(torch.randn(n, min(shape)))[0] for n in shape)
    matrix = left * torch.logspace(0, -2, min(shape)) @ right.T
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.5 < values.min() <= values.max() < 1.3


def test_bits_are_those_of_the_models_own_probabilities(text: Path, trained: Path) -> None:
    model, recipe = load(trained / "checkpoint.npz")
    tokens = np.load(text / "train.tokens.npy")[: recipe.context]
    row = torch.from_numpy(np.concatenate([tokens[-1:], tokens]).astype(np.int64))
    with torch.no_grad():
        scores = model(row[None, :-1])[0].log_softmax(-1)
    bits = -float(scores[torch.arange(len(tokens)), row[1:]].sum()) / np.log(2)
    assert evaluate.bits_per_byte(model, tokens, 100) == pytest.approx(bits / 100, rel=1e-5)


@pytest.mark.parametrize("count", [1, 128, 129, 192, 193, 400])
def test_every_token_is_scored_once(trained: Path, count: int) -> None:
    model, recipe = load(trained / "checkpoint.npz")
    torch.nn.init.zeros_(model.token_embd.weight)  # every token is as likely as any other
    bits = evaluate.bits_per_byte(model, np.zeros(count, np.uint16), 1)
    assert bits == pytest.approx(count * np.log2(recipe.vocabulary), rel=1e-5)


def test_the_ngram_model_is_a_distribution() -> None:
    train, before = b"the cat sat on the mat; the dog sat too. " * 3, b"on the"
    bits = evaluate.ngram_bits_per_byte(train, before) * len(before)
    after = [evaluate.ngram_bits_per_byte(train, before + bytes([c])) * (len(before) + 1) for c in range(256)]
    assert sum(2 ** (bits - each) for each in after) == pytest.approx(1, rel=1e-9)


def test_vai_writes_what_torch_writes(text: Path, trained: Path, tmp_path: Path) -> None:
    model, _ = load(trained / "checkpoint.npz")
    learned = Tokenizer.from_file(str(text / "tokenizer.json"))
    source, root, names = tmp_path / "micro.gguf", tmp_path / "root", tmp_path / "names"
    export(model, text / "tokenizer.json", source, name="micro", type="F32")
    Registry(root, names).put(Name("micro", str(source), digest=burn(source, root).digest))
    with LLM("micro", root=root, names=names, threads=1, kv_bytes=64 << 20) as llm:
        ids = llm.encode(PROMPT)
        assert ids == learned.encode(PROMPT).ids
        answer = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=COUNT))
    assert list(answer.token_ids) == greedy(model, ids, COUNT)


@pytest.fixture(scope="module")
def held(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents, as a corpus has its held-out ones."""
    out = tmp_path_factory.mktemp("held")
    documents = [document for document in corpus.read(text, "train") if len(document) < 6000][:4]
    (out / "held.text").write_text("".join(documents))
    np.save(out / "held.ends.npy", np.cumsum([len(document.encode()) for document in documents]))
    learned = Tokenizer.from_file(str(text / "tokenizer.json"))
    np.save(out / "held.tokens.npy", tokenizer.encode(learned, iter(documents)))
    return out


def test_vai_scores_text_as_torch_does(held: Path, text: Path, trained: Path, tmp_path: Path) -> None:
    model, _ = load(trained / "checkpoint.npz")
    export(model, text / "tokenizer.json", tmp_path / "micro.gguf", name="micro", type="F32")
    tokens = np.load(held / "held.tokens.npy")[:1000]
    found = score(tmp_path / "micro.gguf", tokens, threads=1)
    assert found.bits == pytest.approx(evaluate.bits_per_byte(model, tokens, 1), rel=1e-4)
    assert len(found.greedy) == len(tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["micro.gguf"]


def test_bits_go_where_they_are_worth_most() -> None:
    def unit(rows: int) -> list[GgufTensor]:
        return [GgufTensor("x", "BF16", (rows, 32), (32, rows), 0, 64 * rows)]

    found = {"small": unit(1), "large": unit(10), "indifferent": unit(1)}
    narrow, types = 12 * 18, ("Q4_0", "Q8_0")
    losses = {(name, type): 10.0 for name in found for type in types} | {("small", "Q4_0"): 11, ("large", "Q4_0"): 15}
    for budget, wide in ((narrow, ""), (narrow + 16, "small"), (narrow + 160, "small"), (narrow + 176, "small large")):
        choice = quantize.choose(found, losses, types, budget)
        assert [name for name, type in choice.types.items() if type == "Q8_0"] == wide.split()
        assert choice.bytes <= budget
    with pytest.raises(SystemExit, match="fits"):
        quantize.choose(found, losses, types, narrow - 1)


def test_a_mix_is_chosen_by_measuring_and_goes_on_where_it_was_stopped(
    held: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Random weights, which tell more tokens apart than a model that was hardly trained.
    sensitive, micro = SHAPES["micro"].spec(recipe.vocabulary, recipe.context), tmp_path / "micro.gguf"
    synthesize(micro, shape=sensitive, type="BF16", seed=1)
    options = {"types": ("Q4_0", "Q8_0"), "budget": None, "tried": 3000, "reported": 20_000}
    quantize.run(micro, held, tmp_path, **options)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(rows) == ["float", "Q4_0", "Q8_0", "mixed"]
    assert rows["Q4_0"]["bytes"] < rows["mixed"]["bytes"] < rows["Q8_0"]["bytes"] < rows["float"]["bytes"]
    assert rows["mixed"]["bytes"] <= (rows["Q4_0"]["bytes"] + rows["Q8_0"]["bytes"]) // 2
    assert rows["float"]["agreement"] == 1 > rows["Q8_0"]["agreement"] > rows["Q4_0"]["agreement"] > 0.3
    assert rows["Q8_0"]["agreement"] > rows["mixed"]["agreement"] > rows["Q4_0"]["agreement"]
    chosen = json.loads((tmp_path / "recipe.json").read_text())
    with GgufFile(tmp_path / "mixed.gguf") as file:
        wide = {tensor.name for tensor in file.tensors.values() if tensor.type == "Q8_0"}
    assert wide == {name for name, _ in chosen["keep"]} != set()
    lines = (tmp_path / "measured.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 9  # all of them wide; then four units a layer, and the embedding
    (tmp_path / "measured.jsonl").write_text("".join(line + "\n" for line in lines[:-1]))
    capsys.readouterr()
    quantize.run(micro, held, tmp_path, **options)
    assert capsys.readouterr().out.count(" bits\n") == 1
    assert json.loads((tmp_path / "recipe.json").read_text()) == chosen


def test_a_trained_model_grown_writes_what_it_wrote(text: Path, held: Path, trained: Path, tmp_path: Path) -> None:
    micro = tmp_path / "micro.gguf"
    export(load(trained / "checkpoint.npz")[0], text / "tokenizer.json", micro, name="micro", type="BF16")
    grow(micro, tmp_path / "large.gguf", shape="tiny-256")
    tokens = np.load(held / "held.tokens.npy")[:300]
    small, large = score(micro, tokens, threads=1), score(tmp_path / "large.gguf", tokens, threads=1)
    assert small.bits == large.bits
    assert np.array_equal(small.greedy, large.greedy)


def test_a_pair_is_shipped_if_it_is_small_and_shares_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, other = [tmp_path / "large.gguf", tmp_path / "small.gguf"], tmp_path / "other.gguf"
    for seed, path in enumerate(pair):
        synthesize(path, shape="tiny", type="Q4_0", seed=seed)
    synthesize(other, shape="tiny-qwen2", type="Q4_0")
    ship(pair, tmp_path / "shipped")
    assert (tmp_path / "shipped/vai-mini.gguf").read_bytes() == pair[0].read_bytes()
    assert (tmp_path / "shipped/vai-nano.gguf").read_bytes() == pair[1].read_bytes()
    with pytest.raises(SystemExit, match="tokenizers differ"):
        ship([pair[0], other], tmp_path / "nowhere")
    synthesize(other, shape="tiny", type="F32")
    monkeypatch.setattr("train.ship.MAX_BYTES", 1 << 20)
    with pytest.raises(SystemExit, match="narrower"):
        ship([other, pair[1]], tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_conversation_is_a_text_to_go_on_with(text: Path, trained: Path, tmp_path: Path) -> None:
    source, root, names = tmp_path / "micro.gguf", tmp_path / "root", tmp_path / "names"
    export(load(trained / "checkpoint.npz")[0], text / "tokenizer.json", source, name="micro", type="F32")
    Registry(root, names).put(Name("micro", str(source), digest=burn(source, root).digest))
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM("micro", root=root, names=names, threads=1, kv_bytes=64 << 20) as llm:
        said = llm.chat([{"role": "system", "content": "import os"}, {"role": "user", "content": "def f("}], sampling)
        assert said.token_ids == llm.generate("import os\ndef f(", sampling).token_ids
        assert said.prompt_tokens == len(llm.encode("import os\ndef f("))
