"""The smallest clients that can time a server: raw sockets, standard library only.

Run as a program it is the *fresh client process* of the switch benchmark: it sends one prompt, reads the stream and
prints one line of JSON. The clock starts when the request is sent; starting Python is not the server's time.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any


class Raw:
    """One keep-alive HTTP/1.1 connection; `post` returns (seconds, status, body)."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"{host}:{port}"
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: dict[str, Any]) -> tuple[float, int, bytes]:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._address}\r\nContent-Type: application/json\r\n"
        message = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        start = time.perf_counter()
        self._socket.sendall(message)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._some()
        header, _, rest = received.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(rest) < length:
            rest += self._some()
        return time.perf_counter() - start, int(header.split(b" ", 2)[1]), rest

    def _some(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def close(self) -> None:
        self._socket.close()


def stream(host: str, port: int, model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """Stream one completion. Returns first (seconds to the first token), total (seconds), tokens and text."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "speculative.n_max": 0,  # random weights repeat themselves as no text does
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    first, tokens, text = None, 0, ""
    with socket.create_connection((host, port)) as connection:
        start = time.perf_counter()
        connection.sendall(head.encode() + data)
        # Each write of the server is whole lines; the lines of chunked framing between them are not data.
        for line in connection.makefile("rb"):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if first is None:
                first = time.perf_counter() - start
            text += "".join(choice["text"] for choice in event["choices"])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        total = time.perf_counter() - start
    return {"first": first, "total": total, "tokens": tokens, "text": text}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(stream(**json.loads(sys.argv[1]))) + "\n")
