"""Controller and proxy as processes: outcomes become a policy that the proxy applies, restarts."""

from __future__ import annotations

import asyncio
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
from tests.unit.proxy.provider import Provider, running

from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

pytestmark = pytest.mark.real

WAIT_S = 60.0


class Process:
    """One daemon of the test's."""

    def __init__(self, where: Path, role: str, settings: str) -> None:
        self.where, self.role = where, role
        self.config = where / f"{role}.toml"
        self.config.write_text(
            f'name = "{role}1"\nstate_dir = "{where}/{role}"\nrun_dir = "{where}/run"\n'
            f'[status]\nbind = "127.0.0.1:0"\n{settings}'
        )
        self.admin = AdminClient(where / "run" / f"{role}.admin.sock", timeout_s=20)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.process = self._spawn()
        await until(self._answers)

    def _spawn(self) -> subprocess.Popen[bytes]:
        module = f"intentd.{self.role}.daemon"
        command = [sys.executable, "-m", module, "--config", str(self.config)]
        with (self.where / f"{self.role}.log").open("ab") as log:
            return subprocess.Popen(command, stderr=log, env=dict(os.environ))

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.where / f"{self.role}.log").read_text()
        try:
            detail = self.admin.call("status")["detail"]
            return self.role != "proxy" or bool(detail.get("api"))
        except AdminUnreachableError:
            return False

    def end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110  the state is in another process
            await asyncio.sleep(0.05)


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[tuple[Process, Process, Provider]]:
    hub = f"ipc://{tmp_path}/hub"
    async with running() as provider:
        provider.words_for = words
        models = "".join(
            f'[[models]]\nname = "{name}"\nbase_url = "{provider.url}"\n'
            f'price_in = "{price}"\nprice_out = "{price}"\n'
            for name, price in (("tiny", 1), ("mid", 10), ("big", 100))
        )
        controller = Process(
            tmp_path,
            "controller",
            f'[hub]\nbind = "{hub}"\nreport_interval_s = 0.2\n'
            "[prompts]\ninterval_s = 0.1\nmin_outcomes = 20\n"
            'intents = [{ service_type = "model_selector", quality = 9.0 }]\n',
        )
        proxy = Process(
            tmp_path,
            "proxy",
            f'[controller]\nendpoint = "{hub}"\nbackoff_min_s = 0.05\nbackoff_max_s = 0.5\n'
            f'[listen]\nbind = "127.0.0.1:0"\n{models}',
        )
        try:
            await controller.start()
            await proxy.start()
            yield controller, proxy, provider
        finally:
            for daemon in (proxy, controller):
                daemon.end(signal.SIGKILL)


def words(body: dict[str, Any]) -> tuple[str, ...]:
    """The verifier gives 8 to most answers and 10 to some."""
    text = str(body["messages"][-1]["content"])
    if "judge answers" in str(body["messages"][0]["content"]):
        return ("10" if "easy" in text else "8",)
    return (f"I am {body['model']}",)


async def ask(proxy: Process, prompts: list[str]) -> list[dict[str, Any]]:
    status = await asyncio.to_thread(proxy.admin.call, "status")
    url = f"http://{status['detail']['api']}/v1/request"
    answers = []
    async with aiohttp.ClientSession() as session:
        for prompt in prompts:
            body = {"prompt": prompt, "service_type": "model_selector"}
            async with session.post(url, json=body) as response:
                answers.append(await response.json())
                assert response.status == 200, answers[-1]
    return answers


def number(proxy: Process) -> list[int]:
    found: list[int] = proxy.admin.call("status")["policies"].get("prompts", [])
    return found


def ctl(where: Path, *arguments: str) -> Any:
    """intentctl against this test's daemons."""
    command = [sys.executable, "-m", "intentd.daemons.ctl", *arguments, "--json"]
    environ = {**os.environ, "RUNTIME_DIRECTORY": str(where / "run")}
    run = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


async def test_quality_asked_for_becomes_a_threshold_in_the_proxy(
    suite: tuple[Process, Process, Provider], tmp_path: Path
) -> None:
    controller, proxy, _ = suite
    before = await ask(proxy, ["easy"] * 5 + ["hard"] * 20)
    # until there are 20 outcomes 8 is enough
    assert {answer["metadata"]["model"] for answer in before[:15]} == {"mid"}
    await until(lambda: bool(number(proxy)))
    (hard, easy) = await ask(proxy, ["hard", "easy"])
    assert (hard["metadata"]["model"], easy["metadata"]["model"]) == ("big", "mid")
    assert hard["metadata"]["policy"] == number(proxy)

    shown = await asyncio.to_thread(ctl, tmp_path, "policy", "show", "--application", "prompts")
    why = shown["inputs"]["service_types"]["model_selector"]
    assert why["expected"]["quality_low"] >= 9.0
    assert shown["run_by"] == ["proxy/proxy1"]
    first = shown["number"]

    # The operator wants less, then takes it back.
    low = {"service_type": "model_selector", "quality": 5}
    call = controller.admin.call
    await asyncio.to_thread(call, "policy_set", document=low, application="prompts")
    await until(lambda: number(proxy)[1] > first)
    (hard,) = await ask(proxy, ["hard"])
    assert hard["metadata"]["model"] == "mid"
    await asyncio.to_thread(call, "policy_rollback", number=first, application="prompts")
    await until(lambda: number(proxy)[1] > first + 1)
    (hard,) = await ask(proxy, ["hard"])
    assert hard["metadata"]["model"] == "big"

    # The last policy outlives the proxy, and the controller's absence.
    last = number(proxy)
    controller.end(signal.SIGKILL)
    proxy.end(signal.SIGKILL)
    await proxy.start()
    assert number(proxy) == last
    (hard,) = await ask(proxy, ["hard"])
    assert hard["metadata"]["model"] == "big"
