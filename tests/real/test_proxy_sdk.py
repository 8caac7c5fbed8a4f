"""The official openai and anthropic clients, unmodified, through the proxy to a scripted provider.

The client lives in an environment of its own (its pins clash with others'): INTENTD_SDK_PYTHON
names its interpreter, made by ``python -m venv DIR && DIR/bin/pip install openai anthropic``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.provider import Provider, Script, running

from intentd.daemons.kit.config import validate
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.proxy.config import ProxyConfig
from intentd.proxy.daemon import ProxyDaemon

PYTHON = os.environ.get("INTENTD_SDK_PYTHON", "")
CLIENTS = Path(__file__).parent / "sdk"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PYTHON, reason="INTENTD_SDK_PYTHON names no interpreter with openai"),
]


class Scripted(Provider):
    """Behaves as the last message asks."""

    def next_script(self) -> Script:
        asked = str((self.requests[-1].get("messages") or [{}])[-1].get("content"))
        if asked == "cut":
            return Script(cut_after=2)
        return Script(endless=True, event_delay_s=0.01) if asked == "endless" else Script()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[tuple[ProxyDaemon, Provider]]:
    async with running(Scripted()) as provider, Tasks() as tasks:
        config: dict[str, Any] = {
            "name": "p",
            "state_dir": tmp_path,
            "run_dir": tmp_path,
            "controller": {"enabled": False},
            "listen": {"bind": "127.0.0.1:0"},
            "models": [{"name": "m", "base_url": provider.url, "price_in": "1"}],
        }
        proxy = ProxyDaemon(validate(ProxyConfig, config), Kit("proxy"))
        try:
            await proxy.start(tasks)
            yield proxy, provider
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await proxy.stop()
            tasks.cancel_all()


async def run(client: str, url: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(CLIENTS / client), url, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    return json.loads(out)


async def test_anthropic(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, _ = site
    assert await run("anthropic_client.py", f"http://{proxy.address}") == {
        "text": "Hello there.",
        "out": 3,
        "stream": "Hello there.",
        "stop": "end_turn",
        "bad_model": "not_found_error",
        "cut": "APIStatusError",
    }


async def test_openai(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, provider = site
    seen = await run("openai_client.py", f"http://{proxy.address}/v1")
    assert seen.pop("request_id").startswith("req_")
    assert seen == {
        "text": "Hello there.",
        "intentd": "m",
        "models": ["m"],
        "stream": "Hello there.",
        "usage": 3,
        "several": 2,
        "embedding": [0.5, 0.25],
        "completion": "Hello there.",
        "service_type": "cost",
        "bad_model": ["NotFoundError", "model", "model_not_found"],
        "bad_field": ["BadRequestError", "max_tokens", None],
        "cut": ["APIError", None, "upstream_cut"],
        "cancelled": True,
    }
    async with asyncio.timeout(10):
        await provider.stopped.wait()
