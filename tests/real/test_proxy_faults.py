"""Providers that fail in every way, in every dialect: never a part that looks like a whole answer.

A real daemon object over real sockets, a provider that fails as it is told; streams and whole
answers, passed through and by a service type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.conftest import Site
from tests.unit.proxy.provider import Script, running

from intentd.daemons.kit.lifecycle import Tasks

pytestmark = pytest.mark.real

WHOLE = {
    "/v1/chat/completions": ("data: [DONE]",),
    "/v1/responses": ("response.completed", "response.incomplete"),
    "/v1/messages": ("message_stop",),
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 50},
}
LIMITS = {
    "attempts": 2, "backoff_s": 0.001, "retry_share": 1.0, "first_token_timeout_s": 0.4,
    "idle_timeout_s": 0.15,
}  # fmt: skip
STREAM_FAULTS = {
    "cut": Script(cut_after=2),
    "garbage": Script(garbage_event=1),
    "error inside": Script(error_event=1),
    "slow drip": Script(drip_s=0.02),
    "no end": Script(no_done=True, no_finish=True),
}
WHOLE_FAULTS = {
    "500": Script(status=500),
    "429 with a long wait": Script(status=429, retry_after="60"),
    "never": Script(hang=True),
    "cut": Script(cut_after=20),
    "garbage": Script(garbage=True),
    "slow drip": Script(drip_s=0.02),
    "not an object": Script(raw=b"[]"),
    "no choice": Script(raw=b'{"choices": []}'),
}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running() as provider, Tasks() as tasks:
        made = Site(tmp_path, provider, tasks)
        models = [made.model("m"), made.model("big", price_in="9")]
        await made.start(models=models, upstream=LIMITS)
        try:
            yield made
        finally:
            await made.stop()
            await made.session.close()
            tasks.cancel_all()


@pytest.mark.parametrize("model", ["m", "cost"])
@pytest.mark.parametrize("fault", STREAM_FAULTS)
async def test_no_stream_looks_whole(site: Site, fault: str, model: str) -> None:
    for path, body in BODIES.items():
        site.provider.default = STREAM_FAULTS[fault]
        asked = {**body, "model": model, "stream": True}
        async with site.session.post(site.url + path, json=asked) as response:
            text = await response.text()
        assert "error" in text, (path, text)
        assert not any(mark in text for mark in WHOLE[path]), (path, text)
        site.provider.default = Script()
        async with site.session.post(site.url + path, json=asked) as response:
            text = await response.text()
        assert any(mark in text for mark in WHOLE[path]), (path, text)


@pytest.mark.parametrize("model", ["m", "cost"])
@pytest.mark.parametrize("fault", WHOLE_FAULTS)
async def test_no_answer_is_a_part(site: Site, fault: str, model: str) -> None:
    for path, body in BODIES.items():
        if fault == "no choice" and path == "/v1/chat/completions" and model == "m":
            continue  # passed through as it came: it does not look like an answer
        for one in site.proxy.api.engine.models.values():  # type: ignore[union-attr]  # started
            one.health.succeeded()
        site.provider.default = WHOLE_FAULTS[fault]
        asked = {**body, "model": model}
        async with site.session.post(site.url + path, json=asked) as response:
            document = await response.json()
            assert response.status in (429, 502, 503, 504), (path, document)
            if "429" in fault:
                assert int(response.headers["Retry-After"]) > 1
        error = document["error"]
        assert error["message"]
        assert error["type"] != "invalid_request_error"
