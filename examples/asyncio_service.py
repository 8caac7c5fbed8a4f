"""An asyncio service whose answers take their turn: HTTP, one body of the size asked for.

    python examples/asyncio_service.py [--bind 127.0.0.1:8080]
    curl http://127.0.0.1:8080/bytes/1000000 | wc -c

All requests of the process share one connection to the agent. The answer's headers say what the
agent decided: X-Intentd-Class, X-Intentd-Waited-Ms, X-Intentd-Start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys

from intentd.agent.client import aflows

BLOCK = bytes(1 << 16)
MAX_BYTES = 1 << 32


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while (request := await reader.readuntil(b"\r\n\r\n")) and await answer(request, writer):
            pass
    writer.close()


async def answer(request: bytes, writer: asyncio.StreamWriter) -> bool:
    """One response; False to end the connection."""
    path = request.split(b" ", 2)[1:2]
    digits = path[0].rpartition(b"/bytes/")[2] if path else b""
    if not digits.isdigit() or int(digits) > MAX_BYTES:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        return False
    size = int(digits)
    async with aflows.open(size, peer=writer) as flow:
        head = (
            "HTTP/1.1 200 OK\r\n"
            f"Content-Length: {size}\r\n"
            f"X-Intentd-Class: {flow.class_index}\r\n"
            f"X-Intentd-Waited-Ms: {flow.waited_s * 1e3:.3f}\r\n"
            f"X-Intentd-Start: {flow.degraded or 'ordered'}\r\n\r\n"
        )
        await flow.send(writer, head.encode())
        for start in range(0, size, len(BLOCK)):
            await flow.send(writer, BLOCK[: size - start])
    return True


async def main() -> int:
    parser = argparse.ArgumentParser(description="an asyncio service gated by intentd")
    parser.add_argument("--bind", default="127.0.0.1:8080")
    host, _, port = parser.parse_args().bind.rpartition(":")
    server = await asyncio.start_server(handle, host, int(port))
    print("listening on {}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    async with server:
        await server.serve_forever()
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
