"""intentd-proxy's cache as a process: the real embedder, kill -9, intentctl."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.real.test_proxy_process import Proxy
from tests.unit.proxy.provider import Provider, running

from intentd.proxy.cache.available import missing_parts

pytestmark = pytest.mark.real
MISSING = missing_parts("")
FAQ = """Q: How long may I keep a book?
A: Three weeks; you can renew it twice.

Q: What does a lost card cost?
A: A new library card costs 8 euros.
"""
TYPES = """
[cache]
semantic = "on"

[[service_types]]
name = "asked"
stages = [{cache = "semantic", min_similarity = 0.7, limit = 4}, {context = "all"},
          {model = "one", models = "m"}, {store = "prompt"}]
"""


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        async with self.session.request(method, self.url + path, json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def ask(self, prompt: str, service_type: str = "asked") -> tuple[str, dict[str, Any]]:
        body = {"prompt": prompt, "service_type": service_type}
        answer = await self.call("POST", "/v1/request", body)
        return answer["response"], answer["metadata"]["cache"]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Provider]]:
    async with running() as provider:
        proxy = Proxy(tmp_path, provider)
        try:
            yield proxy, provider
        finally:
            if proxy.process is not None:
                proxy.process.kill()
                proxy.process.wait(10)


@contextlib.asynccontextmanager
async def started(proxy: Proxy) -> AsyncIterator[Client]:
    url = await proxy.start()
    async with aiohttp.ClientSession() as session:
        yield Client(session, url)


def configure(proxy: Proxy, text: str) -> None:
    proxy.config.write_text(proxy.config.read_text() + text)


@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
async def test_what_is_asked_in_other_words_is_served_and_what_is_not_the_same_is_not(
    daemon: tuple[Proxy, Provider],
) -> None:
    proxy, provider = daemon
    provider.words_for = lambda body: (
        "USE" if "Say with one word" in str(body) else "A model's answer.",
    )
    configure(proxy, TYPES)
    async with started(proxy) as client:
        text, told = await client.ask("How do I renew my library card?")
        assert (text, told["result"]) == ("A model's answer.", "miss")
        text, told = await client.ask("how do I renew my library card please")
        assert (text, told["result"]) == ("A model's answer.", "semantic"), told
        assert told["similarity"] > 0.9
        assert (await client.ask("How do I renew 2 library cards?"))[1]["result"] == "miss"
        assert (await client.ask("How do I not renew my library card?"))[1]["result"] == "miss"
        # what was stored before the embedder was needed is found as well
        made = await client.call(
            "PUT", "/v1/cache", {"object": FAQ, "source": "faq.md", "model": "rules"}
        )
        assert (made["kind"], made["pieces"]) == ("faq", 2)
        found = await client.call(
            "GET", "/v1/cache?key=price+of+a+replacement+card&limit=1&source=faq.md"
        )
        assert found["data"][0]["response"].startswith("A new library card")
        both = await client.call(
            "POST",
            "/v1/cache",
            {"keys": [{"key": "keep a book", "type": "prompt", "min_similarity": 0.3},
                      {"key": "lost card"}], "source": "faq.md"},
        )  # fmt: skip
        assert len(both["data"]) == 2
        # SmartCache: the small model is told the stored text and answers from it
        _, told = await client.ask("Is a replacement card expensive?", "smart_cache")
        assert (told["result"], told["source"]) == ("answered_from", "faq.md")
        shown = str(provider.requests[-1]["messages"])
        assert "8 euros" in shown
        gone = await client.call("DELETE", "/v1/cache?source=faq.md")
        assert gone == {"deleted": 2}
        status = (await proxy.admin("status"))["detail"]["cache"]
        assert status["embedder"] == "minilm-l6-int8"
        # a model's answer is written a moment behind; the list is read from the disk
        assert (await client.call("GET", "/v1/cache"))["data"]
        proxy.end(signal.SIGKILL)
    # vectors come from the disk
    async with started(proxy) as client:
        text, told = await client.ask("how do I renew my library card please?")
        assert told["result"] == "semantic"


async def test_an_acknowledged_put_outlives_kill_9(daemon: tuple[Proxy, Provider]) -> None:
    proxy, provider = daemon
    configure(proxy, '[cache]\nsemantic = "off"\n')
    acknowledged: list[int] = []
    async with started(proxy) as client:

        async def put(number: int) -> None:
            body = {"object": {"prompt": f"question {number}", "response": f"answer {number}"}}
            with contextlib.suppress(aiohttp.ClientError):
                await client.call("PUT", "/v1/cache", body)
                acknowledged.append(number)
                if len(acknowledged) == 20:
                    assert proxy.process is not None
                    proxy.process.send_signal(signal.SIGKILL)

        await asyncio.gather(*(put(number) for number in range(60)))
        assert 20 <= len(acknowledged) < 60
        proxy.end(signal.SIGKILL)
    async with started(proxy) as client:
        for number in acknowledged:
            found = await client.ask(f"question {number}", "quality")
            assert (found[0], found[1]["result"]) == (f"answer {number}", "exact")
    assert provider.requests == []


async def test_intentctl_puts_shows_and_deletes(
    daemon: tuple[Proxy, Provider], tmp_path: Path
) -> None:
    proxy, _ = daemon
    configure(proxy, '[cache]\nsemantic = "off"\n')

    async def ctl(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "intentd.daemons.ctl", "prompts", "cache", *arguments,
            env=proxy.env, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, out.decode()

    (tmp_path / "faq.md").write_text(FAQ)
    async with started(proxy) as client:
        code, text = await ctl("put", str(tmp_path / "faq.md"), "--model", "rules", "--json")
        assert (code, json.loads(text)["documents"][0]["pieces"]) == (0, 2)
        answer, told = await client.ask("What does a lost card cost?", "quality")
        assert (answer[:8], told["source"]) == ("A new li", "faq.md"), "everybody sees it"
        code, text = await ctl("list", "--source", "faq.md", "--json")
        assert (code, len(json.loads(text)["data"])) == (0, 2)
        assert "faq.md" in (await ctl("list"))[1]
        code, text = await ctl("stats", "--json")
        assert (code, json.loads(text)["put_items"]) == (0, 2)
        assert (await ctl("stats"))[0] == 0
        code, text = await ctl("delete", "--source", "faq.md", "--json")
        assert (code, json.loads(text)) == (0, {"deleted": 2})
        assert (await ctl("delete"))[0] == 2
        assert (await ctl("list", "--owner", "key:nobody"))[0] == 2
