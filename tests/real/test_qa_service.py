"""The question-and-answer service on a real proxy; the provider and WhatsApp's API are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer
from examples.qa_service.proxy import Proxy
from examples.qa_service.service import DAILY, Limiter, QaService, RefusedError
from examples.qa_service.store import Store
from examples.qa_service.web import Web
from examples.qa_service.whatsapp import Settings, WhatsApp, messages, signed
from tests.unit.proxy.provider import Provider, running

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
SECRET = "app-secret"


def words(body: dict[str, Any]) -> tuple[str, ...]:
    """Each kind of call of the proxy gets the kind of answer it wants."""
    text = json.dumps(body["messages"])
    if "most likely to ask next" in text:
        return ("What about rain?\n", "And snow?\n")
    if "numbers only" in text:
        return ("I take", " 2")
    return (f"by {'good' if body['max_tokens'] > 200 else 'fast'}",)


async def until(holds: Any) -> Any:
    async with asyncio.timeout(60):
        while not (found := await holds()):  # noqa: ASYNC110  another process has no event
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[QaService]:
    async with running() as provider:
        provider.words_for = words
        async with started_proxy(tmp_path, provider) as url:
            proxy, store = Proxy(url, ""), Store(tmp_path / "qa.sqlite")
            try:
                yield QaService(proxy, store)
            finally:
                await proxy.close()
                store.close()


@contextlib.asynccontextmanager
async def started_proxy(base: Path, provider: Provider) -> AsyncIterator[str]:
    """Its URL."""
    text = (ROOT / "examples" / "qa_service" / "proxy.toml").read_text()
    text = text.replace("http://127.0.0.1:7460/v1", provider.url)
    head = (
        f'state_dir = "{base}/state"\nrun_dir = "{base}/run"\n[controller]\nenabled = false\n'
        '[status]\nenabled = false\n[listen]\nbind = "127.0.0.1:0"\n'
    )
    (base / "proxy.toml").write_text(head + text)
    with (base / "log").open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  it returns at once
            [sys.executable, "-m", "intentd.proxy.daemon", "--config", str(base / "proxy.toml")],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            stderr=log,
        )

    async def api() -> str:
        assert process.poll() is None, (base / "log").read_text()
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(str(base / "run/proxy.admin.sock"))
            writer.write(b'{"command": "status", "args": {}}\n')
            answer = json.loads(await reader.readline())
            writer.close()
            return str(answer.get("result", {}).get("detail", {}).get("api", ""))
        return ""

    try:
        yield "http://" + await until(api)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


async def test_answer_better_answer_and_buttons(service: QaService) -> None:
    answer = await service.ask("u1", "Why is  the sky blue?", name="Ada")
    assert (answer.text, answer.model, answer.cached) == ("by fast", "fast", False)
    offered = await until(lambda: service.followups("u1", answer.id))
    assert set(offered) <= {"What about rain?", "And snow?"}
    tapped = await service.ask("u1", "What about rain?", typed=False)
    assert tapped.cached
    better = await service.better("u1", answer.id)
    assert (better.text, better.model) == ("by good", "good")
    assert service.leaders()["overall"] == [("Ada", 12)]
    with pytest.raises(RefusedError, match="do not remember"):
        await service.better("somebody else", answer.id)


async def test_recommendations_are_chosen_among_what_was_asked_and_answered_once(
    service: QaService,
) -> None:
    for user, text in (("a", "Is tea healthy?"), ("b", "Who won?"), ("c", "Why do cats purr?")):
        await service.ask(user, text)
    chosen = await service.recommend()
    assert set(chosen) <= {"Is tea healthy?", "Who won?", "Why do cats purr?"}
    ((number, text),) = service.store.recommended(DAILY)
    assert text == chosen[0]
    assert (await service.open_recommendation("d", number)).cached
    with pytest.raises(RefusedError, match="not recommended"):
        await service.open_recommendation("d", 999)


async def test_the_page_and_its_api(service: QaService) -> None:
    async with TestClient(TestServer(Web(service, None).application())) as client:
        assert (await client.post("/api/ask", json={"text": "x"})).status == 403  # no page yet
        page = await client.get("/")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        token = page.cookies["qa_user"].value
        client.session.headers["Cookie"] = f"qa_user={token}"
        asked = await client.post("/api/ask", json={"text": "Why?", "name": "Bo"})
        body = await asked.json()
        assert (body["text"], body["model"]) == ("by fast", "fast")
        better = await client.post("/api/better", json={"id": body["id"]})
        assert (await better.json())["model"] == "good"
        board = await (await client.get("/api/board")).json()
        assert board["leaders"]["today"] == [["Bo", 10]]
        for path, sent, status in (
            ("/api/ask", {"text": " "}, 422),
            ("/api/ask", {"text": 3}, 400),
            ("/api/better", {"id": -1}, 400),
            ("/api/better", {"id": 10**6}, 422),
        ):
            assert (await client.post(path, json=sent)).status == status
        assert (await client.post("/api/ask", data="text=x")).status == 415
        assert (await client.get("/whatsapp")).status == 404


class Meta:
    """WhatsApp's API: keeps what is sent to users."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer meta-token"
        self.sent.append(await request.json())
        return web.json_response({})


def delivery(number: str, message: dict[str, Any]) -> bytes:
    value = {
        "contacts": [{"wa_id": "4915", "profile": {"name": "Cy"}}],
        "messages": [{"id": number, "from": "4915", **message}],
    }
    return json.dumps({"entry": [{"changes": [{"value": value}]}]}).encode()


async def test_whatsapp(service: QaService) -> None:
    meta = Meta()
    graph = web.Application()
    graph.router.add_post("/123/messages", meta.take)
    async with TestServer(graph) as api:
        settings = Settings(
            "123", "meta-token", SECRET, "verify", str(api.make_url("")).rstrip("/")
        )
        whatsapp = WhatsApp(settings, service)
        async with TestClient(TestServer(Web(service, whatsapp).application())) as client:
            query = {"hub.mode": "subscribe", "hub.verify_token": "verify", "hub.challenge": "42"}
            assert await (await client.get("/whatsapp", params=query)).text() == "42"
            wrong = await client.get("/whatsapp", params=query | {"hub.verify_token": "guess"})
            assert wrong.status == 403
            text = delivery("m1", {"type": "text", "text": {"body": "Why is the sky blue?"}})
            assert (await client.post("/whatsapp", data=text)).status == 403
            for _ in range(2):  # Meta repeats what it is unsure of
                await post(client.session, client.make_url("/whatsapp"), text)
            first = await sent(meta, 1)
            assert first["interactive"]["body"]["text"] == "by fast"
            (button,) = first["interactive"]["action"]["buttons"]
            assert button["reply"]["title"] == "Get better answer"
            offered = await sent(meta, 2)
            titles = [b["reply"]["title"] for b in offered["interactive"]["action"]["buttons"]]
            assert titles == [str(n) for n in range(1, len(titles) + 1)]
            reply = {"type": "interactive", "interactive": {"button_reply": button["reply"]}}
            await post(client.session, client.make_url("/whatsapp"), delivery("m2", reply))
            assert (await sent(meta, 3))["text"]["body"] == "by good"
            assert len(meta.sent) == 3
        await whatsapp.close()


async def post(session: ClientSession, url: Any, body: bytes) -> None:
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    async with session.post(url, data=body, headers={"X-Hub-Signature-256": signature}) as reply:
        assert reply.status == 200, await reply.text()


async def sent(meta: Meta, count: int) -> dict[str, Any]:
    async def there() -> bool:
        return len(meta.sent) >= count

    await until(there)
    return meta.sent[count - 1]


@pytest.mark.parametrize("header", [None, "", "sha256=", "sha256=" + "0" * 64, "sha1=x"])
def test_a_wrong_signature_is_refused(header: str | None) -> None:
    assert not signed(b"{}", header, SECRET)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"entry": 3}', b'{"entry": ["x"]}', b"\xff"])
def test_what_is_no_delivery_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=re.compile("delivery|JSON|Expecting|utf|decode", re.I)):
        list(messages(body))


def test_limiter_forgets_after_a_minute_and_is_bounded() -> None:
    limiter = Limiter(2, users=2)
    assert [limiter.admits("a", now) for now in (0.0, 1.0, 2.0, 61.0)] == [True, True, False, True]
    for user in ("b", "c"):
        limiter.admits(user, 62.0)
    assert limiter.admits("a", 62.0)
    assert limiter.admits("a", 62.0)
