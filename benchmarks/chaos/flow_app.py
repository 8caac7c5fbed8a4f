"""An application of the campaign: flows at random times through this host's agent, for ever.

python -m benchmarks.chaos.flow_app SINK_ADDRESS SINK_PORT RATE_PER_S SEED FIRST_ID MAX_WAIT_S

Open loop: it does not wait for one flow before the next. Each event is a line on standard output:
``a id`` arrived, ``s id waited_s degraded`` started, ``f id`` the receiver has every byte, ``b id``
the connection broke and the flow is opened again. A flow's bytes go over a connection of a pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import sys

from intentd.agent.client import AsyncFlows

HEAD = struct.Struct("!Q")
MOST_OPEN = 400  # beyond, an arrival is left out: the link is down, and memory has an end
SIZES = ((0.6, 2_000, 20_000), (0.3, 20_000, 200_000), (0.1, 200_000, 2_000_000))


def size_of(rng: random.Random) -> int:
    """Heavy tailed: most flows are short, most bytes are in long ones."""
    shares = [share for share, _, _ in SIZES]
    _, low, high = rng.choices(SIZES, shares)[0]
    return round(low * (high / low) ** rng.random())


class App:
    def __init__(self, address: str, port: int, max_wait_s: float) -> None:
        self.address, self.port = address, port
        self.flows = AsyncFlows(name="campaign", max_wait_s=max_wait_s)
        self.pool: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.payload = bytes(1 << 16)
        self.open = 0

    async def flow(self, number: int, size: int) -> None:
        say("a", number)
        self.open += 1
        try:
            while not await self._attempt(number, size):
                say("b", number)
                await asyncio.sleep(0.5)
            say("f", number)
        finally:
            self.open -= 1

    async def _attempt(self, number: int, size: int) -> bool:
        writer = None
        try:
            reader, writer = self.pool.pop() if self.pool else await self._connect()
            async with self.flows.open(size, sock=writer) as flow:
                say("s", number, f"{flow.waited_s:.3f}", flow.degraded or "-")
                writer.write(HEAD.pack(size))
                left = size
                while left:
                    piece = self.payload[: min(left, len(self.payload))]
                    await flow.send(writer, piece)
                    left -= len(piece)
            await reader.readexactly(HEAD.size)
        except (OSError, asyncio.IncompleteReadError):
            if writer is not None:
                writer.transport.abort()
            return False
        self.pool.append((reader, writer))
        return True

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(10):
            return await asyncio.open_connection(self.address, self.port)


def say(*words: object) -> None:
    print(*words, flush=True)


async def main() -> None:
    address, port, rate, seed, first, max_wait = sys.argv[1:7]
    rng = random.Random(int(seed))
    app = App(address, int(port), float(max_wait))
    number = int(first)
    with contextlib.suppress(BrokenPipeError):
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(rng.expovariate(float(rate)))
                if app.open < MOST_OPEN:
                    number += 1
                    tasks.create_task(app.flow(number, size_of(rng)), name=f"flow {number}")


if __name__ == "__main__":
    asyncio.run(main())
