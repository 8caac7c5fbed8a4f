"""Memory of the proxy over many requests, with clients that leave, stall and never finish asking.

``python -m benchmarks.proxy_soak --requests 1000000 --json``: of every hundred requests about 83
are answered whole, 10 are streams read to the end, 5 are streams and 2 are requests whose client
leaves in the middle; beside them some two hundred connections are always half open (a head or a
body that never ends) or stream to a client that does not read. Resident memory is sampled a few
hundred times; the slope is fitted after the first fifth (caches of bounded size fill up), its
interval widened for the samples' autocorrelation. Bar: no growth that the interval tells from
none, or less than 1 MB in a million requests: by less than its arenas of 1 MB Python's allocator
cannot grow, so one of them more or less is noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.proxy import memory_mb, request_bytes
from benchmarks.proxy_peers import CHUNK, FINISH, USAGE, chunked
from benchmarks.proxy_peers import Provider as Plain
from benchmarks.proxy_process import ProxyProcess, progress

GROWTH_BAR_MB = 1.0
HALF_OPEN = 200
STREAM_CHUNKS = 6


class Provider(Plain):
    """Answers at once; streams are a few chunks, a moment apart."""

    def chunk(self, left: int) -> None:
        left = min(left, STREAM_CHUNKS)
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(chunked(CHUNK))
            asyncio.get_running_loop().call_later(0.002, self.chunk, left - 1)
        else:
            self.transport.write(
                chunked(FINISH + USAGE) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            )


class Counts:
    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.asked = 0
        self.by_kind: dict[str, int] = {}
        self.other: list[str] = []


async def ask(
    kind: str, port: int, request: bytes, connection: tuple[Any, Any] | None, counts: Counts
) -> tuple[Any, Any] | None:
    """One request; the connection to use again, or None when it is gone."""
    if connection is None:
        connection = await asyncio.open_connection("127.0.0.1", port)
    reader, writer = connection
    writer.write(request)
    if kind == "left":
        await asyncio.sleep(0)
        writer.transport.abort()
        return None
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        counts.other.append(head[:80].decode())
        writer.transport.abort()
        return None
    if kind == "stream_left":
        await reader.readuntil(b"\n\n")
        writer.transport.abort()
        return None
    if kind == "stream":
        await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
        return connection
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    await reader.readexactly(length)
    return connection


async def client(port: int, seed: int, counts: Counts) -> None:
    rng = random.Random(seed)
    requests = {
        "whole": request_bytes(port, "x", "m"),
        "stream": request_bytes(port, "x", "m", stream=True),
    }
    requests |= {"left": requests["whole"], "stream_left": requests["stream"]}
    kinds = ["whole"] * 83 + ["stream"] * 10 + ["stream_left"] * 5 + ["left"] * 2
    connection: tuple[Any, Any] | None = None
    while counts.asked < counts.wanted:
        counts.asked += 1
        kind = rng.choice(kinds)
        counts.by_kind[kind] = counts.by_kind.get(kind, 0) + 1
        try:
            connection = await ask(kind, port, requests[kind], connection, counts)
        except (OSError, asyncio.IncompleteReadError) as error:
            counts.other.append(f"{kind}: {type(error).__name__}")
            connection = None
    if connection is not None:
        connection[1].close()


async def half_open(port: int, seed: int, over: asyncio.Event, counts: Counts) -> None:
    """Connections that never finish asking, or never read; the oldest is dropped for a new one."""
    rng = random.Random(seed)
    held: deque[Any] = deque()
    request = request_bytes(port, "x", "m")
    stream = request_bytes(port, "x", "m", stream=True)
    try:
        while not over.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                kind = rng.randrange(3)
                writer.write((request[: rng.randrange(1, 80)], request[:-20], stream)[kind])
                if kind == 2:
                    writer.transport.pause_reading()
                held.append(writer)
                counts.by_kind["half_open"] = counts.by_kind.get("half_open", 0) + 1
            if len(held) > HALF_OPEN:
                held.popleft().transport.abort()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await over.wait()
    finally:
        for writer in held:
            writer.transport.abort()


def slope(samples: list[tuple[int, float]]) -> tuple[float, float]:
    """(MB a million requests, half the width of its 95 % interval)."""
    xs = [x / 1e6 for x, _ in samples]
    ys = [y for _, y in samples]
    n, mean_x, mean_y = len(xs), statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = [y - mean_y - rise * (x - mean_x) for x, y in zip(xs, ys, strict=True)]
    square = sum(value * value for value in rest)
    if not square:
        return rise, 0.0
    again = sum(a * b for a, b in itertools.pairwise(rest)) / square
    again = min(max(again, 0.0), 0.99)
    effective = max(n * (1 - again) / (1 + again), 3.0)
    error = math.sqrt(square / n * (n / (effective - 2)) / spread)
    return rise, 1.96 * error


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Provider(0.0, 0.0), "127.0.0.1", 0, backlog=4096)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    counts = Counts(given.requests)
    samples: list[tuple[int, float]] = []
    over = asyncio.Event()
    with tempfile.TemporaryDirectory() as directory:
        proxy = ProxyProcess(
            Path(directory) / "p", [("m", url, 'price_in = "1"\nprice_out = "2"')],
            "[records]\nmax_rows = 20000\nrecent = 2000\n",
        )  # fmt: skip
        try:
            await proxy.start()
            process = proxy.process
            assert process is not None
            start_mb = memory_mb(process.pid)
            port = int(proxy.url.rpartition(":")[2])
            began_s = time.monotonic()

            async def sample() -> None:
                step = max(1, given.requests // given.samples)
                due = step
                while counts.asked < counts.wanted:
                    if counts.asked >= due:
                        samples.append((counts.asked, memory_mb(process.pid)))
                        due = counts.asked + step
                        if len(samples) % 20 == 0:
                            progress(f"{counts.asked} requests, {samples[-1][1]:.1f} MB")
                    await asyncio.sleep(0.02)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(sample())
                stalled = tasks.create_task(half_open(port, given.seed + 1000, over, counts))
                async with asyncio.TaskGroup() as clients:
                    for number in range(given.connections):
                        clients.create_task(client(port, given.seed + number, counts))
                over.set()
                await stalled
            took_s = time.monotonic() - began_s
            status = await _quiet(proxy)
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            end_mb = memory_mb(process.pid)
        finally:
            proxy.end()
            server.close()
    kept = [one for one in samples if one[0] >= given.requests / 5]
    rise, half = slope(kept)
    return {
        "requests": counts.asked,
        "by_kind": counts.by_kind,
        "failed": len(counts.other),
        "first_failure": counts.other[0] if counts.other else None,
        "seconds": round(took_s, 1),
        "start_mb": round(start_mb, 1),
        "fifth_mb": round(kept[0][1], 1),
        "end_mb": round(end_mb, 1),
        "most_mb": round(max(value for _, value in samples), 1),
        "slope_mb_per_million": round(rise, 3),
        "interval_mb_per_million": [round(rise - half, 3), round(rise + half, 3)],
        "samples": len(kept),
        "left_behind": {"active": status["active"], "open_files": files, **status["models"]["m"]},
        "bars": {
            "flat": rise - half <= 0 or rise <= GROWTH_BAR_MB,
            "start": start_mb < 90,
            "nothing_left_behind": status["active"] == 0 and status["models"]["m"]["calls"] == 0,
        },
    }


async def _quiet(proxy: ProxyProcess) -> Any:
    """The status once nothing is under way, or after a while."""
    for _ in range(300):
        status = (await proxy.admin("status"))["detail"]
        if not status["active"]:
            break
        await asyncio.sleep(0.1)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(given))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
