"""What a hit of the prompt cache takes, and what the cache takes of memory.

``python -m benchmarks.proxy_cache --json``: intentd-proxy as a process with 10,000 and 100,000
items in its store; one client on one connection asks for prompts that are stored (exact) and for
the same in other words (semantic: embedding, a look at every vector, the second gate). Times are
the client's, from the request's first byte to the answer's last; cpu_ms is the proxy's processor
time a request. No model is ever asked. Bars, at the median: exact 1 ms, semantic 4 ms at 10,000
and 8 ms at 100,000; memory after the start < 90 MB with the semantic cache off, < 190 MB with it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.proxy import cpu_s, memory_mb
from benchmarks.proxy_process import ProxyProcess, progress

EXACT_BAR_MS = 1.0
SEMANTIC_BAR_MS = {10_000: 4.0, 100_000: 8.0}
MEMORY_BAR_MB = {"off": 90.0, "on": 190.0}
BATCH = 2000
OWNER = "key:anonymous"
SPACE = "minilm-l6-int8"
ACTS = ("open", "close", "rename", "share", "print", "delete", "move", "copy", "lock", "archive",
        "export", "sign")  # fmt: skip
THINGS = (
    "savings account", "monthly report", "paper invoice", "support ticket", "team calendar",
    "holiday photo", "credit card", "phone number", "mailing list", "home address",
    "travel booking", "old password", "group chat", "video call", "gift card",
    "tax form", "rental car", "music playlist", "shopping list", "library book",
    "train ticket", "insurance claim", "photo album", "voice message", "job application",
)  # fmt: skip
TYPES = """
[cache]
semantic = "{semantic}"
max_items = 1000000
[[service_types]]
name = "cached"
stages = [{{cache = "{mode}"{more}}}, {{context = "none"}}, {{model = "one", models = "m"}}]
"""


def prompts() -> list[str]:
    return [f"How do I {act} my {thing}?" for act, thing in itertools.product(ACTS, THINGS)]


def reworded(prompt: str) -> str:
    """The same question, another text."""
    return prompt.removesuffix("?") + " please"


def fill(path: Path, count: int) -> None:
    """A store with the prompts, as MiniLM sees them, among others with vectors made at random."""
    from intentd.daemons.kit.store import Store
    from intentd.proxy.minilm import MiniLM
    from intentd.proxy.store.cache import ItemRow, KeyRow
    from intentd.proxy.store.cache_sqlite import SqliteCacheRows
    from intentd.proxy.store.sqlite import MIGRATIONS

    asked = prompts()
    vectors = MiniLM().embed(asked, batch=1)
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    store = Store(path, MIGRATIONS)
    rows = SqliteCacheRows(store)

    def item(number: int, prompt: str, vector: Any) -> ItemRow:
        key = KeyRow("prompt", prompt, np.asarray(vector, "<f2").tobytes(), SPACE)
        answer = f"The answer to {prompt} " * 8
        return ItemRow(f"c{number:016x}", OWNER, answer, (key,), prompt=prompt, put=True,
                       wall_s=time.time())  # fmt: skip

    async def write() -> None:
        made = [item(n, prompt, vectors[n]) for n, prompt in enumerate(asked)]
        await rows.put(made)
        for first in range(len(asked), count, BATCH):
            size = min(BATCH, count - first)
            others = rng.standard_normal((size, vectors.shape[1]))
            others /= np.linalg.norm(others, axis=1, keepdims=True)
            await rows.put(
                [item(first + n, f"filler question number {first + n}", others[n])
                 for n in range(size)]
            )  # fmt: skip

    asyncio.run(write())
    store.close()


class Client:
    """One connection, one request at a time."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)

    async def ask(self, prompt: str) -> tuple[float, dict[str, Any]]:
        """(seconds, the answer)."""
        body = json.dumps(
            {"model": "cached", "messages": [{"role": "user", "content": prompt}]}
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        self.writer.write(head.encode() + body)
        answer_head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in answer_head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        raw = await self.reader.readexactly(length)
        seconds = time.perf_counter() - began
        return seconds, json.loads(raw)


async def hits(proxy: ProxyProcess, asked: list[str], wanted: str) -> dict[str, Any]:
    """Times of the hits; what was no hit is counted and left out."""
    client = Client(proxy.url)
    await client.connect()
    for prompt in asked[:20]:
        await client.ask(prompt)
    assert proxy.process is not None
    seconds = []
    began_s = cpu_s(proxy.process.pid)
    for prompt in asked:
        took, answer = await client.ask(prompt)
        if answer.get("intentd", {}).get("cache", {}).get("result") == wanted:
            seconds.append(took)
    used_s = cpu_s(proxy.process.pid) - began_s
    client.writer.close()
    if not seconds:
        raise RuntimeError(f"no {wanted} hit: {answer}")
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "cpu_ms": round(used_s / len(asked) * 1e3, 3),
        "hits": len(seconds),
        "asked": len(asked),
    }


async def run(base: Path, name: str, mode: str, database: Path | None) -> ProxyProcess:
    """A proxy with a copy of the database."""
    more = ", min_similarity = 0.7, limit = 4" if mode == "semantic" else ""
    semantic = "on" if mode == "semantic" else "off"
    proxy = ProxyProcess(
        base / name,
        [("m", "http://127.0.0.1:9/v1", 'price_in = "1"\nprice_out = "1"')],
        TYPES.format(semantic=semantic, mode=mode, more=more),
    )
    if database is not None:
        state = base / name / "state"
        state.mkdir()
        await asyncio.to_thread(shutil.copy, database, state / "proxy.sqlite")
    await proxy.start()
    return proxy


async def measure(base: Path, sizes: list[int], databases: dict[int, Path]) -> dict[str, Any]:
    asked = prompts()
    result: dict[str, Any] = {"memory_mb": {}, "items": {}, "bars": {}}
    for mode, key in (("exact", "off"), ("semantic", "on")):
        proxy = await run(base, f"empty-{key}", mode, None)
        assert proxy.process is not None
        memory = memory_mb(proxy.process.pid)
        proxy.end()
        result["memory_mb"][f"start, semantic {key}"] = round(memory, 1)
        result["bars"][f"memory, semantic {key}"] = memory < MEMORY_BAR_MB[key]
        progress(f"start, semantic {key}: {memory:.1f} MB")
    for size in sizes:
        found: dict[str, Any] = {}
        for mode in ("exact", "semantic"):
            proxy = await run(base, f"{mode}-{size}", mode, databases[size])
            assert proxy.process is not None
            try:
                texts = asked if mode == "exact" else [reworded(one) for one in asked]
                found[mode] = await hits(proxy, texts, mode)
                found[mode]["memory_mb"] = round(memory_mb(proxy.process.pid), 1)
            finally:
                proxy.end()
            bar = EXACT_BAR_MS if mode == "exact" else SEMANTIC_BAR_MS.get(size)
            if bar is not None:
                result["bars"][f"{mode} at {size}"] = found[mode]["p50_ms"] <= bar
            progress(f"{mode} at {size}: p50 {found[mode]['p50_ms']} ms")
        result["items"][str(size)] = found
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", default="10000,100000", help="items stored, comma-separated")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    from intentd.proxy.cache.available import missing_parts

    missing = missing_parts("")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        print(json.dumps({"skipped": f"not installed: {', '.join(missing)}"}))
        return 0
    sizes = [int(one) for one in given.items.split(",")]
    with tempfile.TemporaryDirectory(prefix="intentd-cache-") as directory:
        base = Path(directory)
        databases = {}
        for size in sizes:
            databases[size] = base / f"filled-{size}" / "proxy.sqlite"
            progress(f"storing {size} items")
            fill(databases[size], size)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(measure(base, sizes, databases))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
