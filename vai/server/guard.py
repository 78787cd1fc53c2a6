"""What stands between the network and the routes: access log, Host and Origin, the API key, the body limit."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from http import HTTPStatus
from math import ceil

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vai.errors import BodyTooLarge, NotEnoughRoom, Overloaded, Unauthorized, VaiError
from vai.server.schema import error_bytes
from vai.server.stream import ClientGone, stopping

MAX_BODY = 16 << 20
OPEN_PATHS = frozenset({"/livez"})  # answered to anybody: it says nothing but that the process lives
CLIENT_CLOSED = 499  # nginx's word for it; only ever seen in the log
_RETRY_SECONDS = {Overloaded.status: 1.0, 503: 1.0}
_access = logging.getLogger("vai.access")
_log = logging.getLogger("vai.server")


class Forbidden(VaiError):
    """A browser page of another site, or a name that does not belong to this server, is behind the request."""

    status, exit_code, type, code = 403, 2, "invalid_request_error", "forbidden"


def error_response(error: VaiError, headers: dict[str, str] | None = None) -> Response:
    """The answer for one of our errors, saying whether trying again can help."""
    known = dict(headers or {})
    if error.status in _RETRY_SECONDS:
        wait = error.retry_after if isinstance(error, Overloaded) else _RETRY_SECONDS[error.status]
        known["retry-after"] = str(max(1, ceil(wait)))
    if error.status not in _RETRY_SECONDS or isinstance(error, NotEnoughRoom):
        known["x-should-retry"] = "false"
    if error.status == Unauthorized.status:
        known["www-authenticate"] = "Bearer"
    return Response(error_bytes(error), error.status, known, media_type="application/json")


def header(scope: Scope, name: bytes) -> list[str]:
    """All values of one header, lower-case name."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def host_of(authority: str) -> str:
    """'name:port' or '[v6]:port' -> the host in lower case, without port and brackets."""
    authority = authority.strip().lower()
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether nothing outside this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Hosts:
    """The names this server answers to. DNS rebinding needs a name of the attacker's, so any other is refused.

    Bound to every address, it also answers to literal addresses (which cannot be rebound) and to this machine's name.
    """

    def __init__(self, bound: str) -> None:
        self._names = {bound.lower(), "localhost"}
        self._any_address = bound in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        if self._any_address:
            self._names.add(socket.gethostname().lower())

    def __contains__(self, host: str) -> bool:
        return host in self._names or is_loopback(host) or (self._any_address and _is_address(host))

    def check(self, scope: Scope) -> None:
        """Raise Forbidden unless Host is ours and Origin, where there is one, is the same place as Host."""
        hosts = header(scope, b"host")
        if len(hosts) != 1 or host_of(hosts[0]) not in self:
            raise Forbidden("The Host header does not name this server; use the address it was started with.")
        for origin in header(scope, b"origin"):
            if origin.partition("://")[2].lower() != hosts[0].strip().lower():
                raise Forbidden("Requests from pages of other sites (Origin header) are not answered.")


class Guard:
    """The outermost layer: one log line a request; Host, Origin and key are checked before anything is routed."""

    def __init__(self, app: ASGIApp, *, hosts: Hosts, api_key: str | None) -> None:
        self._app = app
        self._hosts = hosts
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        notes: dict[str, object] = {}
        scope["vai.notes"] = notes
        try:
            await self._answer(scope, receive, noting)
        except ClientGone:
            status = CLIENT_CLOSED
        except asyncio.CancelledError:  # uvicorn's grace period is over; a stream has said so itself
            if not status:
                await error_response(stopping())(scope, receive, noting)
        except Exception:
            _log.exception("A request failed.")
            if status:
                raise  # the answer has begun: uvicorn closes the connection
            await error_response(VaiError("The server failed; its log says why."))(scope, receive, noting)
        finally:
            extra = "".join(f" {key}={value}" for key, value in notes.items())
            seconds = time.monotonic() - started
            peer = scope["client"][0] if scope["client"] else "-"
            path = scope["raw_path"][:200].decode("ascii", "backslashreplace")
            _access.info("%s %s %s %d %.3fs%s", peer, scope["method"], path, status, seconds, extra)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in OPEN_PATHS:
                self._hosts.check(scope)
                self._check_key(scope)
        except VaiError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["app"] = self  # without one, Starlette's router answers 404 and 405 itself, in plain text
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None:
            return
        for value in header(scope, b"authorization"):
            scheme, _, key = value.partition(" ")
            given = hashlib.sha256(key.strip().encode("latin-1")).digest()
            if scheme.lower() == "bearer" and hmac.compare_digest(given, self._key):
                return
        raise Unauthorized("This server needs its API key: send the header 'Authorization: Bearer KEY'.")


async def read_body(scope: Scope, receive: Receive, limit: int = MAX_BODY) -> bytes:
    """The whole body. Raises BodyTooLarge, at once where the declared length says so, and ClientGone."""
    too_large = BodyTooLarge(f"The request body is over {limit} bytes, the most this server takes.")
    for declared in header(scope, b"content-length"):
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        more = message.get("more_body", False)
    return bytes(body)


def status_phrase(status: int) -> str:
    """'Method Not Allowed' for 405."""
    return HTTPStatus(status).phrase
