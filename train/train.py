"""Training: a model alone, or with a student beside it that learns from the logits the model has anyway.

Run: python -m train.train CORPUS OUT --shape mini [--student nano] [--steps N]. The same command goes on where it was
stopped: OUT/checkpoint.npz (and OUT/student.npz) hold weights, optimizers and step, and the batch of a step depends on
seed and step alone. OUT/log.jsonl has one line every LOG_EVERY steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.model import SHAPES, Decoder
from train.muon import optimizers

LOG_EVERY = 10
PROBE = 1024  # side of the matrices whose product decides between bfloat16 and float32
LONG_FROM = 0.75  # share of the steps after which sequences have their whole length; before, a quarter of it
FALL_FROM = 0.5  # share of the steps after which the rate falls to nothing
MOMENTS = ("momentum", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the corpus. `batch` sequences of `context` tokens a step, or four times as many
    a quarter as long (LONG_FROM). `teacher_weight`: share of a student's loss that is the teacher's."""

    shape: str
    vocabulary: int
    context: int
    steps: int
    batch: int
    rate: float
    warmup: int
    decay: float
    seed: int
    teacher_weight: float


def decoder(recipe: Recipe) -> Decoder:
    """The model of a recipe with its first weights."""
    torch.manual_seed(recipe.seed)
    return Decoder(SHAPES[recipe.shape].spec(recipe.vocabulary, recipe.context))


def rate_at(step: int, recipe: Recipe) -> float:
    """Rises, stays, and falls to nothing in a straight line (Hägele et al. 2024)."""
    left = (recipe.steps - step) / (recipe.steps * (1 - FALL_FROM))
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup, left)


def batch_at(step: int, tokens: np.ndarray, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs and targets (sequences, their length) of a step, from random places of the corpus."""
    parts = 1 if step >= LONG_FROM * recipe.steps else 4
    length, count = recipe.context // parts, recipe.batch * parts
    places = np.random.default_rng([recipe.seed, step]).integers(0, len(tokens) - length, count)
    rows = torch.from_numpy(np.stack([tokens[at : at + length + 1] for at in places]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def loss_of(logits: Tensor, targets: Tensor, taught: Tensor | None, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """(what is minimized, cross-entropy), nats a token, of logits (tokens, vocabulary) and targets (tokens).

    taught: the teacher's logits; its share of the loss is the Kullback-Leibler divergence from its distribution
    (Hinton et al. 2015, at temperature 1).
    """
    scores = functional.log_softmax(logits.float(), dim=-1)
    entropy = functional.nll_loss(scores, targets)
    if taught is None:
        return entropy, entropy.detach()
    goal = functional.log_softmax(taught.float(), dim=-1)
    divergence = functional.kl_div(scores, goal, reduction="batchmean", log_target=True)
    return (1 - teacher_weight) * entropy + teacher_weight * divergence, entropy.detach()


def recipe_of(checkpoint: Path) -> Recipe:
    """What a checkpoint was made by."""
    with np.load(checkpoint, allow_pickle=False) as arrays:
        return _recipe(arrays)


class Learner:
    """A model with its optimizers and the file it is kept in; it goes on where that file was left.

    Raises SystemExit where the file was made by another recipe. Another number of steps is no other recipe as long as
    both come to the same until then.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path, device: torch.device, *, bf16: bool, compiled: bool) -> None:
        self.recipe = recipe
        self._precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.model = decoder(recipe).to(device)
        self.step = 0
        self._checkpoint = checkpoint
        self._optimizers = optimizers(self.model, recipe.rate, recipe.decay)
        self._loss_of = loss_of
        if compiled:  # as it is written, the divergence reads and writes the logits of a whole batch a dozen times
            self.model.compile()
            self._loss_of = torch.compile(loss_of)
        if checkpoint.exists():
            self._resume()

    def learn(self, inputs: Tensor, targets: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take one step; returns (logits, cross-entropy in nats a token), both before it."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate_at(self.step, self.recipe)
        with self._precision:
            logits = self.model(inputs).flatten(0, 1)
            loss, entropy = self._loss_of(logits, targets.flatten(), taught, self.recipe.teacher_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        return logits.detach(), entropy

    def save(self) -> None:
        """Write the checkpoint; it has its name only when it is whole."""
        recipe = np.frombuffer(json.dumps(vars(self.recipe)).encode(), np.uint8)
        arrays = {"step": np.int64(self.step), "recipe": recipe}
        for name, parameter in self.model.named_parameters():
            arrays[f"weight/{name}"] = parameter.detach().cpu().numpy()
            for moment, values in self._state(parameter).items():
                if moment in MOMENTS:
                    arrays[f"{moment}/{name}"] = values.cpu().numpy()
        partial = self._checkpoint.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._checkpoint)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        return next((o.state[parameter] for o in self._optimizers if parameter in o.state), {})

    def _resume(self) -> None:
        with np.load(self._checkpoint, allow_pickle=False) as arrays:
            made, self.step = _recipe(arrays), int(arrays["step"])
            alike = self.step <= FALL_FROM * min(made.steps, self.recipe.steps)
            if made != self.recipe and not (alike and replace(made, steps=self.recipe.steps) == self.recipe):
                raise SystemExit(
                    f"{self._checkpoint} was made by another recipe: {made}. Give another OUT, or that recipe."
                )
            _fill(self.model, arrays)
            for optimizer in self._optimizers:
                of = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
                for name, parameter in self.model.named_parameters():
                    if id(parameter) in of:
                        kept = {moment: arrays.get(f"{moment}/{name}") for moment in MOMENTS}
                        moments = {
                            moment: torch.from_numpy(values).to(parameter)
                            for moment, values in kept.items()
                            if values is not None
                        }
                        if moments:  # before its first step an optimizer has none, and makes them itself
                            optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def load(path: Path) -> tuple[Decoder, Recipe]:
    """The model of a checkpoint, on the CPU."""
    with np.load(path, allow_pickle=False) as arrays:
        recipe = _recipe(arrays)
        model = decoder(recipe)
        _fill(model, arrays)
    return model, recipe


def _recipe(arrays: Mapping[str, np.ndarray]) -> Recipe:
    return Recipe(**json.loads(arrays["recipe"].tobytes()))


@torch.no_grad()
def _fill(model: Decoder, arrays: Mapping[str, np.ndarray]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(arrays[f"weight/{name}"]))


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a product in bfloat16 takes less time here than one in float32: by trying, as no flag tells."""
    if device.type != "cpu":
        return True
    seconds = []
    for kind in (torch.bfloat16, torch.float32):
        matrix = torch.ones(PROBE, PROBE, dtype=kind)
        matrix @ matrix
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return seconds[0] < seconds[1]


def train(
    corpus: Path,
    out: Path,
    recipe: Recipe,
    *,
    student: Recipe | None = None,
    until: int | None = None,
    save_every: int,
    compiled: bool,
) -> Decoder:
    """Train to the recipe's last step, or stop after step `until`; checkpoints are left behind. Returns the model.

    student: of a model that learns from the same batches and from what the first model makes of them. Where it has
    fewer steps they are the last ones, when the first model knows something. compiled: by torch.compile, which takes a
    minute or two and makes steps a fifth shorter.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = bf16_is_fast(device)
    tokens = np.load(corpus / "train.tokens.npy", mmap_mode="r", allow_pickle=False)
    learners = [Learner(recipe, out / "checkpoint.npz", device, bf16=bf16, compiled=compiled)]
    if student is not None:
        learners.append(Learner(student, out / "student.npz", device, bf16=bf16, compiled=compiled))
    first = learners[0].step
    starts = [recipe.steps - learner.recipe.steps for learner in learners]
    log = out / "log.jsonl"
    _forget_after(log, first)
    last = min(recipe.steps, until or recipe.steps)
    parameters = " and ".join(f"{sum(p.numel() for p in each.model.parameters()):,}" for each in learners)
    where = f"{device} in {'bf16' if bf16 else 'f32'}"
    print(f"{parameters} parameters, {len(tokens):,} tokens, {where}, steps {first}..{last}")
    began, counted = time.perf_counter(), first
    for step in range(first, last):
        inputs, targets = (each.to(device) for each in batch_at(step, tokens, recipe))
        logits, entropies = None, []
        for learner, start in zip(learners, starts, strict=True):
            if start + learner.step == step:
                logits, entropy = learner.learn(inputs, targets, logits)
                entropies.append(entropy)
        done = step + 1
        if done % LOG_EVERY == 0 or done == last:
            nats, now = [entropy.item() for entropy in entropies], time.perf_counter()
            speed = (done - counted) * recipe.batch * recipe.context / (now - began)
            left = (last - done) * recipe.batch * recipe.context / speed
            began, counted = now, done
            line = dict(zip(("loss", "student"), nats, strict=False))
            with log.open("a") as lines:
                lines.write(json.dumps({"step": done, **line, "tokens_per_second": round(speed)}) + "\n")
            losses = "  ".join(f"{name} {value:.4f}" for name, value in line.items())
            print(f"step {done}/{last}  {losses}  {speed:,.0f} tokens/s  {left / 60:.1f} min left", flush=True)
        if done % save_every == 0 or done == last:
            for learner in reversed(learners):  # stopped in between, a student is ahead, and waits
                learner.save()
    return learners[0].model


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that will be made again."""
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        log.write_text("".join(line + "\n" for line in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model on an encoded corpus; run again to go on.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--student", choices=sorted(SHAPES), help="a smaller model to distil into")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="share of the student's loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--until", type=int, help="stop after this step; the schedule stays that of --steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with (args.corpus / "tokenizer.json").open() as file:
        vocabulary = len(json.load(file)["model"]["vocab"])
    recipe = Recipe(
        shape=args.shape,
        vocabulary=vocabulary,
        context=args.context,
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        warmup=args.warmup,
        decay=args.decay,
        seed=args.seed,
        teacher_weight=0.0,
    )
    student = None
    if args.student:
        steps = args.steps - round(FALL_FROM * args.steps)
        student = replace(recipe, shape=args.student, steps=steps, teacher_weight=args.teacher_weight)
    train(args.corpus, args.out, recipe, student=student, until=args.until, save_every=args.save_every, compiled=True)


if __name__ == "__main__":
    main()
