"""``intentctl drain``: new work is turned away, what runs ends, what is left is told, and back."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.real.test_agent_process import Agent, qdisc
from tests.real.test_proxy_process import Proxy
from tests.unit.proxy.provider import Provider, Script, running

from intentd.agent.client import Flows
from intentd.daemons.ctl import main as tool
from intentd.testbed import netns

pytestmark = pytest.mark.real

BODY = {"model": "m", "messages": [{"role": "user", "content": "go"}], "stream": True}


class Ctl:
    """intentctl drain in this process, at the daemons of a run directory."""

    def __init__(
        self, run_dir: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        patch.setenv("RUNTIME_DIRECTORY", str(run_dir))
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit status, and what --json printed."""
        code = tool.main(["drain", *arguments, "--json"])
        out, err = self._capture.readouterr()
        assert out, err
        document: dict[str, Any] = json.loads(out)
        return code, document


@pytest.fixture
def drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Ctl:
    return Ctl(tmp_path / "run", monkeypatch, capsys)


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Provider]]:
    async with running() as provider:
        made = Proxy(tmp_path, provider)
        text = made.config.read_text()
        assert "[status]\nenabled = false\n" in text
        made.config.write_text(
            text.replace("[status]\nenabled = false\n", '[status]\nbind = "127.0.0.1:0"\n')
        )
        try:
            yield made, provider
        finally:
            if made.process is not None:
                made.process.kill()
                made.process.wait(10)


async def test_a_proxy_ends_its_streams_and_comes_back(
    proxy: tuple[Proxy, Provider], drain: Ctl
) -> None:
    daemon, provider = proxy
    gate = asyncio.Event()
    provider.default = Script(gate=gate)
    url = await daemon.start()
    ready = "http://" + (await daemon.admin("status"))["status_address"] + "/readyz"
    chat = f"{url}/v1/chat/completions"

    async def ctl(*arguments: str) -> tuple[int, dict[str, Any]]:
        return await asyncio.to_thread(drain, "proxy", *arguments)

    async with aiohttp.ClientSession() as session, aiohttp.ClientSession() as other:

        async def stream() -> str:
            async with session.post(chat, json=BODY) as response:
                return await response.text()

        async with other.get(f"{url}/v1/models") as response:  # its connection stays open
            assert response.status == 200
        asked = asyncio.ensure_future(stream())
        async with asyncio.timeout(30):
            await provider.started.wait()
        code, told = await ctl("--timeout", "0")
        assert (code, told["state"], told["left"]) == (4, "draining", {"requests": 1})
        async with session.get(ready) as response:
            assert response.status == 503
            assert (await response.json())["reasons"] == [f"draining by uid {os.getuid()}"]
        async with other.post(chat, json=BODY) as response:
            assert response.status == 503
            assert response.headers["Connection"] == "close"
        with pytest.raises(aiohttp.ClientConnectorError):
            await other.post(chat, json=BODY)
        gate.set()
        assert "[DONE]" in await asked
        code, told = await ctl()
        assert (code, told["state"], told["left"]) == (0, "drained", {})
        code, told = await ctl("--undo")
        assert (code, told["state"]) == (0, "serving")
        async with session.get(ready) as response:
            assert response.status == 200
        assert "[DONE]" in await stream()  # at the same address


def start(agent: Agent) -> str:
    """How a new application's flow starts."""
    flows = Flows(str(agent.path), answer_timeout_s=60.0)
    flow = flows.open(100)
    flow.close()
    flows.close()
    return flow.degraded


@pytest.fixture
def node() -> Iterator[netns.Namespace | None]:
    """Where a device may be shaped; None: nowhere here."""
    if netns.unavailable():
        yield None
        return
    with netns.Topology("tdrn") as net:
        node = net.namespace("one")
        net.pair(node, net.namespace("two"))
        yield node


@pytest.mark.netns
def test_an_agent_lets_its_flows_end_gives_the_device_back_and_returns(
    node: netns.Namespace | None, tmp_path: Path, drain: Ctl
) -> None:
    device = node.interfaces["eth0"].device if node is not None else ""
    found = qdisc(node, device) if node is not None else ""
    prefix = tuple(node.command([])) if node is not None else ()
    agent = Agent(tmp_path, prefix, f'device = "{device}"' if device else "")
    agent.start()
    flows = Flows(str(agent.path), answer_timeout_s=60.0)
    try:
        shaped = agent.detail()["domains"]["up"]["tc"]["state"] == "shaped"
        running = flows.open(100)
        assert not running.degraded
        code, told = drain("agent", "--timeout", "0")
        assert (code, told["state"], told["left"]) == (4, "draining", {"flows": 1})
        assert start(agent) == "closed"  # and went on at once
        if node is not None and shaped:
            assert qdisc(node, device) != found  # as long as a flow sends
        running.close()
        code, told = drain("agent")
        assert (code, told["state"]) == (0, "drained")
        reasons = agent.admin.call("ready")["reasons"]
        assert reasons == [f"drained by uid {os.getuid()}"]
        if node is not None and shaped:
            assert qdisc(node, device) == found
            (claim,) = agent.admin.call("prove")["claims"]
            assert claim["holds"], claim
        code, told = drain("agent", "--undo")
        assert (code, told["state"]) == (0, "serving")
        assert start(agent) == ""
        if node is not None and shaped:
            assert "htb" in qdisc(node, device)
    finally:
        flows.close()
        agent.close()


def test_who_cannot_be_drained_is_told(
    tmp_path: Path, drain: Ctl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["drain", "sequencer"]) == 2
    assert "member: got 'sequencer', expected agent, proxy, or gpu/NODE" in capsys.readouterr().err
    assert tool.main(["drain", "agent", "--timeout", "-1"]) == 2
    assert tool.main(["drain", "agent"]) == 3
