"""The loss of one or more runs over the tokens they have seen, as a picture.

Run: python -m train.curves OUT.svg NAME=RUN/log.jsonl [NAME=RUN/log.jsonl ...]. A point is the mean of SMOOTH lines of
the log; the loss of a student in a log is a curve of its own, NAME's student.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from train.train import recipe_of
from vai.cli.bench.chart import Panel, chart

SMOOTH = 4


def curves(name: str, log: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (thousand tokens seen, bits a token) of each model that the log tells of."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    recipe = recipe_of(log.with_name("checkpoint.npz"))
    found = {}
    for key, label in (("loss", name), ("student", f"{name}'s student")):
        told = np.array([(line["step"], line[key]) for line in lines if key in line])
        whole = told[: len(told) // SMOOTH * SMOOTH].reshape(-1, SMOOTH, 2)
        found[label] = [
            (round(step * recipe.batch * recipe.context / 1000), nats / math.log(2))
            for step, nats in zip(whole[:, -1, 0], whole[:, :, 1].mean(axis=1), strict=True)
        ]
    return {label: points for label, points in found.items() if points}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss curves.")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG")
    args = parser.parse_args()
    series: dict[str, list[tuple[int, float]]] = {}
    for run in args.runs:
        name, _, log = run.partition("=")
        series |= curves(name, Path(log))
    panel = Panel("Training loss", "thousand tokens seen", "bits a token", series)
    args.out.write_text(chart("What the models learn from the same text", [panel]))


if __name__ == "__main__":
    main()
