"""The chat page, its JSON API, and WhatsApp's webhook: one aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web
from examples.qa_service.service import DAILY, TREND, Answer, QaService, RefusedError
from examples.qa_service.whatsapp import WhatsApp, messages, signed

log = logging.getLogger(__name__)

COOKIE = "qa_user"
PAGE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES = 64 << 10
RECOMMEND_EVERY_S = 3600.0
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


class Web:
    """Handlers. whatsapp: None where it is not set up; then its paths answer 404."""

    def __init__(self, service: QaService, whatsapp: WhatsApp | None) -> None:
        self._service = service
        self._whatsapp = whatsapp

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/", self._page),
                web.post("/api/ask", self._ask),
                web.post("/api/better", self._better),
                web.post("/api/recommended", self._recommended),
                web.get("/api/followups/{question}", self._followups),
                web.get("/api/board", self._board),
            ]
        )
        if self._whatsapp is not None:
            app.add_routes(
                [web.get("/whatsapp", self._subscribe), web.post("/whatsapp", self._delivery)]
            )
        app.cleanup_ctx.append(self._background)
        return app

    async def _background(self, _: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._recommend_for_ever(), name="recommend")]
        if self._whatsapp is not None:
            tasks.append(asyncio.create_task(self._whatsapp.run(), name="whatsapp"))
        yield
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _recommend_for_ever(self) -> None:
        """Every hour what is trending; once a day, in the morning, the push."""
        while True:
            try:
                await self._service.recommend()
                if self._whatsapp is not None and self._service.push_is_due():
                    log.info("pushed to %d users", await self._whatsapp.push_daily(time.time()))
            except Exception:
                log.exception("recommendations")
            await asyncio.sleep(RECOMMEND_EVERY_S)

    # -- the page ---------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.Response:
        response = web.Response(
            text=PAGE.read_text(),
            content_type="text/html",
            headers={"Content-Security-Policy": POLICY, "X-Frame-Options": "DENY"},
        )
        if COOKIE not in request.cookies:
            response.set_cookie(
                COOKIE, secrets.token_urlsafe(18), httponly=True, samesite="Strict",
                max_age=365 * 86400,
            )  # fmt: skip
        return response

    async def _ask(self, request: web.Request) -> web.Response:
        user, body = await self._read(request)
        typed = body.get("tapped") is not True
        return await self._answered(
            self._service.ask(user, _text(body, "text"), name=_name(body), typed=typed)
        )

    async def _better(self, request: web.Request) -> web.Response:
        user, body = await self._read(request)
        return await self._answered(self._service.better(user, _number(body, "id")))

    async def _recommended(self, request: web.Request) -> web.Response:
        user, body = await self._read(request)
        number = _number(body, "id")
        return await self._answered(
            self._service.open_recommendation(user, number, name=_name(body))
        )

    async def _followups(self, request: web.Request) -> web.Response:
        text = request.match_info["question"]
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
        return web.json_response(await self._service.followups(_user(request), number))

    async def _board(self, _: web.Request) -> web.Response:
        store = self._service.store
        return web.json_response(
            {
                "daily": store.recommended(DAILY),
                "trending": store.recommended(TREND),
                "leaders": self._service.leaders(),
            }
        )

    async def _answered(self, call: Any) -> web.Response:
        try:
            answer: Answer = await call
        except RefusedError as refused:
            return web.json_response({"error": str(refused)}, status=422)
        return web.json_response(asdict(answer))

    async def _read(self, request: web.Request) -> tuple[str, dict[str, Any]]:
        """The user and the JSON object they sent. Another site's form cannot send JSON."""
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="expected application/json")
        user = _user(request)
        try:
            body = await request.json()
        except ValueError:
            raise web.HTTPBadRequest(text="body: expected JSON") from None
        if not isinstance(body, dict):
            raise web.HTTPBadRequest(text="body: expected an object")
        return user, body

    # -- WhatsApp ---------------------------------------------------------------------------------

    async def _subscribe(self, request: web.Request) -> web.Response:
        """Meta asks whether this address is ours."""
        assert self._whatsapp is not None
        token = request.query.get("hub.verify_token", "")
        ours = hmac.compare_digest(token.encode(), self._whatsapp.settings.verify_token.encode())
        if request.query.get("hub.mode") != "subscribe" or not ours:
            raise web.HTTPForbidden(text="verify_token: not ours")
        return web.Response(text=request.query.get("hub.challenge", ""))

    async def _delivery(self, request: web.Request) -> web.Response:
        assert self._whatsapp is not None
        body = await request.read()
        signature = request.headers.get("X-Hub-Signature-256")
        if not signed(body, signature, self._whatsapp.settings.app_secret):
            raise web.HTTPForbidden(text="signature: does not match the body")
        try:
            incoming = list(messages(body))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        if not all(self._whatsapp.take(one) for one in incoming):
            raise web.HTTPServiceUnavailable(text="not taken, deliver again")
        return web.Response(text="ok")


def _user(request: web.Request) -> str:
    cookie = request.cookies.get(COOKIE, "")
    if not 8 <= len(cookie) <= 64 or not cookie.replace("-", "").replace("_", "").isalnum():
        raise web.HTTPForbidden(text="open the page first")
    return f"web-{cookie}"


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str):
        raise web.HTTPBadRequest(text=f"{field}: expected a text")
    return value


def _name(body: dict[str, Any]) -> str:
    value = body.get("name", "")
    return " ".join(value.split())[:40] if isinstance(value, str) else ""


def _number(body: dict[str, Any], field: str) -> int:
    value = body.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**53:
        raise web.HTTPBadRequest(text=f"{field}: expected a number")
    return value
