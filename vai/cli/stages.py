"""The four stages of one request, as `vai trace` shows them; vai/telemetry.py says what they are."""

from __future__ import annotations

from vai.cli.output import table
from vai.config import Config

PROMPT = "The quick brown fox jumps over the lazy dog."
TOKENS = 16  # of the answer
_WHAT = {
    "loader": "image attached, tokenizer built",
    "preprocessor": "text to tokens",
    "queue": "waiting for room and for others",
    "core": "the engine's steps",
    "prefill": "  up to the first token",
    "decode": "  from there to the last",
    "postprocessor": "tokens to text",
}


def stages_of(settings: Config, digest: str) -> dict[str, float]:
    """Seconds of each stage of a model's first request, a short one, in an engine made for it."""
    from vai.llm import LLM
    from vai.request import SamplingParams

    with LLM(digest, root=settings.root, names=settings.names) as llm:
        answer = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=TOKENS))
    return answer.stages.as_dict()


def show(stages: dict[str, float]) -> None:
    """For people."""
    rows = [(stage, f"{1e3 * seconds:.3f}", _WHAT[stage]) for stage, seconds in stages.items()]
    table(("STAGE", "MS", ""), rows)
