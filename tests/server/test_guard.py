"""What is kept out: strangers without a key, other sites' pages, requests without end, readers that do not read."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

import pytest

from vai.server.guard import MAX_BODY, Hosts, host_of, is_loopback

from .conftest import Served, until

KEY = "sk-secret"
ROUTES = [
    "/v1/models",
    "/v1/models/x",
    "/v1/chat/completions",
    "/v1/completions",
    "/health",
    "/readyz",
    "/version",
    "/x",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"]


def test_every_route_and_method_but_livez_needs_the_key(serve: Callable[..., Served]) -> None:
    served = serve(api_key=KEY)
    for method in METHODS:
        for path in ROUTES:
            assert served.request(method, path).status_code == 401, (method, path)
            for wrong in ("Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer"):
                assert served.request(method, path, authorization=wrong).status_code == 401, (method, path, wrong)
    assert served.get("/livez").status_code == 200
    assert served.get("/v1/models", authorization=f"Bearer {KEY}").status_code == 200
    refused = served.get("/v1/models")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.nip.io:80"])
def test_a_host_that_is_not_this_server_is_refused_on_every_method(served: Served, host: str) -> None:
    for method in METHODS:
        answer = served.request(method, "/v1/models", host=host)
        assert answer.status_code == 403, (method, host)
    with served.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8642", "127.8.8.8"])
def test_loopback_names_are_answered(served: Served, host: str) -> None:
    assert served.get("/version", host=host).status_code == 200


def test_a_page_of_another_site_is_refused_and_gets_no_cors_headers(served: Served) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", "file://"):
        for method in METHODS:
            answer = served.request(method, "/v1/chat/completions", origin=origin)
            assert answer.status_code == 403, (method, origin)
            assert not [name for name in answer.headers if name.startswith("access-control")]
    own = served.get("/v1/models", origin=served.url)
    assert own.status_code == 200


def test_bound_to_every_address_literal_addresses_and_the_machines_name_are_answered() -> None:
    everywhere, here = Hosts("0.0.0.0"), Hosts("192.168.1.5")
    assert "10.1.2.3" in everywhere
    assert socket.gethostname().lower() in everywhere
    assert "evil.example" not in everywhere
    assert "192.168.1.5" in here
    assert "localhost" in here
    assert "10.1.2.3" not in here


def test_hosts_are_taken_apart_rightly() -> None:
    assert [host_of(text) for text in ("A:1", "[::1]:2", "a", "[::1]", "")] == ["a", "::1", "a", "::1", ""]
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "a.b")] == [True] * 3 + [
        False
    ] * 2


def test_a_body_over_the_limit_is_413_whether_its_length_is_declared_or_not(served: Served) -> None:
    big = b" " * (MAX_BODY + 1)
    declared = served.post("/v1/completions", big)
    chunked = served.http.post(served.url + "/v1/completions", content=iter([big]))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"y" * 70_000 + b"\r\n",
        b"".join(b"X-%d: y\r\n" % number for number in range(200)),
        b"X: " + b"y" * 1_000_000,  # never ends
    ],
)
def test_headers_over_the_cap_are_431(served: Served, head: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + head[:300_000])
        if not head.endswith(b"y"):
            connection.sendall(b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 431")


def test_a_url_over_the_cap_is_refused(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_400_with_an_error_body(served: Served) -> None:
    for junk in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with served.connect() as connection:
            connection.sendall(junk)
            assert connection.recv(2000).startswith(b"HTTP/1.1 400")


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the other end closes the connection in time, whatever it sends before."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GE",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
)
def test_half_a_request_is_closed_at_the_receive_deadline(serve: Callable[..., Served], start: bytes) -> None:
    served = serve(quick=True)
    with served.connect() as connection:
        connection.sendall(start)
        assert closed_within(connection, 5)


def test_bytes_that_begin_no_request_do_not_hold_a_connection(serve: Callable[..., Served]) -> None:
    served = serve(quick=True)
    with served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        assert closed_within(connection, 3)


def test_dripping_bytes_does_not_move_the_receive_deadline(serve: Callable[..., Served]) -> None:
    served = serve(quick=True)
    with served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        connection.settimeout(0.05)
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < 5:
            try:
                connection.sendall(b"y")
                closed = connection.recv(100) == b""
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                closed = True
        assert closed


def test_a_generation_longer_than_the_receive_deadline_is_not_cut(serve: Callable[..., Served]) -> None:
    served = serve(quick=True)
    served.script.stall_after = 4
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 40, "stream": True}
    with served.connect() as connection:
        connection.sendall(served.raw_request("/v1/completions", body))
        until(lambda: served.script.open_streams == 1)
        assert not closed_within(connection, 1.2)
        assert served.script.open_streams == 1


def test_a_reader_that_does_not_read_is_closed_and_its_generation_ends(serve: Callable[..., Served]) -> None:
    served = serve(quick=True)
    served.script.answer = "x" * (16 << 20)
    served.script.chunk = 1 << 16
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 1 << 24, "stream": True}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(served.raw_request("/v1/completions", body))
        until(lambda: served.script.open_streams == 1)
        until(lambda: served.script.open_streams == 0)


def test_a_pipelined_half_request_is_closed_after_the_answer(serve: Callable[..., Served]) -> None:
    served = serve(quick=True)
    first = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(first + b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert closed_within(connection, 5)


def test_one_line_a_request_is_logged_without_prompt_or_key(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(api_key=KEY)
    with caplog.at_level(logging.INFO, logger="vai.access"):
        body = {"model": "tiny", "prompt": "my secret diary", "max_tokens": 40}
        served.post("/v1/completions?x=query", body, authorization=f"Bearer {KEY}")
        # A server of an earlier test may only now log what its client left.
        answered = "POST /v1/completions 200"
        until(lambda: [record for record in caplog.records if answered in record.getMessage()])
    (line,) = [record.getMessage() for record in caplog.records if answered in record.getMessage()]
    assert "prompt=15 completion=24 finish=stop" in line
    assert "secret" not in line
    assert "query" not in line
