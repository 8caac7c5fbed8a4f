"""What the proxy costs beside a bare aiohttp pass-through, in the same run on the same machine.

``python -m benchmarks.proxy --json``: a provider that answers at once, a bare pass-through (no
keys, no books) and intentd-proxy as processes of their own, one worker each; rounds alternate.
The proxy checks a key, adds metadata, keeps books and metrics; once more with a budget on the key,
which is on disk before each prompt leaves. Then: every service type, streams whose chunks come one
at a time or all at once, a thousand streams held, clients that leave. With --gateways DIR (see
benchmarks.proxy_gateways) LiteLLM and Portkey take part in the same rounds. Bars: >= .70 of the
pass-through's requests a second and >= 20 times LiteLLM's, <= .4 ms of processor a request,
<= 15 us a streamed chunk (one at a time, the dear way; beside it chunks that come together), <= 1.2
ms added to the median at a provider that takes 50 ms, < 90 MB after the start, the upstream call
stopped <= 100 ms after its client left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import proxy_gateways
from benchmarks.proxy_process import ProxyProcess, progress

RATIO_BAR = 0.70
CPU_BAR_MS = 0.4
CHUNK_BAR_US = 15.0
ADDED_BAR_MS = 1.2
MEMORY_BAR_MB = 90.0
LITELLM_BAR = 20.0
LEFT_BAR_MS = 100.0
HELD_STREAMS = 1000
TYPES = (
    "fixed", "cost", "quality", "usage_based", "latency", "model_selector", "smart_context",
    "smart_cache", "router",
)  # fmt: skip
PROMPT = "Explain in a few sentences how a semantic cache for language models works. " * 6
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def cpu_s(pid: int) -> float:
    """Processor seconds of a process, in the kernel's accounting of nanoseconds."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def request_bytes(
    port: int, key: str, model: str, *, stream: bool = False, headers: str = ""
) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 200,
            **({"stream": True} if stream else {}),
        },
        separators=(",", ":"),
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {key}\r\n{headers}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Held:
    """How many streams run at once."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it was answered, until the time is over."""

    def __init__(
        self,
        request: bytes,
        until_s: float,
        seconds: list[float],
        streams: bool,
        held: Held | None = None,
    ) -> None:
        self.held = held
        self.began = False
        self.request = request
        self.until_s = until_s
        self.seconds = seconds
        self.streams = streams
        self.data = bytearray()
        self.failed = ""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked_s = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.streams:
            if self.held is not None and not self.began:
                self.began = True
                self.held.now += 1
                self.held.most = max(self.held.most, self.held.now)
            if not self.data.endswith(b"0\r\n\r\n"):
                return
            if b"[DONE]" not in self.data[-200:]:
                self.end("a stream without [DONE]")
                return
        else:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            found = _LENGTH.search(self.data, 0, end)
            if found is None:
                if not self.data.endswith(b"0\r\n\r\n"):
                    return
            elif len(self.data) < end + 4 + int(found.group(1)):
                return
        if not self.data.startswith(b"HTTP/1.1 200"):
            self.end(bytes(self.data[:300]).decode(errors="replace"))
            return
        self.data.clear()
        now = time.perf_counter()
        self.seconds.append(now - self.asked_s)
        if now >= self.until_s:
            self.end()
        else:
            self.ask()

    def end(self, failed: str = "") -> None:
        self.failed = failed
        if self.held is not None:
            self.held.now -= self.began
        self.transport.close()
        if not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.failed = f"connection lost: {error}"
            self.done.set_result(None)


async def load(
    port: int,
    request: bytes,
    connections: int,
    for_s: float,
    *,
    streams: bool = False,
    held: Held | None = None,
) -> list[float]:
    """Seconds of each answer of a closed loop. Raises RuntimeError for any other answer."""
    seconds: list[float] = []
    until_s = time.perf_counter() + for_s
    loop = asyncio.get_running_loop()
    clients = [
        (
            await loop.create_connection(
                lambda: Client(request, until_s, seconds, streams, held), "127.0.0.1", port
            )
        )[1]
        for _ in range(connections)
    ]
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), for_s + 120)
    failures = [client.failed for client in clients if client.failed]
    if failures:
        raise RuntimeError(f"{len(failures)} connections failed: {failures[0]}")
    return seconds


class Peers:
    """The processes of the benchmark."""

    def __init__(self, base: Path, stack: contextlib.ExitStack) -> None:
        self.base = base
        self.stack = stack
        self.gateways: dict[str, tuple[int, int, float]] = {}
        self.provider = self.peer("provider")[0]
        self.slow = self.peer("provider", "--delay-ms", "50")[0]
        self.bare, self.bare_pid = self.peer("bare", f"http://127.0.0.1:{self.provider}/v1")
        self.slow_bare, _ = self.peer("bare", f"http://127.0.0.1:{self.slow}/v1")
        self.burst = self.peer("provider", "--chunk-ms", "0")[0]
        self.burst_bare, self.burst_bare_pid = self.peer(
            "bare", f"http://127.0.0.1:{self.burst}/v1"
        )
        self.calm = self.peer("provider", "--chunk-ms", "100")[0]

    def spawn(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return self.stack.enter_context(ended(subprocess.Popen(command, text=True, **options)))

    def peer(self, *arguments: str) -> tuple[int, int]:
        process = self.spawn(
            sys.executable, "-m", "benchmarks.proxy_peers", *arguments, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        return int(process.stdout.readline()), process.pid

    def start_proxy(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.proxy = free.getsockname()[1]
        config = self.base / "proxy.toml"
        models = "".join(
            f'[[models]]\nname = "{name}"\nbase_url = "http://127.0.0.1:{port}/v1"\n'
            'price_in = "0.15"\nprice_out = "0.60"\n'
            for name, port in (
                ("m", self.provider),
                ("slow", self.slow),
                ("burst", self.burst),
                ("calm", self.calm),
            )
        )
        config.write_text(
            f'state_dir = "{self.base}/state"\nrun_dir = "{self.base}/run"\n'
            f'[listen]\nbind = "127.0.0.1:{self.proxy}"\n[keys]\nrequired = true\n'
            '[controller]\nenabled = false\n[status]\nbind = "127.0.0.1:0"\n'
            f'[log]\nlevel = "warning"\n{models}'
        )
        began_s = time.perf_counter()
        process = self.spawn(sys.executable, "-m", "intentd.proxy.daemon", "--config", str(config))
        self.proxy_pid = process.pid
        while True:
            with contextlib.suppress(OSError, RuntimeError):  # not there, or starting
                made = self.admin("keys.new", name="plain")
                break
            if process.poll() is not None or time.perf_counter() - began_s > 60:
                raise RuntimeError("the proxy did not start")
            time.sleep(0.01)
        self.start_s = time.perf_counter() - began_s
        self.key = made["secret"]
        grants = {"budgets": [{"unit": "dollars", "limit": "1000000", "period": "month"}]}
        self.budget_key = self.admin("keys.new", name="budget", grants=grants)["secret"]

    def admin(self, command: str, **args: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.base / "run" / "proxy.admin.sock"))
            connection.sendall(json.dumps({"command": command, "args": args}).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if not answer["ok"]:
            raise RuntimeError(answer["error"])
        return answer["result"]


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def throughput(peers: Peers, given: argparse.Namespace) -> dict[str, Any]:
    """Requests a second and processor time of each, rounds alternating."""
    lanes = {
        "bare": (peers.bare, peers.bare_pid, "x"),
        "fixed": (peers.proxy, peers.proxy_pid, peers.key),
        "fixed_with_budget": (peers.proxy, peers.proxy_pid, peers.budget_key),
        **{name: (port, pid, "x") for name, (port, pid, _) in peers.gateways.items()},
    }
    rounds: dict[str, list[tuple[float, float, list[float]]]] = {name: [] for name in lanes}
    for number in range(given.rounds + 1):  # the first one warms up
        for name, (port, pid, key) in lanes.items():
            more = proxy_gateways.headers(name, peers.provider)
            request = request_bytes(port, key, "m", headers=more)
            before_s, began_s = cpu_s(pid), time.perf_counter()
            seconds = await load(port, request, given.connections, given.seconds)
            took_s, used_s = time.perf_counter() - began_s, cpu_s(pid) - before_s
            progress(f"{name}: {len(seconds) / took_s:.0f}/s, {used_s / len(seconds) * 1e3:.3f} ms")
            if number:
                rounds[name].append((len(seconds) / took_s, used_s / len(seconds), seconds))
    result: dict[str, Any] = {}
    for name, rows in rounds.items():
        everything = sorted(value for row in rows for value in row[2])
        result[name] = {
            "requests_per_s": round(statistics.median(row[0] for row in rows), 1),
            "cpu_ms_per_request": round(statistics.median(row[1] for row in rows) * 1e3, 4),
            "p50_ms": round(statistics.median(everything) * 1e3, 3),
            "p99_ms": round(everything[int(len(everything) * 0.99)] * 1e3, 3),
        }
    for name in ("fixed", "fixed_with_budget"):
        pairs = zip(rounds[name], rounds["bare"], strict=True)
        result[name]["of_bare"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 3)
    for name in peers.gateways:
        pairs = zip(rounds["fixed"], rounds[name], strict=True)
        times = statistics.median(a[0] / b[0] for a, b in pairs)
        result["fixed"][f"times_{name}"] = round(times, 1)
        result[name]["memory_mb"] = round(memory_mb(peers.gateways[name][1]), 1)
        result[name]["start_s"] = round(peers.gateways[name][2], 1)
    return result


async def added_latency(peers: Peers, given: argparse.Namespace) -> dict[str, float]:
    """Median and p99 at a provider that takes 50 ms, in milliseconds over asking it directly."""
    lanes = {
        "direct": (peers.slow, "x"),
        "bare": (peers.slow_bare, "x"),
        "fixed": (peers.proxy, peers.key),
        "fixed_with_budget": (peers.proxy, peers.budget_key),
    }
    found: dict[str, list[float]] = {name: [] for name in lanes}
    for _ in range(given.rounds):
        for name, (port, key) in lanes.items():
            found[name] += await load(port, request_bytes(port, key, "slow"), 4, given.seconds)
    direct = sorted(found.pop("direct"))
    result = {}
    for name, seconds in found.items():
        ordered = sorted(seconds)
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            added = ordered[int(len(ordered) * share)] - direct[int(len(direct) * share)]
            result[f"{name}_{label}_ms"] = round(added * 1e3, 3)
    return result


async def stream_cost(peers: Peers, given: argparse.Namespace) -> dict[str, float]:
    """Processor microseconds a chunk: chunks that come one at a time, and many at once."""
    from benchmarks.proxy_peers import CHUNKS_A_STREAM

    result = {}
    for name, port, pid, key, model in (
        ("bare", peers.bare, peers.bare_pid, "x", "m"),
        ("fixed", peers.proxy, peers.proxy_pid, peers.key, "m"),
        ("bare_burst", peers.burst_bare, peers.burst_bare_pid, "x", "burst"),
        ("fixed_burst", peers.proxy, peers.proxy_pid, peers.key, "burst"),
    ):
        costs = []
        request = request_bytes(port, key, model, stream=True)
        for _ in range(given.rounds):
            before_s = cpu_s(pid)
            streams = await load(port, request, given.streams, given.seconds, streams=True)
            costs.append((cpu_s(pid) - before_s) / (len(streams) * (CHUNKS_A_STREAM + 3)))
        result[f"{name}_us_per_chunk"] = round(statistics.median(costs) * 1e6, 2)
        progress(f"streams, {name}: {result[f'{name}_us_per_chunk']} us a chunk")
    return result


async def held_streams(peers: Peers) -> dict[str, Any]:
    """A thousand streams at once, every one of them whole at the end."""
    held = Held()
    request = request_bytes(peers.proxy, peers.key, "calm", stream=True)
    before_mb = memory_mb(peers.proxy_pid)
    done = await load(peers.proxy, request, HELD_STREAMS, 0.0, streams=True, held=held)
    progress(f"{held.most} streams at once, {len(done)} whole")
    return {
        "at_once": held.most,
        "whole": len(done),
        "memory_mb": round(memory_mb(peers.proxy_pid) - before_mb, 1),
    }


class Watched(asyncio.Protocol):
    """A provider's connection that streams slowly and notes when it is cut."""

    def __init__(self, cut_s: list[float], streaming: asyncio.Event) -> None:
        self.cut_s = cut_s
        self.streaming = streaming
        self.transport: Any = None
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        from benchmarks.proxy_peers import CHUNK, chunked

        self.data += data
        if b'"stream":true' in self.data:
            self.data = b""
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + chunked(CHUNK)
            )
            self.streaming.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.cut_s.append(time.perf_counter())


async def leaving(base: Path) -> dict[str, float]:
    """Milliseconds from a client's leaving to the end of the upstream call."""
    cut_s: list[float] = []
    streaming = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Watched(cut_s, streaming), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = ProxyProcess(base / "leaving", [("m", f"http://127.0.0.1:{port}/v1", "")])
    took_ms = []
    try:
        await proxy.start()
        own_port = int(proxy.url.rpartition(":")[2])
        for _ in range(50):
            streaming.clear()
            before = len(cut_s)
            _, writer = await asyncio.open_connection("127.0.0.1", own_port)
            writer.write(request_bytes(own_port, "x", "m", stream=True))
            async with asyncio.timeout(30):
                await streaming.wait()
                await asyncio.sleep(0.02)
                left_s = time.perf_counter()
                writer.close()
                while len(cut_s) == before:  # noqa: ASYNC110  set by a callback of this loop
                    await asyncio.sleep(0.001)
            took_ms.append((cut_s[-1] - left_s) * 1e3)
    finally:
        proxy.end()
        server.close()
    return {"p50_ms": round(statistics.median(took_ms), 2), "most_ms": round(max(took_ms), 2)}


async def service_types(peers: Peers, given: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Requests a second and processor time of each type this proxy offers."""
    url = f"http://127.0.0.1:{peers.provider}/v1"
    models = [
        (name, url, f'price_in = "{price}"\nprice_out = "{price}"')
        for name, price in (("low", "0.1"), ("m", "1"), ("high", "10"))
    ]
    proxy = ProxyProcess(base / "types", models)
    result: dict[str, Any] = {}
    try:
        await proxy.start()
        port = int(proxy.url.rpartition(":")[2])
        process = proxy.process
        assert process is not None
        for name in TYPES:
            model = "m" if name == "fixed" else name
            try:
                # the first request of a type may load numpy and an embedding model: a second, once
                await load(port, request_bytes(port, "x", model), 1, 0.0)
                before_s, began_s = cpu_s(process.pid), time.perf_counter()
                done = await load(port, request_bytes(port, "x", model), 32, given.seconds)
            except RuntimeError as error:
                result[name] = {"refused": str(error)[-160:]}
                continue
            took_s = time.perf_counter() - began_s
            result[name] = {
                "requests_per_s": round(len(done) / took_s, 1),
                "cpu_ms_per_request": round((cpu_s(process.pid) - before_s) / len(done) * 1e3, 4),
                "p50_ms": round(statistics.median(done) * 1e3, 3),
            }
            progress(f"{name}: {result[name]}")
    finally:
        proxy.end()
    return result


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        peers = Peers(Path(directory), stack)
        peers.start_proxy()
        start_mb = memory_mb(peers.proxy_pid)
        for name in ("litellm", "portkey") if given.gateways else ():
            found = stack.enter_context(
                proxy_gateways.running(name, given.gateways, peers.provider, Path(directory))
            )
            if found is not None:
                peers.gateways[name] = found
        result: dict[str, Any] = {
            "connections": given.connections,
            "rounds": given.rounds,
            "seconds": given.seconds,
            "start_s": round(peers.start_s, 2),
            "throughput": await throughput(peers, given),
        }
        result["added"] = await added_latency(peers, given)
        result["streams"] = await stream_cost(peers, given)
        result["held"] = await held_streams(peers)
        result["left"] = await leaving(Path(directory))
        result["service_types"] = await service_types(peers, given, Path(directory))
        result["memory_mb"] = {
            "start": round(start_mb, 1),
            "after": round(memory_mb(peers.proxy_pid), 1),
            "bare_after": round(memory_mb(peers.bare_pid), 1),
        }
    fixed = result["throughput"]["fixed"]
    result["bars"] = {
        "of_bare": fixed["of_bare"] >= RATIO_BAR,
        "cpu_ms": fixed["cpu_ms_per_request"] <= CPU_BAR_MS,
        "us_per_chunk": result["streams"]["fixed_us_per_chunk"] <= CHUNK_BAR_US,
        "us_per_chunk_burst": result["streams"]["fixed_burst_us_per_chunk"] <= CHUNK_BAR_US,
        "added_p50": result["added"]["fixed_p50_ms"] <= ADDED_BAR_MS,
        "memory": result["memory_mb"]["start"] < MEMORY_BAR_MB,
        "held": result["held"]["at_once"] == result["held"]["whole"] == HELD_STREAMS,
        "left": result["left"]["most_ms"] <= LEFT_BAR_MS,
    }
    if "times_litellm" in fixed:
        result["bars"]["times_litellm"] = fixed["times_litellm"] >= LITELLM_BAR
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--streams", type=int, default=50, help="streams at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--gateways", type=Path, help="made by benchmarks.proxy_gateways")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.gateways is not None:
        given.gateways = given.gateways.absolute()
    os.environ.setdefault("PYTHONPATH", "src")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(given))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
