"""A proxy daemon object in the test's loop with a scripted provider behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.unit.proxy.provider import Provider, running

from intentd.daemons.kit.config import validate
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.proxy.config import ProxyConfig
from intentd.proxy.daemon import ProxyDaemon


class Site:
    """Starts proxies; ``post`` and friends talk to the last one."""

    def __init__(self, base: Path, provider: Provider, tasks: Tasks) -> None:
        self.base = base
        self.provider = provider
        self.tasks = tasks
        self.session = aiohttp.ClientSession()
        self.proxies: list[ProxyDaemon] = []
        self.proxy: ProxyDaemon

    def config(self, **fields: Any) -> ProxyConfig:
        plain: dict[str, Any] = {
            "name": "p",
            "state_dir": self.base / "state",
            "run_dir": self.base / "run",
            "controller": {"enabled": False},
            "listen": {"bind": "127.0.0.1:0"},
            "upstream": {"backoff_s": 0.001, "retry_share": 1.0},
            "cache": {"semantic": "off"},
            "models": [self.model("m")],
        }
        return validate(ProxyConfig, {**plain, **fields})

    def model(self, name: str, **fields: Any) -> dict[str, Any]:
        plain = {
            "name": name, "base_url": self.provider.url, "upstream_model": f"up-{name}",
            "price_in": "1", "price_out": "10",
        }  # fmt: skip
        return {**plain, **fields}

    async def start(self, **fields: Any) -> ProxyDaemon:
        (self.base / "state").mkdir(exist_ok=True)
        self.proxy = ProxyDaemon(self.config(**fields), Kit("proxy"))
        self.proxies.append(self.proxy)
        await self.proxy.start(self.tasks)
        return self.proxy

    @property
    def url(self) -> str:
        return f"http://{self.proxy.address}"

    async def post(
        self, path: str, body: Any = None, **options: Any
    ) -> tuple[int, dict[str, Any], Any]:
        async with self.session.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json(), response.headers.copy()

    async def get(self, path: str, **options: Any) -> tuple[int, dict[str, Any], Any]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.json(), response.headers.copy()

    async def chat(self, **fields: Any) -> tuple[int, dict[str, Any], Any]:
        headers = fields.pop("headers", None)
        return await self.post("/v1/chat/completions", chat_body(**fields), headers=headers)

    async def stream(self, **fields: Any) -> list[str]:
        """The data of every event; the connection must end in order."""
        body = chat_body(stream=True, **fields)
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            text = await response.text()
        return [line.removeprefix("data: ") for line in text.split("\n\n") if line]

    async def stop(self) -> None:
        for proxy in self.proxies:
            await proxy.stop()


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Say hello"}], **fields}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running() as provider, Tasks() as tasks:
        site = Site(tmp_path, provider, tasks)
        try:
            yield site
        finally:
            await site.stop()
            await site.session.close()
            tasks.cancel_all()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
