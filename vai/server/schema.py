"""What clients write and what they get back: the OpenAI wire format as typed structs, bounds in the types.

A field is one of three things, and never silently a fourth: it does what it says, it is harmless whatever it says
(`user`, `metadata`, ...), or it is refused by name. `decode_chat` and `decode_completion` raise BadRequest, or
NotSupported for what is meaningful but not done here, with `param` naming the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from vai.errors import BadRequest, NotSupported, VaiError
from vai.llm import MAX_TOOLS, ToolChoice, ToolList, Tools, offered
from vai.request import (
    MAX_CHOICES,
    MAX_GUESSES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SALT,
    MAX_STOP_IDS,
    LogitBias,
    Penalty,
    RepetitionPenalty,
    TokenId,
)
from vai.server.caching import CacheControl, SessionId, retain_of
from vai.server.structured import Constrained

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
_SHOWN = 80  # characters of a client's own words that an error message repeats

ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Harmless = Annotated[str, Meta(max_length=1 << 16)] | None
Anything = msgspec.Raw | UnsetType
CallId = Annotated[str, Meta(max_length=256)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = (
    Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
    | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(Constrained, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields that both kinds of request have. None is the same as absent, as in the OpenAI clients."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None  # -1 and 0 are off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    max_tokens: Tokens | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS // 2)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    cache_prompt: bool | None = None  # llama.cpp's word: false neither reads the prefix cache nor adds to it
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT)] | None = None  # vLLM's: whose prefix cache
    cache_control: CacheControl | None = None
    session_id: SessionId | None = None
    # llama.cpp's: how tokens are guessed ahead, and how many at a time; 0 for none. The answer is the same.
    speculative_type: Literal["none", "ngram-simple", "draft"] | None = msgspec.field(
        default=None, name="speculative.type"
    )
    speculative_n_max: Annotated[int, Meta(ge=0, le=MAX_GUESSES)] | None = msgspec.field(
        default=None, name="speculative.n_max"
    )
    stages: bool | None = None  # ours: the answer says what each stage of the request took
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, lt=MAX_PRIORITY)] | None = None  # vLLM's: lower goes first
    deterministic: bool | None = None  # ours: weights and tokens alone decide on the answer, not what is cached
    # Harmless whatever they say.
    user: Harmless = None
    metadata: dict[str, str] | None = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    # Taken with the value that asks for nothing, else refused: REFUSED below.
    service_tier: Harmless = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    prompt_logprobs: Anything = UNSET
    truncate_prompt_tokens: Anything = UNSET
    allowed_token_ids: Anything = UNSET
    bad_words: list[msgspec.Raw] | None = None
    logits_processors: list[msgspec.Raw] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    kv_transfer_params: Anything = UNSET
    vllm_xargs: Anything = UNSET


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One piece of a message's content. Only text is taken."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None
    image_url: Anything = UNSET
    input_audio: Anything = UNSET
    file: Anything = UNSET
    refusal: Anything = UNSET
    prompt_cache_breakpoint: Anything = UNSET
    cache_control: CacheControl | None = None


class PastFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model called: arguments are JSON text, unless it wrote something else."""

    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    arguments: Annotated[str, Meta(max_length=1 << 20)]


class PastCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call in an earlier turn. `index` is there where a client kept what was streamed."""

    id: CallId
    function: PastFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One turn of a conversation, as the client wrote it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Meta(min_length=1, max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[PastCall], Meta(max_length=MAX_TOOLS)] | None = None
    function_call: Anything = UNSET
    tool_call_id: CallId | None = None
    audio: Anything = UNSET
    annotations: list[msgspec.Raw] | None = None
    reasoning_content: str | None = None


class ChatRequest(Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    verbosity: Harmless = None
    store: bool | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoice | None = None
    functions: list[msgspec.Raw] | None = None
    function_call: Anything = UNSET
    modalities: list[str] | None = None
    reasoning_effort: Harmless = None
    chat_template_kwargs: dict[str, msgspec.Raw] | None = None
    audio: Anything = UNSET
    prediction: Anything = UNSET
    web_search_options: Anything = UNSET
    moderation: Anything = UNSET
    prompt_cache_options: Anything = UNSET
    prompt_cache_retention: Anything = UNSET
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[msgspec.Raw] | None = None
    chat_template: Anything = UNSET
    mm_processor_kwargs: Anything = UNSET
    include_reasoning: bool | None = None


class CompletionRequest(Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions. `prompt` is one text, one list of token ids, or a list of either; `echo` repeats it."""

    prompt: str | Annotated[list[TokenId | str | list[TokenId]], Meta(min_length=1, max_length=1 << 22)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=16384)] | None = None
    prompt_embeds: Anything = UNSET


# How tokens are guessed, in llama.cpp's words and in ours.
SPECULATION = {None: None, "none": "off", "ngram-simple": "ngram", "draft": "draft"}

# -- reading ---------------------------------------------------------------------------------------------------------


def _null(value: object) -> bool:
    return isinstance(value, UnsetType) or (isinstance(value, msgspec.Raw) and bytes(value) == b"null")


def _one_of(*words: str) -> Callable[[Any], bool]:
    quoted = {f'"{word}"'.encode() for word in words}
    return lambda value: _null(value) or (bytes(value) in quoted if isinstance(value, msgspec.Raw) else value in words)


def _equal(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _empty(value: Any) -> bool:
    return not value


# Field -> whether its value asks for nothing. Whatever else is set is refused with code not_supported; null passes.
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "best_of": _equal(1),
    "service_tier": _one_of("auto", "default"),
    "skip_special_tokens": _equal(True),
    "spaces_between_special_tokens": _equal(True),
    "include_stop_str_in_output": _equal(False),
    "use_beam_search": _equal(False),
    "length_penalty": _equal(1),
    "prompt_logprobs": _null,
    "truncate_prompt_tokens": _null,
    "allowed_token_ids": _null,
    "bad_words": _empty,
    "logits_processors": _empty,
    "return_token_ids": _equal(False),
    "return_tokens_as_token_ids": _equal(False),
    "kv_transfer_params": _null,
    "vllm_xargs": _null,
    "prompt_embeds": _null,
    "store": _equal(False),
    "functions": _empty,
    "function_call": _one_of("none", "auto"),
    "modalities": _equal([], ["text"]),
    "reasoning_effort": _one_of("none"),
    "verbosity": _one_of("medium"),
    "audio": _null,
    "prediction": _null,
    "web_search_options": _null,
    "moderation": _null,
    "prompt_cache_options": _null,
    "prompt_cache_retention": _null,
    "suffix": _empty,
}
_REFUSED_IN_CHAT: dict[str, Callable[[Any], bool]] = {
    "echo": _equal(False),
    "add_generation_prompt": _equal(True),
    "continue_final_message": _equal(False),
    "add_special_tokens": _equal(False),
    "documents": _empty,
    "chat_template": _null,
    "mm_processor_kwargs": _null,
    "include_reasoning": _equal(True),
}
_REFUSED_IN_COMPLETION: dict[str, Callable[[Any], bool]] = {"add_special_tokens": _equal(True)}
_REFUSED_IN_MESSAGE: dict[str, Callable[[Any], bool]] = {
    "function_call": _null,
    "audio": _null,
}

R = TypeVar("R", ChatRequest, CompletionRequest)
_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _invalid(error: msgspec.ValidationError) -> BadRequest:
    """msgspec's message ("Expected ... - at `$.a[0]`" or "`key` in `$.a`") as a sentence, its field as param."""
    text, _, place = str(error).partition(" - at `")
    path = place.removeprefix("key` in `").removeprefix("$").rstrip("`").lstrip(".")
    _, marker, field = text.partition(" field `")
    if marker:
        name = _short(field.removesuffix("`"))
        path = f"{path}.{name}" if path else name
        if "missing" in text:
            return BadRequest(f"The field '{path}' is required.", param=path)
        return BadRequest(f"The field '{path}' is not known here; leave it out.", param=path)
    path = _short(path)
    if path:
        return BadRequest(f"The value of '{path}' is not valid: {_short(text).replace('`', '')}.", param=path)
    return BadRequest(f"The body must be a JSON object: {_short(text).replace('`', '')}.")


def _decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    try:
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {_short(str(error))}.") from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not valid UTF-8.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    _refuse(request, _REFUSED)
    options = request.stream_options
    if options is not None and not request.stream:
        raise BadRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if options is not None and options.include_obfuscation:
        raise NotSupported("'stream_options.include_obfuscation' is not supported.", param="stream_options")
    return request


def _refuse(request: msgspec.Struct, table: dict[str, Callable[[Any], bool]], prefix: str = "") -> None:
    for field in request.__struct_fields__:
        passes = table.get(field)
        value = getattr(request, field)
        if passes is not None and value is not None and not passes(value):
            name = prefix + field
            raise NotSupported(f"'{name}' is not supported here with this value; leave it out.", param=name)


def decode_chat(body: bytes) -> ChatRequest:
    """A chat request. Raises BadRequest or NotSupported."""
    request = _decode(_chat_decoder, body)
    _refuse(request, _REFUSED_IN_CHAT)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    given = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(given) > 1:
        raise BadRequest("'max_tokens' and 'max_completion_tokens' differ; send one.", param="max_completion_tokens")
    return request


def decode_completion(body: bytes) -> CompletionRequest:
    """A completion request. Raises BadRequest or NotSupported."""
    request = _decode(_completion_decoder, body)
    _refuse(request, _REFUSED_IN_COMPLETION)
    if request.echo and request.logprobs is not None:
        raise NotSupported("'echo' is not supported together with 'logprobs'; leave one of them out.", param="echo")
    return request


def tools_of(request: ChatRequest) -> Tools | None:
    """The functions on offer; None where the model is to call nothing. Raises BadRequest."""
    return offered(request.tools, request.tool_choice, request.parallel_tool_calls)


def variables_of(request: ChatRequest) -> dict[str, Any]:
    """What the chat template is told beside the messages. Raises BadRequest."""
    try:
        return {name: msgspec.json.decode(value) for name, value in (request.chat_template_kwargs or {}).items()}
    except RecursionError:
        raise BadRequest("'chat_template_kwargs' is nested too deeply.", param="chat_template_kwargs") from None


def retain(request: ChatRequest | CompletionRequest) -> int | None:
    """Seconds for which the pages of a request are kept after it; None where it does not say."""
    parts = [request.cache_control]
    if isinstance(request, ChatRequest):
        contents = (message.content for message in request.messages if isinstance(message.content, list))
        parts += [part.cache_control for content in contents for part in content]
    return retain_of(parts)


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages with their content as one text each. Raises BadRequest or NotSupported."""
    return [_plain(message, f"messages[{number}].") for number, message in enumerate(messages)]


def _plain(message: Message, prefix: str) -> dict[str, Any]:
    if message.role == "function":
        raise NotSupported("Messages of role 'function' are not supported; send role 'tool'.", param=prefix + "role")
    _refuse(message, _REFUSED_IN_MESSAGE, prefix)
    if message.role == "tool" and message.tool_call_id is None:
        raise BadRequest("A message of role 'tool' needs the 'tool_call_id'.", param=prefix + "tool_call_id")
    if message.role != "assistant" and message.tool_calls:
        raise BadRequest("Only a message of role 'assistant' has 'tool_calls'.", param=prefix + "tool_calls")
    plain: dict[str, Any] = {"role": str(message.role), "content": _text(message, prefix)}
    if message.role == "assistant":
        calls = [_plain_call(call) for call in message.tool_calls or ()]
        plain |= {"tool_calls": calls, "reasoning_content": message.reasoning_content}
    elif message.role == "tool":
        plain["tool_call_id"] = message.tool_call_id
    return {key: value for key, value in (plain | {"name": message.name}).items() if value not in (None, [])}


def _plain_call(call: PastCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": call.type, "function": function}


def _text(message: Message, prefix: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""
        raise BadRequest(f"A message of role '{message.role}' needs content.", param=prefix + "content")
    pieces = []
    for number, part in enumerate(content):
        name = f"{prefix}content[{number}]"
        if part.type != "text":
            raise NotSupported(f"Content of type '{part.type}' is not supported; send text.", param=name + ".type")
        if part.text is None:
            raise BadRequest("A text part needs 'text'.", param=name + ".text")
        pieces.append(part.text)
    return "".join(pieces)


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids. Raises BadRequest."""
    found = _prompts(request.prompt)
    choices = len(found) * (request.n or 1)
    if choices > MAX_PROMPTS:
        raise BadRequest(
            f"{len(found)} prompts with {request.n or 1} choices each are {choices} answers; at most {MAX_PROMPTS} go "
            "in one request.",
            param="prompt" if len(found) > MAX_PROMPTS else "n",
        )
    return found


def _prompts(given: str | list[int | str | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise BadRequest("'prompt' mixes texts, token ids and lists; send one kind.", param="prompt")
    return [cast(list[int], given)] if int in kinds else cast(list[str | list[int]], given)


# -- writing ---------------------------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class CompletionDetails(msgspec.Struct, frozen=True):
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request; `cached_tokens` of the prompt were taken from the prefix cache.

    Tokens that were guessed ahead and stood are among those of the completion, rejected ones are not.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


def usage(prompt: int, completion: int, cached: int, guessed: int, accepted: int) -> Usage:
    details = CompletionDetails(accepted, guessed - accepted)
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached), details)


class TopLogprob(msgspec.Struct, frozen=True):
    """One candidate for a place: its text (damaged where the token is not whole UTF-8), and its exact bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]


class CompletionLogprobs(msgspec.Struct):
    """The older shape: parallel lists. `text_offset` counts characters from the start of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class CalledFunction(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function and its arguments as JSON text; in a stream the name once, the arguments in pieces."""

    arguments: str
    name: str | None = None


class MadeCall(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction
    type: str = "function"


class CallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of the `index`th call; `id` and `type` come with the first."""

    index: int
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class AnswerMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Chat(msgspec.Struct, frozen=True):
    """Answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    stages: dict[str, float] | UnsetType = UNSET
    object: str = "chat.completion"


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """Answer of /v1/completions, and one chunk of its stream, where `usage` is as in ChatChunk."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    stages: dict[str, float] | UnsetType = UNSET
    object: str = "text_completion"


class AnswerDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, frozen=True):
    """One chunk of a chat stream. `usage` is null until the last one where the client asked for it, else absent."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    stages: dict[str, float] | UnsetType = UNSET
    object: str = "chat.completion.chunk"


class ModelEntry(msgspec.Struct, frozen=True):
    """A named model. `max_model_len`: its context in tokens, null while it is not resident."""

    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "vai"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelEntry]
    object: str = "list"


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


encode = msgspec.json.Encoder().encode


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> bytes:
    """An OpenAI error body."""
    return encode(ErrorBody(ErrorDetail(message, kind, param, code)))


def error_bytes(error: VaiError) -> bytes:
    """The OpenAI error body of one of our errors."""
    return error_body(error.message, kind=error.type, code=error.code, param=error.param)
