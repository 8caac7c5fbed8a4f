"""Conversations stay in order over two proxies on one PostgreSQL.

``python -m benchmarks.proxy_order --json``: 100 conversations x 50 requests, all sent at once,
each to either of two proxy processes, at a provider whose answers take 0 to 20 ms. A conversation
is in order when its sequence numbers are 1, 2, ... without a gap; its calls to the provider never
overlap and come in the order of the numbers; each call's context is exactly the requests before
it; and the stored conversation lists them in that order. Needs PostgreSQL; makes its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from benchmarks.local_postgres import Postgres, why_not
from benchmarks.proxy_process import ProxyProcess, progress

MAX_PAUSE_S = 0.02


@dataclass
class Asked:
    """One call as the provider saw it."""

    prompt: str
    before: tuple[str, ...]
    began_s: float
    ended_s: float = 0.0


@dataclass
class Recorder:
    """A provider that writes down who asked what when."""

    rng: random.Random
    calls: dict[str, list[Asked]] = field(default_factory=dict)
    url: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        prompts = [one["content"] for one in body["messages"] if one["role"] == "user"]
        call = Asked(prompts[-1], tuple(prompts[:-1]), time.monotonic())
        self.calls.setdefault(call.prompt.partition("/")[0], []).append(call)
        await asyncio.sleep(self.rng.random() * MAX_PAUSE_S)
        call.ended_s = time.monotonic()
        message = {"role": "assistant", "content": f"answer to {call.prompt}"}
        return web.json_response(
            {
                "id": "c", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
            }
        )  # fmt: skip

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner


def judge(calls: list[Asked], numbers: dict[str, int], stored: list[str]) -> str:
    """What is out of order in one conversation; empty when nothing is."""
    if sorted(numbers.values()) != list(range(1, len(numbers) + 1)):
        return f"sequence numbers {sorted(numbers.values())[:5]}..., expected 1 to {len(numbers)}"
    order = sorted(numbers, key=lambda prompt: numbers[prompt])
    if [call.prompt for call in calls] != order:
        return "the provider was not asked in the order of the numbers"
    for place, call in enumerate(calls):
        if list(call.before) != order[:place]:
            return f"{call.prompt}: {len(call.before)} messages before it, expected {place}"
        if place and call.began_s < calls[place - 1].ended_s:
            return f"{call.prompt} began before {calls[place - 1].prompt} ended"
    if stored != order:
        return f"{len(stored)} messages stored, or in another order"
    return ""


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(given.seed)
    recorder = Recorder(random.Random(given.seed + 1))
    runner = await recorder.start()
    postgres = await asyncio.to_thread(Postgres)
    proxies: list[ProxyProcess] = []
    try:
        with tempfile.TemporaryDirectory() as directory:
            extra = (
                f'[store]\nurl = "{postgres.url}"\ntimeout_s = 20\nlease_s = 60\n'
                "[conversations]\nwait_s = 600\n"
            )
            try:
                for number in range(2):
                    proxy = ProxyProcess(
                        Path(directory) / str(number), [("m", recorder.url, "")], extra
                    )
                    proxies.append(proxy)
                    await proxy.start()
                return await _race(given, rng, recorder, proxies)
            finally:
                for proxy in proxies:
                    proxy.end()
    finally:
        postgres.close()
        await runner.cleanup()


async def _race(
    given: argparse.Namespace,
    rng: random.Random,
    recorder: Recorder,
    proxies: list[ProxyProcess],
) -> dict[str, Any]:
    numbers: dict[str, dict[str, int]] = {f"c{c}": {} for c in range(given.conversations)}
    failures: list[str] = []
    answered = [0, 0]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(conversation: str, prompt: str, which: int) -> None:
            body = {
                "prompt": prompt, "service_type": "fixed", "options": {"model": "m"},
                "conversation": conversation,
            }  # fmt: skip
            async with session.post(f"{proxies[which].url}/v1/request", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    failures.append(f"{prompt}: {response.status} {answer}")
                    return
                numbers[conversation][prompt] = answer["metadata"]["context"]["sequence"]
                answered[which] += 1
                done = sum(answered)
                if done % 500 == 0:
                    progress(f"{done} answered")

        wanted = [
            (conversation, f"{conversation}/{number}", rng.randrange(2))
            for conversation in numbers
            for number in range(given.requests)
        ]
        rng.shuffle(wanted)
        began_s = time.monotonic()
        await asyncio.gather(*(ask(*one) for one in wanted))
        took_s = time.monotonic() - began_s
        wrong = {}
        for conversation, numbered in numbers.items():
            url = f"{proxies[rng.randrange(2)].url}/v1/conversations/{conversation}"
            async with session.get(url) as response:
                stored = [one["prompt"] for one in (await response.json())["messages"]]
            found = judge(recorder.calls.get(conversation, []), numbered, stored)
            if found:
                wrong[conversation] = found
    sequence_bytes = sum(len(numbered) for numbered in numbers.values())
    return {
        "conversations": given.conversations,
        "requests_each": given.requests,
        "answered": answered,
        "failed": len(failures),
        "first_failure": failures[0] if failures else None,
        "in_order": given.conversations - len(wrong),
        "out_of_order": dict(list(wrong.items())[:5]),
        "requests_per_s": round(sequence_bytes / took_s, 1),
        "bars": {"every_order_kept": not wrong and not failures},
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--requests", type=int, default=50, help="of each conversation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    given = arguments()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(given))
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
