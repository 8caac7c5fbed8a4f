"""Restarts that nobody notices: open streams through the proxy, queued flows at an agent.

``python -m benchmarks.restart --json``: the real daemons, each under a manager that holds its
descriptors (sd_notify's FDSTORE, as systemd's units and ``intentctl up`` have it), are restarted
twice: with the code they run, and with a directory of code that was replaced in between. Meanwhile

- 500 streams through the proxy are open, 100 clients ask again and again on connections they keep,
  and others connect anew;
- 1,000 flows are queued at an agent behind one that sends, and more ask for their turn.

Bar: no connection reset, no stream cut short, no request failed, no flow lost, none released out
of its order or for another reason than its turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp import web

from benchmarks.held_service import ROOT, Service, copy_code, replace_code
from intentd.agent.client import AsyncFlow, AsyncFlows

CHUNK_S: Final = 0.1
CONNECTIONS: Final = 20  # applications that share the queued flows
NEXT: Final = "99.0.0"

AGENT: Final = """
[controller]
enabled = false
[status]
bind = "127.0.0.1:0"
[[domains]]
name = "up"
default = true
[domains.policy]
name = "fifo"
max_wait_s = 600.0
[[domains.policy.classes]]
threshold_bytes = inf
weight = 1.0
mpl = 1
"""
PROXY: Final = """
drain_timeout_s = 120
[controller]
enabled = false
[status]
bind = "127.0.0.1:0"
[listen]
bind = "127.0.0.1:0"
[[models]]
name = "m"
base_url = "{url}"
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Provider:
    """Streams ``chunks`` words, one every CHUNK_S; answers at once what is not a stream."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        base = {"id": "x", "created": 1, "model": "m"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}}
            done = {**base, "object": "chat.completion", "usage": usage}
            return web.json_response({**done, "choices": [{**choice, "finish_reason": "stop"}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        head = {**base, "object": "chat.completion.chunk"}
        for number in range(self.chunks):
            choice = {"index": 0, "delta": {"content": f"{number} "}, "finish_reason": None}
            await _event(response, {**head, "choices": [choice]})
            await asyncio.sleep(CHUNK_S)
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await _event(response, {**head, "choices": [last]})
        await _event(response, {**head, "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def _event(response: web.StreamResponse, document: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(document).encode() + b"\n\n")


def _body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


class Load:
    """Clients of the proxy, and what became of what they asked."""

    def __init__(self, address: str, chunks: int) -> None:
        self.url = f"http://{address}/v1/chat/completions"
        self.expected = "".join(f"{number} " for number in range(chunks))
        self.outcomes: Counter[str] = Counter()
        self.longest_s: dict[str, float] = {}
        self.began = 0
        self.over = False

    async def stream(self, session: aiohttp.ClientSession) -> None:
        text, done = [], False
        try:
            async with session.post(self.url, json=_body(stream=True)) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line == b"data: [DONE]\n":
                        done = True
                    elif line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        for choice in event.get("choices", []):
                            if not text:
                                self.began += 1
                            text.append(choice["delta"].get("content", ""))
        except (aiohttp.ClientError, OSError) as error:
            self.outcomes[f"stream: {type(error).__name__}"] += 1
            return
        whole = done and "".join(text) == self.expected
        self.outcomes["stream whole" if whole else "stream cut short"] += 1

    async def ask_for_ever(self, kind: str, session: aiohttp.ClientSession, pause_s: float) -> None:
        while not self.over:
            began = time.monotonic()
            try:
                async with session.post(self.url, json=_body()) as answer:
                    outcome = str(answer.status)
                    await answer.read()
            except (aiohttp.ClientError, OSError) as error:
                outcome = type(error).__name__
            self.outcomes[f"{kind}: {outcome}"] += 1
            took_s = time.monotonic() - began
            self.longest_s[kind] = round(max(took_s, self.longest_s.get(kind, 0.0)), 3)
            await asyncio.sleep(pause_s)


async def proxy_run(
    base: Path, streams: int, keepers: int, chunks: int, upgrade: tuple[Path, Path] | None
) -> dict[str, Any]:
    """Streams, kept connections and new ones across one restart of the proxy."""
    provider = Provider(chunks)
    await provider.start()
    code = upgrade[0] if upgrade is not None else ROOT
    service = Service(base, "proxy", PROXY.format(url=provider.url), code=code)
    timeout = aiohttp.ClientTimeout(total=300)
    try:
        await service.start()
        load = Load((await service.status())["detail"]["api"], chunks)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=timeout
            ) as session,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout
            ) as fresh,
            asyncio.TaskGroup() as tasks,
        ):
            running = [tasks.create_task(load.stream(session)) for _ in range(streams)]
            asking = []
            for _ in range(keepers):
                asking.append(tasks.create_task(load.ask_for_ever("kept", session, 0.05)))
            asking.append(tasks.create_task(load.ask_for_ever("fresh", fresh, 0.05)))
            async with asyncio.timeout(120):
                while load.began < streams:  # noqa: ASYNC110  another's counter
                    await asyncio.sleep(0.02)
            say(f"proxy: {streams} streams are open; restart")
            took = await service.restart((lambda: replace_code(*upgrade)) if upgrade else _nothing)
            open_after = sum(not task.done() for task in running)
            await asyncio.sleep(0.5)
            load.over = True
        version = (await service.status())["version"]
    finally:
        service.close()
        await provider.stop()
    return {
        "streams": streams,
        "kept_connections": keepers,
        "streams_open_when_it_was_ready_again": open_after,
        "outcomes": dict(sorted(load.outcomes.items())),
        "longest_s": load.longest_s,
        "version_after": version,
        **took,
        "failed": sum(
            count
            for outcome, count in load.outcomes.items()
            if outcome not in ("stream whole", "kept: 200", "fresh: 200")
        ),
    }


async def agent_run(
    base: Path, flows: int, upgrade: tuple[Path, Path] | None, **settings: Any
) -> dict[str, Any]:
    """Flows that wait for their turn across one restart of the agent. settings: of AsyncFlows."""
    code = upgrade[0] if upgrade is not None else ROOT
    service = Service(base, "agent", AGENT, code=code)
    applications: list[AsyncFlows] = []
    order: list[int] = []  # of those that were released, by our count
    numbers: list[int] = []  # and by the agent's, which is the order they arrived in
    reasons: Counter[str] = Counter()

    async def send(number: int, application: AsyncFlows) -> None:
        async with application.open(1000) as flow:
            order.append(number)
            numbers.append(flow.id)
            reasons[flow.degraded or "in turn"] += 1

    try:
        await service.start()
        path = str(base / "run" / "agent.sock")
        applications = [AsyncFlows(path, **settings) for _ in range(CONNECTIONS)]
        first: AsyncFlow = await applications[0].open(1000)
        waiting: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as tasks:
            for number in range(flows):
                application = applications[number % CONNECTIONS]
                waiting.append(tasks.create_task(send(number, application)))
                if number % 50 == 49 or number == flows - 1:
                    await _queued(service, number + 1)
            say(f"agent: {flows} flows are queued; restart")
            late: list[asyncio.Task[None]] = []

            def between() -> None:
                if upgrade is not None:
                    replace_code(*upgrade)
                # The agent is away: these say what they want to nobody, yet.
                for number in range(flows, flows + CONNECTIONS):
                    application = applications[number % CONNECTIONS]
                    late.append(tasks.create_task(send(number, application)))

            took = await service.restart(between)
            status = await service.status()
            held = status["detail"]["domains"]["up"]["classes"][0]
            early = len(order)
            await first.close()
        expected = flows + CONNECTIONS
        left = (await service.status())["detail"]["flows_open"]
    finally:
        for application in applications:
            application.close()
        service.close()
    queued = [flow for number, flow in zip(order, numbers, strict=True) if number < flows]
    return {
        "flows": flows,
        "asked_while_it_was_away": CONNECTIONS,
        "waiting_after": held["waiting"],
        "sending_after": held["active"],
        "released_before_their_turn": early,
        "starts": dict(reasons),
        "in_order": queued == sorted(queued),
        "lost": expected - len(order),
        "open_at_the_end": left,
        "version_after": status["version"],
        **took,
        "failed": expected - reasons["in turn"],
    }


async def _queued(service: Service, count: int) -> None:
    async with asyncio.timeout(60):
        while True:
            status = await service.status()
            if status["detail"]["domains"]["up"]["classes"][0]["waiting"] >= count:
                return
            await asyncio.sleep(0.01)


def _nothing() -> None:
    pass


async def measure(
    streams: int, keepers: int, chunks: int, flows: int, base: Path
) -> dict[str, Any]:
    """Everything, once with the same code and once across an upgrade."""
    figures: dict[str, Any] = {}
    for name in ("restart", "upgrade"):
        place = base / name
        for role in ("proxy", "agent"):
            upgrade = None
            if name == "upgrade":
                upgrade = (
                    copy_code(place / f"{role}-code", "1.0.0"),
                    copy_code(place / f"{role}-next", NEXT),
                )
            if role == "proxy":
                found = await proxy_run(place / role, streams, keepers, chunks, upgrade)
            else:
                found = await agent_run(place / role, flows, upgrade)
            figures[f"{role} {name}"] = found
            say(f"{role} {name}: {json.dumps(found)}")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--kept", type=int, default=100, help="connections that ask for ever")
    parser.add_argument("--chunks", type=int, default=150, help=f"of {CHUNK_S} s each, a stream")
    parser.add_argument("--flows", type=int, default=1000)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="restart-"))
    try:
        figures = asyncio.run(
            measure(arguments.streams, arguments.kept, arguments.chunks, arguments.flows, base)
        )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    ok = all(part["failed"] == 0 and part.get("in_order", True) for part in figures.values())
    if arguments.json:
        print(json.dumps({"figures": figures, "ok": ok}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
