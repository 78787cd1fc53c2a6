"""Every error VAI raises on purpose: a sentence for a person, an HTTP status, a process exit code.

An error that is not one of these is a bug. `type` and `code` are the words of the OpenAI error body.
"""

from __future__ import annotations


class VaiError(Exception):
    """Base of all errors. The message says what is wrong and the way out."""

    status: int = 500
    exit_code: int = 1
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(VaiError):
    """The request says something impossible: a value out of bounds, a field that contradicts another."""

    status, exit_code, type, code = 400, 2, "invalid_request_error", "invalid_value"


class NotSupported(BadRequest):
    """The request is meaningful, but VAI does not do this (yet): refused by name, never ignored."""

    code = "not_supported"


class ContextTooLong(BadRequest):
    """Prompt plus answer do not fit the model's context; the message has both numbers."""

    code = "context_length_exceeded"


class Unauthorized(VaiError):
    """No key, or a wrong one."""

    status, exit_code, type, code = 401, 2, "authentication_error", "invalid_api_key"


class ModelNotFound(VaiError):
    """No model of this name; the message lists those there are."""

    status, exit_code, type, code = 404, 4, "invalid_request_error", "model_not_found"


class BodyTooLarge(VaiError):
    """The request body is larger than the server takes."""

    status, exit_code, type, code = 413, 2, "invalid_request_error", "body_too_large"


class InUse(VaiError):
    """Somebody holds what was to be changed; the message names the holders."""

    status, exit_code, type, code = 409, 5, "invalid_request_error", "in_use"


class AlreadyRunning(VaiError):
    """A role is already held by a living process, named in the message."""

    status, exit_code, type, code = 409, 3, "server_error", "already_running"


class Overloaded(VaiError):
    """The queue is full; try again after `retry_after` seconds."""

    status, exit_code, type, code = 429, 6, "rate_limit_error", "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(VaiError):
    """A process that is needed is not there (now); the message says which, and how to start it."""

    status, exit_code, type, code = 503, 7, "server_error", "unavailable"


class NotEnoughRoom(VaiError):
    """The memory has no room for this: need, free and what could go are in the message."""

    status, exit_code, type, code = 503, 8, "server_error", "not_enough_room"


class MalformedFile(VaiError):
    """A checkpoint or another file from outside lies about itself."""

    status, exit_code, type, code = 400, 9, "invalid_request_error", "malformed_file"


class UnsupportedModel(VaiError):
    """A well-formed checkpoint of an architecture, tensor type or tokenizer that VAI does not run yet, by name."""

    status, exit_code, type, code = 400, 10, "invalid_request_error", "unsupported_model"


class CorruptImage(VaiError):
    """A ROM image does not have the bytes its hashes promise; the message names the section or tensor."""

    status, exit_code, type, code = 500, 11, "server_error", "corrupt_image"


class WrongVersion(VaiError):
    """An image or a peer process speaks another version of the format or protocol."""

    status, exit_code, type, code = 500, 12, "server_error", "wrong_version"


class Interrupted(VaiError):
    """The work was stopped before its end and left nothing behind."""

    status, exit_code, type, code = 503, 130, "server_error", "interrupted"


def by_code(code: str) -> type[VaiError]:
    """The error class whose wire `code` this is; VaiError itself where unknown."""
    seen: list[type[VaiError]] = [VaiError]
    for cls in seen:
        if cls.__dict__.get("code") == code or (cls is VaiError and cls.code == code):
            return cls
        seen.extend(cls.__subclasses__())
    return VaiError


def from_wire(code: str, message: str, retry_after: float | None = None) -> VaiError:
    """The error that another process met."""
    kind = by_code(code)
    if issubclass(kind, Overloaded) and retry_after is not None:
        return kind(message, retry_after=retry_after)
    return kind(message)
