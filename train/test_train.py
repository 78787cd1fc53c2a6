"""From text to a model that VAI serves, in small. Run: pytest train (with the extra "train"; `make test` does not)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from train import corpus, evaluate, tokenizer
from train.export import export
from train.model import greedy
from train.train import Recipe, load, train
from vai.burn.burn import burn
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
    train(text, out, recipe, save_every=100)
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


def test_training_lowers_the_loss(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20
    assert lines[-1]["loss"] < np.log(512) - 0.3


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    text: Path, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    train(text, tmp_path, recipe, until=7, save_every=5)
    train(text, tmp_path, recipe, save_every=100)
    resumed, _ = load(tmp_path / "checkpoint.npz")
    for name, parameter in load(trained / "checkpoint.npz")[0].named_parameters():
        assert torch.equal(parameter, dict(resumed.named_parameters())[name]), name


def test_another_recipe_does_not_go_on_from_a_checkpoint(text: Path, recipe: Recipe, trained: Path) -> None:
    with pytest.raises(SystemExit, match="another recipe"):
        train(text, trained, Recipe(**{**vars(recipe), "seed": 2}), save_every=100)


def test_a_student_is_pulled_towards_its_teacher(text: Path, recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    teacher, _ = load(trained / "checkpoint.npz")
    ids = torch.from_numpy(np.load(text / "train.tokens.npy")[:128].astype(np.int64))[None]
    with torch.no_grad():
        goal = teacher(ids).log_softmax(-1)
        distances = []
        for weight in (0.0, 1.0):
            taught = Recipe(**{**vars(recipe), "seed": 3, "teacher_weight": weight})
            with torch.enable_grad():
                student = train(text, tmp_path / str(weight), taught, teacher=teacher, save_every=100)
            scores = student(ids).log_softmax(-1)
            distances.append(float((goal.exp() * (goal - scores)).sum(-1).mean()))
    assert distances[1] < distances[0]


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
        assert ids == [learned.token_to_id(tokenizer.END), *learned.encode(PROMPT).ids]
        answer = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=COUNT))
    assert list(answer.token_ids) == greedy(model, ids, COUNT)
