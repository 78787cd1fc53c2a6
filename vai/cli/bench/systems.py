"""The servers under load: VAI's own processes, and a peer on the same files; each says what its processors did."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prometheus_client.parser import text_string_to_metric_families

from vai.cli.bench import peer
from vai.cli.bench.stand import DEADLINE, Stand, free_port
from vai.cli.bench.traffic import Target
from vai.errors import Unavailable
from vai.llm import connect

# The shortest way to a greedy token; with its other samplers on, the peer sorts and weighs what it will not use.
PEER_FIELDS = {"samplers": ["top_k"], "top_k": 1}
NAN = float("nan")


class Use(NamedTuple):
    """Seconds so far: CPU time of all processes, of VAI's server, of its engine outside native calls; time in those."""

    cpu: float
    server: float = NAN
    host: float = NAN
    native: float = NAN

    def since(self, before: Use) -> Use:
        return Use(*(now - then for now, then in zip(self, before, strict=True)))


class Counters(NamedTuple):
    """What VAI has counted so far: requests that ended, those that ran to their end, and those whose client left first;
    tokens as the server and as the engine counted them; connections that are open."""

    ended: int
    whole: int
    aborted: int
    tokens: int
    engine_tokens: int
    connections: int

    def since(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))

    def disagreements(self, *, clients: int, complete: int) -> list[str]:
        """What cannot be true after `clients` requests of which `complete` got their whole answer."""
        checks = {
            f"{self.ended} requests ended, but {clients} clients came": self.ended <= clients,
            f"{self.whole} + {self.aborted} are not {self.ended}": self.whole + self.aborted == self.ended,
            f"{complete} clients had their whole answer, {self.whole} were given": self.whole >= complete,
            f"the server counts {self.tokens} tokens, the engine {self.engine_tokens}": self.tokens
            <= self.engine_tokens,
            f"{self.connections} connections are left open": self.connections <= 0,
        }
        return [sentence for sentence, true in checks.items() if not true]


class System(Protocol):
    """A running server: its name and flags for the table, and where its models are."""

    name: str
    flags: str
    target: Target

    def use(self) -> Use: ...

    def rest(self) -> None:
        """Wait until it has nothing to do any more."""
        ...


def cpu_seconds(pid: int) -> float:
    """CPU time that a living process has used, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc(5)


def _sockets(pid: int) -> int:
    """Sockets that a process has open."""
    links = list(Path(f"/proc/{pid}/fd").iterdir())
    return sum(str(link.readlink()).startswith("socket:") for link in links)


class Vai:
    """VAI's processes on a stand that runs and has these models."""

    name = "vai"

    def __init__(self, stand: Stand, models: Sequence[str]) -> None:
        self.flags = f"--threads {stand.threads} --kv-bytes {stand.kv_bytes}"
        self.target = Target(dict.fromkeys(models, stand.port))
        self._socket = stand.root / "run/engine.sock"
        self._pids = stand.pids()

    def of(self, models: Sequence[str]) -> Vai:
        """The same processes, asked for these models only."""
        other = object.__new__(Vai)
        other.__dict__.update(self.__dict__, target=Target({name: self.target.ports[name] for name in models}))
        return other

    def status(self) -> Any:
        """The engine's own (vai.engine.port.EngineStatus)."""

        async def ask() -> Any:
            port = connect(self._socket)
            try:
                return await port.status()
            finally:
                await port.close()

        return asyncio.run(ask())

    def counters(self) -> Counters:
        ended: dict[str, float] = {}
        tokens = 0.0
        with urllib.request.urlopen(f"http://127.0.0.1:{next(iter(self.target.ports.values()))}/metrics") as answer:
            page = answer.read().decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "vllm:request_success_total":
                    how = sample.labels["finished_reason"]
                    ended[how] = ended.get(how, 0) + sample.value
                elif sample.name == "vllm:generation_tokens_total":
                    tokens += sample.value
        return Counters(
            ended=int(sum(ended.values())),
            whole=int(ended.get("stop", 0) + ended.get("length", 0)),
            aborted=int(ended.get("abort", 0)),
            tokens=int(tokens),
            engine_tokens=sum(model.tokens for model in self.status().models),
            connections=_sockets(self._pids["server"]),
        )

    def use(self) -> Use:
        status = self.status()
        server = cpu_seconds(self._pids["server"])
        return Use(cpu_seconds(self._pids["engine"]) + server, server, status.host_seconds, status.native_seconds)

    def rest(self) -> None:
        """Wait until every request is over and every page back. Raises Unavailable where that does not happen."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            status = self.status()
            if status.pool_used == 0 and not any(model.running or model.waiting for model in status.models):
                return
            time.sleep(0.05)
        raise Unavailable(f"The engine did not come to rest in {DEADLINE:.0f} s: {status}.")


class Peer:
    """A llama-server for each file, all on the same threads."""

    def __init__(self, name: str, flags: str, target: Target, pids: Sequence[int]) -> None:
        self.name, self.flags, self.target, self._pids = name, flags, target, pids

    def use(self) -> Use:
        return Use(sum(map(cpu_seconds, self._pids)))

    def rest(self) -> None:
        """It is started for one run only."""


@contextmanager
def peers(binary: Path, files: Sequence[Path], *, name: str, words: Sequence[str]) -> Iterator[Peer]:
    """The peer on each of these files, with these flags. Raises Unavailable."""
    with ExitStack() as stack:
        ports, pids = {}, []
        for file in files:
            port = free_port()
            process = stack.enter_context(peer.running(binary, file, port, words))
            ports[file.stem] = port
            pids.append(process.pid)
        yield Peer(name, " ".join(words), Target(ports, PEER_FIELDS), pids)
