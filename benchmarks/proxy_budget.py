"""A budget holds while a thousand streams spend it and the proxy is killed in the middle.

``python -m benchmarks.proxy_budget --json [--store postgres]``: clients of one key stream as fast
as its budget lets them, about --streams at once, at a provider that keeps its own bill (every
token it made, whether or not anybody was left to read it). In the middle the proxy gets SIGKILL.
What its ledger holds open on disk at that moment is read before it is started again. Then:
the bill is at most the budget; the ledger shows at least the bill, and at most the open
reservations more; those are all settled, in full and marked estimated; every call carried the cap.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.local_postgres import Postgres, why_not
from benchmarks.proxy_process import ProxyProcess, progress

CAP = 20
PRICE_IN_NANO, PRICE_OUT_NANO = 1_000, 1_000_000  # a token: $1 and $1,000 a million
RESERVATION_NANO = CAP * PRICE_OUT_NANO + 400 * PRICE_IN_NANO  # a little more than a call's
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(document: dict[str, Any] | None) -> bytes:
    data = b"data: " + (json.dumps(document).encode() if document else b"[DONE]") + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


WORD = chunk({"id": "c", "choices": [{"index": 0, "delta": {"content": "w"}}]})
FINISH = chunk({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


class Bill:
    """What the provider would charge."""

    def __init__(self, seed: int, event_s: float) -> None:
        self.rng = random.Random(seed)
        self.event_s = event_s
        self.held: list[Provider] = []  # until as many streams as wanted run at once
        self.hold = 0
        self.in_tokens = 0
        self.out_tokens = 0
        self.calls = 0
        self.without_cap = 0
        self.open = 0
        self.most = 0

    @property
    def nano(self) -> int:
        return self.in_tokens * PRICE_IN_NANO + self.out_tokens * PRICE_OUT_NANO


class Provider(asyncio.Protocol):
    """HTTP/1.1 by hand: streams of 5 to 30 words, cut at the cap it is sent."""

    def __init__(self, bill: Bill) -> None:
        self.bill = bill
        self.data = b""
        self.streaming = False
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.streaming:
            self.streaming = False
            self.bill.open -= 1

    def data_received(self, data: bytes) -> None:
        self.data += data
        end = self.data.find(b"\r\n\r\n")
        found = _LENGTH.search(self.data, 0, end) if end >= 0 else None
        if found is None or len(self.data) < end + 4 + int(found[1]):
            return
        body = json.loads(self.data[end + 4 :])
        self.data = b""
        bill = self.bill
        bill.calls += 1
        bill.open += 1
        bill.most = max(bill.most, bill.open)
        self.streaming = True
        bill.without_cap += body.get("max_tokens") != CAP
        self.in_tokens = len(json.dumps(body["messages"]).split())
        bill.in_tokens += self.in_tokens
        self.out_tokens = 0
        self.words = min(bill.rng.randrange(5, 31), body.get("max_tokens", 30))
        self.transport.write(_HEAD)
        bill.held.append(self)
        if bill.open >= bill.hold:
            bill.hold = 0
            held, bill.held = bill.held, []
            for one in held:
                asyncio.get_running_loop().call_later(bill.event_s * bill.rng.random(), one.word)

    def word(self) -> None:
        if not self.streaming:
            return
        if self.out_tokens < self.words:
            self.out_tokens += 1
            self.bill.out_tokens += 1
            self.transport.write(WORD)
            asyncio.get_running_loop().call_later(self.bill.event_s, self.word)
            return
        total = self.in_tokens + self.out_tokens
        usage = {
            "prompt_tokens": self.in_tokens, "completion_tokens": self.out_tokens,
            "total_tokens": total,
        }  # fmt: skip
        self.transport.write(
            FINISH + chunk({"id": "c", "choices": [], "usage": usage}) + chunk(None) + b"0\r\n\r\n"
        )
        self.streaming = False
        self.bill.open -= 1


class Counts:
    """What the clients saw."""

    def __init__(self) -> None:
        self.done = 0
        self.refused = 0
        self.cut = 0
        self.other: list[str] = []


class Client(asyncio.Protocol):
    """Streams again and again; refused, it tries again a little later."""

    def __init__(self, request: bytes, counts: Counts) -> None:
        self.request = request
        self.counts = counts
        self.data = b""
        self.busy = False
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        if not self.transport.is_closing():
            self.busy = True
            self.data = b""
            self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.data = self.data[-4000:] + data
        later_s = 0.0
        if self.data.endswith(b"0\r\n\r\n"):
            if b"[DONE]" in self.data:
                self.counts.done += 1
            else:
                self.counts.cut += 1
        elif b"insufficient_quota" in self.data:
            self.counts.refused += 1
            later_s = 0.2
        elif b"HTTP/1.1 5" in self.data or b"HTTP/1.1 40" in self.data:
            self.counts.other.append(self.data[:300].decode(errors="replace"))
            later_s = 1.0
        else:
            return
        self.busy = False
        asyncio.get_running_loop().call_later(later_s, self.ask)

    def connection_lost(self, error: Exception | None) -> None:
        self.counts.cut += self.busy


class Books:
    """The ledger's open reservations, read from the disk while no proxy runs."""

    def __init__(self, kind: str, base: Path, postgres: Postgres | None) -> None:
        self.path = base / "state" / "proxy.sqlite"
        self.kind = kind
        self.postgres = postgres

    def open_nano(self) -> tuple[int, int]:
        """(how many, what they hold together)."""
        sql = "SELECT amounts FROM reservations"
        if self.postgres is not None:
            # The server still carries out what the dead proxy had sent.
            busy = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'intentd-proxy'"
            while self.postgres.run(busy):
                time.sleep(0.02)
            rows = [row[0] for row in self.postgres.run(sql)]
        else:
            with contextlib.closing(sqlite3.connect(self.path)) as db:
                rows = [row[0] for row in db.execute(sql)]
        return len(rows), sum(json.loads(row)["nano_dollars"] for row in rows)


@contextlib.contextmanager
def shared_store(kind: str) -> Iterator[Postgres | None]:
    if kind == "sqlite":
        yield None
        return
    postgres = Postgres()
    try:
        yield postgres
    finally:
        postgres.close()


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    bill = Bill(given.seed, given.event_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Provider(bill), "127.0.0.1", 0, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    rounds = []
    with tempfile.TemporaryDirectory() as directory, shared_store(given.store) as postgres:
        extra = "[keys]\nrequired = true\n"
        if postgres is not None:
            extra += f'[store]\nurl = "{postgres.url}"\nlease_s = 3\ntimeout_s = 20\n'
        model = (
            "m", f"http://127.0.0.1:{port}/v1",
            f'price_in = "1"\nprice_out = "1000"\nmax_output_tokens = {CAP}',
        )  # fmt: skip
        proxy = ProxyProcess(Path(directory) / "p", [model], extra)
        books = Books(given.store, proxy.base, postgres)
        try:
            for number in range(given.kills):
                await proxy.start()
                rounds.append(await _round(given, number, proxy, bill, books))
                progress(f"kill {number + 1}: {rounds[-1]}")
        finally:
            proxy.end()
            server.close()
    return {
        "store": given.store,
        "streams": given.streams,
        "kills": given.kills,
        "rounds": rounds,
        "bars": {
            "bill_within_budget": all(one["bill_nano"] <= one["budget_nano"] for one in rounds),
            "ledger_covers_bill": all(one["ledger_nano"] >= one["bill_nano"] for one in rounds),
            "difference_within_unsettled": all(
                one["ledger_nano"] - one["bill_nano"] <= one["unsettled_nano"] for one in rounds
            ),
            "settled_in_full_and_marked": all(
                one["estimated_nano"] == one["unsettled_nano"] and one["reserved_after_nano"] == 0
                for one in rounds
            ),
            "cap_sent": bill.without_cap == 0,
            "streams_at_once": all(one["open_at_kill"] >= 0.9 * given.streams for one in rounds),
            "no_other_errors": not any(one["other_errors"] for one in rounds),
        },
    }


async def _round(
    given: argparse.Namespace, number: int, proxy: ProxyProcess, bill: Bill, books: Books
) -> dict[str, Any]:
    """One key, its streams, one kill."""
    budget_nano = given.streams * RESERVATION_NANO * 6 // 5
    name = f"k{number}"
    grants = {"budgets": [{"unit": "dollars", "limit": f"{budget_nano / 1e9:.9f}"}]}
    secret = (await proxy.admin("keys.new", name=name, grants=grants))["secret"]
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "go on"}], "stream": True}
    ).encode()
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    bill.hold, bill.most = given.streams, 0
    counts, before_nano, before_calls = Counts(), bill.nano, bill.calls
    loop = asyncio.get_running_loop()
    transports = []
    for _ in range(given.streams + given.streams // 4):
        transport, _client = await loop.create_connection(
            lambda: Client(head.encode() + body, counts), host, int(port)
        )
        transports.append(transport)
    until_s = time.monotonic() + 300
    # The middle: all streams have run at once, and a good part of the budget is spent.
    share = given.spent
    while bill.most < given.streams or bill.nano - before_nano < share * budget_nano:
        if time.monotonic() > until_s or bill.nano - before_nano > 0.8 * budget_nano:
            raise RuntimeError(f"at most {bill.most} streams at once, {counts.other[:1]}")
        await asyncio.sleep(0.005)
    open_at_kill = bill.open
    proxy.kill()
    for transport in transports:
        transport.close()
    async with asyncio.timeout(60):
        while bill.open:  # noqa: ASYNC110  it goes on until it sees that nobody listens
            await asyncio.sleep(0.05)
    billed_nano = bill.nano - before_nano
    held, unsettled_nano = await asyncio.to_thread(books.open_nano)
    await proxy.start()
    row: dict[str, Any] = {}
    async with asyncio.timeout(120):
        while not row or row["reserved"]:
            page = await proxy.admin("spend")
            (row,) = [r for r in page["accounts"] if r["account"].startswith(f"key:{name}/")]
            await asyncio.sleep(0.1)
    page = await proxy.admin("spend")  # rows are read before accounts: now both are final
    spend = [one for one in page["rows"] if one["key"] == name]
    proxy.end()
    return {
        "budget_nano": budget_nano,
        "bill_nano": billed_nano,
        "ledger_nano": row["spent"],
        "unsettled": held,
        "unsettled_nano": unsettled_nano,
        "estimated_nano": sum(one["estimated_nano"] for one in spend),
        "reserved_after_nano": row["reserved"],
        "spend_rows_nano": sum(one["cost_nano"] for one in spend),
        "calls": bill.calls - before_calls,
        "open_at_kill": open_at_kill,
        "most_at_once": bill.most,
        "answered": counts.done,
        "refused": counts.refused,
        "cut": counts.cut,
        "other_errors": counts.other[:2],
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument(
        "--spent", type=float, default=0.4, help="share of the budget billed at the kill"
    )
    parser.add_argument("--event-s", type=float, default=1.0, help="between two tokens")
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    given = arguments()
    if given.store == "postgres" and (reason := why_not()):
        print(reason, file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(given))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
