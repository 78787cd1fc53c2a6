"""What travels between text and engine: a request in token ids, and what comes back for it. Words never get here.

Bounds live in the types, so that nothing out of range reaches the engine.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

TokenId = Annotated[int, Meta(ge=0, le=(1 << 24) - 1)]
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_CHOICES = 16  # answers to one prompt
MAX_SALT = 256  # characters
MAX_SESSION = 256
MAX_RETAIN = 86400  # seconds
MAX_PRIORITY = 1 << 31
MAX_GUESSES = 16  # of one step and request
MAX_KIND_BYTES = 1 << 16  # a bit for each page of the longest prompt
MAX_FAST = 32  # characters of a fast kind's name

Session = Annotated[str, Meta(max_length=MAX_SESSION)]
Retain = Annotated[float, Meta(ge=0, le=MAX_RETAIN)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100)]
LogitBias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `seed` None: one is drawn at admission and reported. `logprobs`: None for none, else how many alternatives (0..20)
    come with each chosen token.

    Off at 1, 0, 0 and {}: `repetition_penalty` divides the logits above 0 of tokens of prompt and answer, and
    multiplies the others (Keskar et al., 2019); `presence_penalty` is taken once, `frequency_penalty` for each time,
    from those of tokens of the answer (as in OpenAI's API); `logit_bias` is added to the logits of its ids. Order and
    rounding: kernels.program.Adjustments.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] = 1 << 24
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    stop_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_IDS)] = ()
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class Speculate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether tokens are guessed ahead, so that a step can verify several: the answer is the same, and sooner there.

    `kind`: "ngram" guesses what followed the last tokens where they stood before, in prompt or answer; "draft" does,
    too, while that mostly stands, and otherwise asks the resident image `draft`, a smaller model with the same
    vocabulary. At most `max_tokens` are guessed at a time, fewer or none where more would not pay.
    """

    kind: Literal["off", "ngram", "draft"] = "off"
    draft: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_GUESSES)] = 8


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One prompt for one model. `id` is unique within the connection; `image` is the digest of a resident image.

    A stop id ends the request with reason "stop" and is itself the last token reported. `max_tokens` is cut by the
    engine to what the context still holds; a prompt that fills the context is refused (ContextTooLong).
    `choice` keys the draws beside seed and position: with it one seed gives several answers to one prompt.
    `emitted`: how many of the last `tokens` are the answer's own beginning, made by an engine that went away; they
    count as made (max_tokens, min_tokens, penalties), and are not said again.
    `cache`: its beginning may be read from the prefix cache, and its pages are kept there for others, in both cases
    only for requests of the same `cache_salt`.
    `session`: names the conversation that it belongs to, within its salt. `retain`: seconds from its end on for which
    its pages are kept whoever needs room, as far as shares of the pool allow; 0: the conversation is over, and what
    only it has read is freed (scratchpad/retention.py).
    `constrained`: a token is drawn only under the mask that was sent for its place (engine/port.py); until it is there
    the others go on, and who waits for it too long is ended.
    `priority`: lower goes first, as in vLLM; how much, and for how long, says engine/priority.py.
    `deterministic`: every page of the prompt is computed in the exact kind, and taken from the prefix cache only if it
    and all before it were: the answer then depends on weights and tokens and nothing else, not even on what is cached.
    `page_kinds`: what an engine before this one chose, see Output; None where nothing was chosen yet (engine/kinds.py).
    `fast`: what computed the fast pages among them.
    """

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    image: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    tokens: Annotated[list[TokenId], Meta(min_length=1, max_length=1 << 24)]
    sampling: SamplingParams = SamplingParams()
    choice: Annotated[int, Meta(ge=0, lt=MAX_CHOICES)] = 0
    emitted: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    cache: bool = True
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT)] = ""
    session: Session = ""
    retain: Retain | None = None
    constrained: bool = False
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, lt=MAX_PRIORITY)] = 0
    speculate: Speculate = Speculate()
    deterministic: bool = False
    page_kinds: Annotated[bytes, Meta(max_length=MAX_KIND_BYTES)] | None = None
    fast: Annotated[str, Meta(max_length=MAX_FAST)] | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithm of the chosen token's probability before temperature and filters, and the best alternatives."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """Seconds by one monotonic clock of the engine: queued, until the prompt was computed, since the first token; and,
    before all, until its image was attached.
    """

    queued: float
    prefill: float
    decode: float
    attach: float = 0.0


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step brought for one request. The last one has `finish`: "stop", "length", "abort" or "error".

    `seed`, `cached_tokens` and `fingerprint` (engine/fingerprint.py) come with or before the first token; `timing` with
    it and, complete, with the last. So does `page_kinds`: bit i % 8 of byte i // 8 is set where page i of the prompt is
    of the fast kind, which `fast` computed; None where none is. `guessed` tokens were verified in this step, of which
    the first `accepted` stood and are among `tokens`. With "error", `error` is (code, sentence) of the VaiError to
    raise, and `retry_after` says after how many seconds it is worth trying again, where the engine knows.
    """

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish: str | None = None
    seed: int | None = None
    cached_tokens: int = 0
    error: tuple[str, str] | None = None
    timing: Timing | None = None
    fingerprint: str | None = None
    guessed: int = 0
    accepted: int = 0
    retry_after: float | None = None
    page_kinds: bytes | None = None
    fast: str | None = None
