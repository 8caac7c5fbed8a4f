"""intentd-proxy as a process: killed in the middle of many streams, and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from benchmarks import proxy_budget
from benchmarks.local_postgres import why_not
from tests.unit.proxy.provider import Provider, Script, running

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PRICE_IN_NANO, PRICE_OUT_NANO = 1_000, 1_000_000  # a token: $1 and $1,000 a million
STREAMS = 200


class Proxy:
    """One process, started and ended by the test, its files in one directory."""

    def __init__(self, base: Path, provider: Provider) -> None:
        self.base = base
        self.config = base / "proxy.toml"
        self.config.write_text(
            f'state_dir = "{base}/state"\nrun_dir = "{base}/run"\n'
            "[controller]\nenabled = false\n"
            "[status]\nenabled = false\n"
            '[listen]\nbind = "127.0.0.1:0"\n'
            '[[models]]\nname = "m"\n'
            f'base_url = "{provider.url}"\nprice_in = "1"\nprice_out = "1000"\n'
            "max_output_tokens = 20\n"
        )
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "RUNTIME_DIRECTORY": str(base / "run"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> str:
        """The URL of its API."""
        self.process = self._spawn()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(Exception):
                    return "http://" + (await self.admin("status"))["detail"]["api"]
                assert self.process.poll() is None, (self.base / "log").read_text()
                await asyncio.sleep(0.05)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "intentd.proxy.daemon", "--config", str(self.config)]
        with (self.base / "log").open("ab") as log:
            return subprocess.Popen(command, env=self.env, stderr=log)

    async def admin(self, command: str, **args: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(
            str(self.base / "run" / "proxy.admin.sock")
        )
        try:
            writer.write(json.dumps({"command": command, "args": args}).encode() + b"\n")
            answer = json.loads(await reader.readline())
        finally:
            writer.close()
        assert answer["ok"], answer
        return answer["result"]

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.process = None
        return status


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Provider]]:
    async with running() as provider:
        proxy = Proxy(tmp_path, provider)
        try:
            yield proxy, provider
        finally:
            if proxy.process is not None:
                proxy.process.kill()
                proxy.process.wait(10)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  the provider's books have no event
            await asyncio.sleep(0.005)


async def one_stream(session: aiohttp.ClientSession, url: str, secret: str) -> int:
    """Tokens received before it ended, however it did."""
    body = {"model": "m", "messages": [{"role": "user", "content": "go"}], "stream": True}
    got = 0
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(
            f"{url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {secret}"},
        ) as response:
            if response.status != 200:
                return 0
            async for line in response.content:
                got += b'"content"' in line
    return got


async def test_killed_in_the_middle_of_streams(proxy: tuple[Proxy, Provider]) -> None:
    daemon, provider = proxy
    provider.default = Script(words=tuple("abcdefghijklmnopqrst"), event_delay_s=0.02)
    url = await daemon.start()
    # Enough for about half of the streams at what each may cost at most.
    limit_nano = STREAMS // 2 * 20 * PRICE_OUT_NANO
    made = await daemon.admin(
        "keys.new",
        name="class",
        grants={"budgets": [{"unit": "dollars", "limit": f"{limit_nano / 1e9:.9f}"}]},
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        streams = [
            asyncio.ensure_future(one_stream(session, url, made["secret"])) for _ in range(STREAMS)
        ]
        await until(lambda: provider.bill_out >= 300)
        daemon.end(signal.SIGKILL)
        received = sum(await asyncio.gather(*streams))
    await until(lambda: not provider.open_calls)  # it goes on until it sees that nobody listens
    bill_nano = provider.bill_in * PRICE_IN_NANO + provider.bill_out * PRICE_OUT_NANO
    await daemon.start()
    page = await daemon.admin("spend")
    (account,) = page["accounts"]
    (row,) = page["rows"]
    assert 0 < received <= provider.bill_out
    assert bill_nano <= account["spent"] <= limit_nano
    assert account["reserved"] == 0
    assert row["cost_nano"] == account["spent"]
    assert account["spent"] - bill_nano <= row["estimated_nano"]
    assert daemon.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_a_budget_holds_through_a_kill(store: str) -> None:
    if store == "postgres" and (reason := why_not()):
        pytest.skip(reason)
    given = ["--streams", "80", "--kills", "1", "--event-s", "0.05", "--store", store]
    result = asyncio.run(proxy_budget.measure(proxy_budget.arguments(given)))
    assert all(result["bars"].values()), result


async def test_stops_in_order(proxy: tuple[Proxy, Provider]) -> None:
    daemon, provider = proxy
    gate = asyncio.Event()
    provider.default = Script(gate=gate)
    url = await daemon.start()
    body = {"model": "m", "messages": [{"role": "user", "content": "go"}]}
    async with aiohttp.ClientSession() as session:

        async def ask() -> int:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                await response.read()
                return response.status

        asked = asyncio.ensure_future(ask())
        async with asyncio.timeout(30):
            await provider.started.wait()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        gate.set()
        assert await asked == 200
    process, daemon.process = daemon.process, None
    assert await asyncio.to_thread(process.wait, 30) == 0


async def test_operated_by_intentctl(proxy: tuple[Proxy, Provider]) -> None:
    daemon, _ = proxy
    url = await daemon.start()

    async def ctl(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "intentd.daemons.ctl", "prompts", *arguments,
            env=daemon.env, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, out.decode()

    code, secret = await ctl("keys", "new", "alice", "--budget", "5/month", "--model", "m")
    assert code == 0
    body = {"model": "m", "messages": [{"role": "user", "content": "go"}]}
    headers = {"Authorization": f"Bearer {secret.strip()}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status == 200
    code, text = await ctl("spend", "--json")
    (account,) = json.loads(text)["accounts"]
    assert code == 0
    assert account["account"].startswith("key:alice/nano_dollars/")
    assert account["spent"] > 0
    for arguments in (("keys", "list"), ("spend", "--by", "key"), ("models",)):
        code, text = await ctl(*arguments)
        assert code == 0
        assert ("m" if arguments == ("models",) else "alice") in text
    assert (await ctl("keys", "revoke", "nobody"))[0] == 2
    assert (await ctl("keys", "revoke", "alice"))[0] == 0
    assert secret.strip().encode() not in (daemon.base / "log").read_bytes()
