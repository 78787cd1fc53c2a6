"""Training, alone or by distillation from a larger model.

Run: python -m train.train CORPUS OUT --shape mini [--steps N] [--teacher CHECKPOINT]. The same command goes on where it
was stopped: OUT/checkpoint.npz holds weights, optimizer and step, and the batch of a step depends on seed and step
alone. OUT/log.jsonl has one line every LOG_EVERY steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.model import SHAPES, Decoder

LOG_EVERY = 10
PROBE = 1024  # side of the matrices whose product decides between bfloat16 and float32
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the corpus. `batch` sequences of `context` tokens a step; rates peak after
    `warmup` steps and fall by a cosine to a tenth. `teacher_weight`: share of the loss that is the teacher's."""

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


def optimizer(model: Decoder, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); norm weights do not decay."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": recipe.decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))


def rate_at(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def batch_at(step: int, tokens: np.ndarray, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, context) of a step, from random places of the corpus."""
    places = np.random.default_rng([recipe.seed, step]).integers(0, len(tokens) - recipe.context, recipe.batch)
    rows = torch.from_numpy(np.stack([tokens[at : at + recipe.context + 1] for at in places]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def loss_of(logits: Tensor, targets: Tensor, taught: Tensor | None, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """(what is minimized, cross-entropy), nats a token. taught: the teacher's logits; its share of the loss is the
    Kullback-Leibler divergence from its distribution (Hinton et al. 2015, at temperature 1)."""
    scores = functional.log_softmax(logits.float().flatten(0, 1), dim=-1)
    entropy = functional.nll_loss(scores, targets.flatten())
    if taught is None:
        return entropy, entropy.detach()
    goal = functional.log_softmax(taught.float().flatten(0, 1), dim=-1)
    divergence = functional.kl_div(scores, goal, reduction="batchmean", log_target=True)
    return (1 - teacher_weight) * entropy + teacher_weight * divergence, entropy.detach()


def save(path: Path, model: Decoder, adam: torch.optim.AdamW, step: int, recipe: Recipe) -> None:
    """Write a checkpoint after `step` steps; it has its name only when it is whole."""
    arrays = {"step": np.int64(step), "recipe": np.frombuffer(json.dumps(vars(recipe)).encode(), np.uint8)}
    for name, parameter in model.named_parameters():
        arrays[f"weight/{name}"] = parameter.detach().cpu().numpy()
        for moment in MOMENTS if step else ():
            arrays[f"{moment}/{name}"] = adam.state[parameter][moment].cpu().numpy()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> tuple[Decoder, Recipe]:
    """The model of a checkpoint, on the CPU."""
    with np.load(path, allow_pickle=False) as arrays:
        recipe = _recipe(arrays)
        model = decoder(recipe)
        _fill(model, arrays)
    return model, recipe


def resume(path: Path, model: Decoder, adam: torch.optim.AdamW, recipe: Recipe) -> int:
    """Go on from a checkpoint; returns its step. Raises SystemExit where it was made by another recipe."""
    with np.load(path, allow_pickle=False) as arrays:
        if _recipe(arrays) != recipe:
            raise SystemExit(f"{path} was made by another recipe: {_recipe(arrays)}. Give another OUT, or that recipe.")
        _fill(model, arrays)
        step = int(arrays["step"])
        for name, parameter in model.named_parameters():
            moments = {moment: torch.from_numpy(arrays[f"{moment}/{name}"]).to(parameter) for moment in MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


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
    teacher: Decoder | None = None,
    until: int | None = None,
    save_every: int,
) -> Decoder:
    """Train to the recipe's last step, or stop after step `until`; a checkpoint is left behind. Returns the model."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = bf16_is_fast(device)
    tokens = np.load(corpus / "train.tokens.npy", mmap_mode="r", allow_pickle=False)
    model = decoder(recipe).to(device)
    adam = optimizer(model, recipe)
    checkpoint, log = out / "checkpoint.npz", out / "log.jsonl"
    first = resume(checkpoint, model, adam, recipe) if checkpoint.exists() else 0
    if teacher is not None:
        teacher.to(device).requires_grad_(False)
    _forget_after(log, first)
    last = min(recipe.steps, until or recipe.steps)
    parameters = sum(p.numel() for p in model.parameters())
    where = f"{device} in {'bf16' if bf16 else 'f32'}"
    print(f"{parameters:,} parameters, {len(tokens):,} tokens, {where}, steps {first}..{last}")
    precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    began, counted = time.perf_counter(), first
    for step in range(first, last):
        inputs, targets = (each.to(device) for each in batch_at(step, tokens, recipe))
        for group in adam.param_groups:
            group["lr"] = rate_at(step, recipe)
        with precision:
            taught = teacher(inputs) if teacher is not None else None
            loss, entropy = loss_of(model(inputs), targets, taught, recipe.teacher_weight)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        done = step + 1
        if done % LOG_EVERY == 0 or done == last:
            nats, now = entropy.item(), time.perf_counter()
            speed = (done - counted) * recipe.batch * recipe.context / (now - began)
            left = (last - done) * recipe.batch * recipe.context / speed
            began, counted = now, done
            with log.open("a") as lines:
                lines.write(json.dumps({"step": done, "loss": nats, "tokens_per_second": round(speed)}) + "\n")
            print(f"step {done}/{last}  loss {nats:.4f}  {speed:,.0f} tokens/s  {left / 60:.1f} min left", flush=True)
        if done % save_every == 0 or done == last:
            save(checkpoint, model, adam, done, recipe)
    return model


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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=Path, help="a checkpoint to distil from")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="its share of the loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--until", type=int, help="stop after this step; the schedule stays that of --steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    teacher = load(args.teacher)[0] if args.teacher else None
    with (args.corpus / "tokenizer.json").open() as file:
        vocabulary = len(json.load(file)["model"]["vocab"])
    if teacher is not None and teacher.spec.vocabulary != vocabulary:
        raise SystemExit("The teacher has another vocabulary.")
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
        teacher_weight=args.teacher_weight if teacher else 0.0,
    )
    train(args.corpus, args.out, recipe, teacher=teacher, until=args.until, save_every=args.save_every)


if __name__ == "__main__":
    main()
