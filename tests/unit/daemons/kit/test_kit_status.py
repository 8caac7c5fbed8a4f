"""The HTTP endpoint: documents, tokens, errors that stay answers."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from intentd.core.errors import IntentdError
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.status import StatusServer, json_response
from intentd.daemons.kit.tokens import TokenBook, token_hash


def request(address: str, path: str, method: str = "GET", token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    made = urllib.request.Request(f"http://{address}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(made, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def ask(*args: Any, **named: Any) -> tuple[int, str]:
    return await asyncio.to_thread(request, *args, **named)


def make(
    bind: str = "127.0.0.1:0", tokens: tuple[str, ...] = (), unready: Callable[[], list[str]] = list
) -> StatusServer:
    book = TokenBook(None, tokens, lambda: 0.0)
    server = StatusServer(bind, book, Metrics(), status=lambda: {"role": "toy"}, unready=unready)

    async def change(_request: web.Request) -> web.Response:
        return json_response({"changed": True})

    async def refuse(_request: web.Request) -> web.Response:
        raise IntentdError("not that")

    async def fail(_request: web.Request) -> web.Response:
        raise RuntimeError("a defect")

    server.app.router.add_post("/change", change)
    server.app.router.add_get("/refuse", refuse)
    server.app.router.add_get("/fail", fail)
    return server


async def test_the_four_documents() -> None:
    reasons: list[str] = []
    server = make(unready=lambda: reasons)
    await server.start()
    try:
        assert await ask(server.address, "/livez") == (200, "ok\n")
        assert json.loads((await ask(server.address, "/readyz"))[1]) == {
            "ready": True,
            "reasons": [],
        }
        reasons.append("disk full")
        code, text = await ask(server.address, "/readyz")
        assert (code, json.loads(text)["reasons"]) == (503, ["disk full"])
        assert json.loads((await ask(server.address, "/status"))[1]) == {"role": "toy"}
        code, text = await ask(server.address, "/metrics")
        assert "# HELP intentd_loop_lag_seconds How late" in text
        assert (await ask(server.address, "/none"))[0] == 404
        assert (await ask(server.address, "/refuse"))[0] == 400
        code, text = await ask(server.address, "/fail")
        assert (code, json.loads(text)) == (500, {"error": "internal error: RuntimeError"})
        assert (await ask(server.address, "/livez"))[0] == 200
    finally:
        await server.stop()


async def test_changing_needs_a_token() -> None:
    server = make()
    await server.start()
    try:
        assert (await ask(server.address, "/change", "POST"))[0] == 403
        server.set_tokens((token_hash("s3cret"),))
        assert (await ask(server.address, "/change", "POST"))[0] == 401
        assert (await ask(server.address, "/change", "POST", token="wrong"))[0] == 401
        assert (await ask(server.address, "/change", "POST", token="s3cret"))[0] == 200
        assert (await ask(server.address, "/status"))[0] == 200
    finally:
        await server.stop()


async def test_off_loopback_reading_needs_a_token() -> None:
    with pytest.raises(IntentdError, match=r"status.tokens"):
        make("0.0.0.0:0")
    server = make("0.0.0.0:0", (token_hash("s3cret"),))
    await server.start()
    try:
        address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        assert (await ask(address, "/livez"))[0] == 200
        assert (await ask(address, "/status"))[0] == 401
        assert (await ask(address, "/status", token="s3cret"))[0] == 200
        with pytest.raises(IntentdError, match="at least one"):
            server.set_tokens(())
    finally:
        await server.stop()


async def test_a_port_in_use_is_one_clear_error() -> None:
    first = make()
    await first.start()
    try:
        with pytest.raises(IntentdError, match="in use by another process"):
            await make(first.address).start()
    finally:
        await first.stop()


async def test_roles_and_names() -> None:
    server = make(tokens=("read:" + token_hash("r"), "operate:" + token_hash("o")))
    await server.start()
    try:
        code, text = await ask(server.address, "/change", "POST", token="r")
        assert (code, text) == (
            403,
            '{"error": "token configured-1: has role read, needs operate"}\n',
        )
        assert (await ask(server.address, "/change", "POST", token="o"))[0] == 200
        port = int(server.address.rpartition(":")[2])
        for host, expected in (
            ("evil.example", 421),
            (f"evil.example:{port}", 421),
            ("localhost", 200),
            (f"[::1]:{port}", 200),
        ):
            assert await raw_status(port, host) == expected, host
    finally:
        await server.stop()


async def raw_status(port: int, host: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /status HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    line = await reader.readline()
    writer.close()
    return int(line.split()[1])
