"""A light load for a suite that was just started, so that there is something to see.

    python -m intentd.testbed.live --socket RUN_DIR/agent.sock --gpu RUN_DIR/gpu.admin.sock \\
        --proxy http://127.0.0.1:7450

``intentctl up --live`` runs it beside the daemons. Flows of the web-search workload (sizes x .05)
between a server and a client of its own on the loopback, each announced to the agent; a job of half
a minute now and then; a prompt now and then, of each service type. A part whose daemon is away or
refuses waits and tries again; the others go on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from intentd.agent.client import AsyncFlows
from intentd.core.flows.workloads import workload
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError

FLOWS_PER_S: Final = 8.0
SIZE_SCALE: Final = 0.05
MOST_FLOWS: Final = 32
JOBS_EVERY_S: Final = 25.0
PROMPTS_EVERY_S: Final = 12.0
PROMPT_TIMEOUT_S: Final = 120.0
RETRY_S: Final = 15.0
BLOCK: Final = bytes(1 << 16)
REQUEST: Final = struct.Struct("!Q")
QUESTIONS: Final = (
    ("cost", "What is rain?"),
    ("quality", "Why is the sky blue?"),
    ("smart_cache", "How do tides come about?"),
    ("quality", "Why is the sky blue?"),
    ("model_selector", "What is a good name for a cat?"),
    ("smart_cache", "How do tides come about?"),
    ("latency", "What is two and two?"),
)


class Flows:
    """A server that sends as many bytes as it is asked for, and who asks."""

    def __init__(self, socket: str, rng: random.Random) -> None:
        self._flows = AsyncFlows(socket)
        self._rng = rng
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        sizes = workload("web-search").cdf
        async with server:
            while True:
                await asyncio.sleep(self._rng.expovariate(FLOWS_PER_S))
                size = max(1, int(SIZE_SCALE * sizes.quantile(self._rng.random())))
                if len(self._running) < MOST_FLOWS:  # else it is left out: the agent is away
                    task = asyncio.create_task(self._ask(port, size))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            (size,) = REQUEST.unpack(await reader.readexactly(REQUEST.size))
            async with self._flows.open(size, peer=writer) as flow:
                for start in range(0, size, len(BLOCK)):
                    await flow.send(writer, BLOCK[: size - start])
        writer.close()

    async def _ask(self, port: int, size: int) -> None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST.pack(size))
            while await reader.read(len(BLOCK)):
                pass
            writer.close()


async def submit_jobs(gpu: AdminClient, rng: random.Random) -> None:
    """Jobs that sleep, of several shapes; the longest about a minute."""
    for number in itertools.count(1):
        work_s = rng.uniform(10.0, 50.0)
        await gpu.acall(
            "jobs.submit",
            command=[sys.executable, "-m", "intentd.testbed.live_job", f"{work_s:.1f}"],
            name=f"live-{number}",
            size_gpu_s=work_s,
            min_gpus=1,
            max_gpus=rng.choice((1, 1, 2)),
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        await asyncio.sleep(rng.uniform(0.5, 1.5) * JOBS_EVERY_S)


async def ask_prompts(url: str, rng: random.Random) -> None:
    timeout = aiohttp.ClientTimeout(total=PROMPT_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for number, (service_type, prompt) in enumerate(itertools.cycle(QUESTIONS), 1):
            body: dict[str, Any] = {
                "prompt": prompt, "service_type": service_type, "max_tokens": 40
            }  # fmt: skip
            async with session.post(f"{url}/v1/request", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise OSError(f"{response.status} {answer}")
            if number % len(QUESTIONS) == 0:  # somebody wants it better
                again = {"id": answer["metadata"]["request_id"]}
                async with session.post(f"{url}/v1/regenerate", json=again) as response:
                    await response.read()
            await asyncio.sleep(rng.uniform(0.5, 1.5) * PROMPTS_EVERY_S)


async def keep(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Again after a failure, which is said once until another one comes."""
    said = ""
    while True:
        try:
            await work()
        except (OSError, aiohttp.ClientError, AdminRefusedError, AdminUnreachableError,
                TimeoutError, ValueError) as error:  # fmt: skip
            text = f"{name}: {type(error).__name__}: {error}"[:300]
            if text != said:
                print(text, file=sys.stderr, flush=True)
            said = text
        await asyncio.sleep(RETRY_S)


async def main_async(options: argparse.Namespace) -> None:
    rng = random.Random(options.seed)
    parts: list[Awaitable[None]] = []
    if options.socket:
        parts.append(keep("flows", Flows(options.socket, rng).run))
    if options.gpu:
        gpu = AdminClient(options.gpu, 30.0)
        parts.append(keep("jobs", lambda: submit_jobs(gpu, rng)))
    if options.proxy:
        parts.append(keep("prompts", lambda: ask_prompts(options.proxy, rng)))
    working = asyncio.gather(*parts)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, working.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await working


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--socket", default="", help="the agent's application socket")
    parser.add_argument("--gpu", type=Path, help="the GPU scheduler's admin socket")
    parser.add_argument("--proxy", default="", help="the proxy's address, http://HOST:PORT")
    parser.add_argument("--seed", type=int, default=1)
    os.nice(10)
    asyncio.run(main_async(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
