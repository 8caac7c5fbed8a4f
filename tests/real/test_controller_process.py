"""The controller as a process, members through the real link; kill -9, restart, old backups."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intentd.core.flows.policy import flows_from_plain
from intentd.core.flows.sampling import sample_sizes
from intentd.core.flows.workloads import workload
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.core.stats import LogHistogram
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.config import ControllerSection, DaemonConfig
from intentd.daemons.kit.lifecycle import Kit
from intentd.daemons.kit.link import MemberLink

pytestmark = pytest.mark.real

WAIT_S = 60.0


class AgentConfig(DaemonConfig):
    role = "agent"


class FakelessMember:
    """A member on the kit's own link; what it reports is set by the test."""

    def __init__(self, name: str, endpoint: str, where: Path) -> None:
        state = where / name
        state.mkdir(exist_ok=True)
        section = ControllerSection(
            endpoint=endpoint, report_interval_s=0.1, backoff_min_s=0.05, backoff_max_s=0.5
        )
        config = AgentConfig(name=name, state_dir=state, run_dir=state, controller=section)
        self.sizes = LogHistogram()
        self.sample: list[list[float]] = []
        self.arrived = 0.0
        self.refuse = ""
        self.got: list[tuple[int, int]] = []
        self.policy: NumberedPolicy | None = None
        self.kit = Kit("agent")
        self.link = MemberLink(
            config,
            self.kit,
            on_policy=self._apply,
            collect_report=self._report,
            capabilities=lambda: {"domains": ["eth0"], "shapes": False},
        )

    def send(self, sizes: np.ndarray) -> None:
        for size in sizes.tolist():
            self.sizes.add(size)
            self.sample.insert(0, [0.0, size])
            self.arrived += size

    def _report(self) -> dict[str, Any]:
        sample, self.sample = self.sample[:2000], []
        row = {
            "histogram": self.sizes.to_plain(),
            "sample": sample,
            "arrivals": self.sizes.count,
            "arrived_bytes": self.arrived,
            "queue": [1],
            "active": [1],
        }
        return {"flows": {"eth0": row}}

    def _apply(self, policy: NumberedPolicy) -> PolicyAck:
        flows_from_plain(policy.body)
        number = (policy.era, policy.number)
        if not self.refuse:
            self.got.append(number)
            self.policy = policy
        return PolicyAck(
            policy.application, policy.era, policy.number, not self.refuse, self.refuse
        )

    def classes(self) -> int:
        if self.policy is None:
            return 0
        domain = flows_from_plain(self.policy.body).domain("eth0")
        return 0 if domain is None else len(domain.classes)


class ControllerProcess:
    def __init__(self, where: Path) -> None:
        self.where = where
        self.state = where / "state"
        self.run = where / "run"
        self.endpoint = f"ipc://{where}/hub"
        self.config = where / "controller.toml"
        self.config.write_text(
            f'name = "c1"\nstate_dir = "{self.state}"\nrun_dir = "{self.run}"\n'
            '[status]\nbind = "127.0.0.1:0"\n'
            f'[hub]\nbind = "{self.endpoint}"\nreport_interval_s = 0.1\n'
            "[flows]\nthresholds_interval_s = 0.2\nrates_interval_s = 0.1\n"
        )
        self.admin = AdminClient(self.run / "controller.admin.sock", timeout_s=10)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        command = [sys.executable, "-m", "intentd.controller.daemon", "--config", str(self.config)]
        self._spawn(command)
        await until(self._answers)

    def _spawn(self, command: list[str]) -> None:
        with (self.where / "controller.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env=dict(os.environ))

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the controller exited"
        try:
            return bool(self.admin.call("ready")["ready"])
        except AdminUnreachableError:
            return False

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=WAIT_S)

    def newest(self) -> tuple[int, int]:
        shown = self.admin.call("policy_show")
        return shown["era"], shown["number"]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  the state is in another process
            await asyncio.sleep(0.02)


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[ControllerProcess]:
    process = ControllerProcess(tmp_path)
    await process.start()
    try:
        yield process
    finally:
        if process.process is not None and process.process.poll() is None:
            process.end(signal.SIGKILL)


@pytest.fixture
async def members(
    controller: ControllerProcess, tmp_path: Path
) -> AsyncIterator[list[FakelessMember]]:
    found = [FakelessMember(name, controller.endpoint, tmp_path) for name in ("a", "b")]
    async with asyncio.TaskGroup() as tasks:
        runner = [tasks.create_task(_run(member)) for member in found]
        try:
            yield found
        finally:
            for task in runner:
                task.cancel()


async def _run(member: FakelessMember) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            await member.link.start(tasks)
    finally:
        await member.link.stop()


async def test_bootstrap_learn_refuse_kill_and_go_on(
    controller: ControllerProcess, members: list[FakelessMember]
) -> None:
    first, second = members
    await until(lambda: all(member.classes() == 1 for member in members))
    rng = np.random.default_rng(4)
    cdf = workload("web-search").cdf
    for member in members:
        member.send(sample_sizes(cdf, 1000, rng))
    await until(lambda: all(member.classes() == 3 for member in members))

    second.refuse = "no such device"
    issued = controller.admin.call(
        "policy_set", document={"domain": "eth0", "mpl": [2, 1]}, author="test"
    )["issued"]
    await until(lambda: first.got[-1] == (issued["era"], issued["number"]))

    def refused() -> bool:
        rows = {row["name"]: row for row in controller.admin.call("members")["members"]}
        return rows["b"]["refused"].get("flows", {}).get("reason") == "no such device"

    await until(refused)
    second.refuse = ""

    before = controller.newest()
    controller.end(signal.SIGKILL)
    await controller.start()
    assert controller.newest() == before, "numbers go on after kill -9"
    await until(lambda: all(member.link.connected for member in members))
    await until(lambda: second.got[-1] == before)  # an old policy: the newest is sent whole
    controller.admin.call("policy_set", document={"domain": "eth0", "mpl": [1]}, author="test")
    await until(lambda: all(m.got[-1] == (before[0], before[1] + 1) for m in members))

    first_number = controller.admin.call("policy_list", limit=100)["policies"][-1]["number"]
    back = controller.admin.call("policy_rollback", number=first_number)["issued"]
    await until(lambda: all(m.got[-1] == (back["era"], back["number"]) for m in members))
    assert [member.classes() for member in members] == [1, 1]
    assert controller.admin.call("policy_list")["held"]["number"] == first_number
    assert controller.admin.call("policy_release") == {"released": True}
    await until(lambda: all(member.classes() == 3 for member in members))
    for member in members:
        assert member.got == sorted(set(member.got)), "numbers never go back or repeat"
    assert controller.end(signal.SIGTERM) == 0


async def test_store_from_an_old_backup_begins_an_era(
    controller: ControllerProcess, members: list[FakelessMember], tmp_path: Path
) -> None:
    await until(lambda: all(member.classes() == 1 for member in members))
    controller.end(signal.SIGKILL)
    shutil.copytree(controller.state, tmp_path / "backup")
    await controller.start()
    for level in (2, 3, 4):
        document = {"domain": "eth0", "max_wait": level}
        controller.admin.call("policy_set", document=document, author="test")
    newest = controller.newest()
    await until(lambda: all(member.got[-1] == newest for member in members))
    controller.end(signal.SIGKILL)
    shutil.rmtree(controller.state)
    shutil.copytree(tmp_path / "backup", controller.state)
    await controller.start()
    # The witness in the run directory saw more: what the store holds is issued in a new era.
    await until(lambda: all(member.got[-1] > newest for member in members))
    assert controller.newest() > newest
    # The same with every witness gone: only the members remember.
    newest = controller.newest()
    controller.end(signal.SIGKILL)
    shutil.rmtree(controller.state)
    (controller.run / "controller.newest").unlink()
    await controller.start()
    await until(lambda: all(member.got[-1] > newest for member in members))
    for member in members:
        assert member.got == sorted(set(member.got))


async def test_bad_input_is_refused_whole_with_its_path(controller: ControllerProcess) -> None:
    cases: list[tuple[object, str]] = [
        ({"domain": "eth0", "thresholds": [2000, 1000], "weights": [0.5, 0.3, 0.2]}, "threshold"),
        ({"domain": "eth0", "thresholds": [1000], "weights": [0.5, 0.6]}, "weight"),
        ({"domain": "eth0", "colour": 1}, "colour"),
        ({"domains": [{"domain": "ok"}, {"domain": "eth0", "mpl": [-1]}]}, "domains[1]"),
        ({"domain": "eth0", "policy": "srpt"}, "policy"),
        ("text", "policy"),
        (
            {"domain": "d", "rate_bps": 1e9, "classes": [{"threshold_bytes": 5, "weight": 1.0}]},
            "classes[0].threshold_bytes",
        ),
    ]
    for document, path in cases:
        with pytest.raises(AdminRefusedError, match="expected") as caught:
            controller.admin.call("policy_set", document=document, author="test")
        assert path in str(caught.value)
    assert controller.admin.call("policy_list")["policies"] == []
    assert controller.admin.call("domains")["domains"] == []


async def test_http_shows_members_policies_domains_and_flows(
    controller: ControllerProcess, members: list[FakelessMember]
) -> None:
    await until(lambda: all(member.classes() == 1 for member in members))
    base = "http://" + controller.admin.call("status")["status_address"]

    def get(path: str) -> Any:
        with urllib.request.urlopen(base + path, timeout=60) as answer:
            return json.load(answer)

    def page(path: str) -> Any:
        return asyncio.to_thread(get, path)

    assert [row["name"] for row in (await page("/api/members"))["members"]] == ["a", "b"]
    newest = (await page("/api/policies"))["policies"][0]
    whole = await page(f"/api/policies/{newest['number']}")
    assert whole["changes"] == ["eth0: new domain, 1 classes"]
    assert whole["inputs"]["domains"]["eth0"]["family"] == "2d"
    assert [row["domain"] for row in (await page("/api/domains"))["domains"]] == ["eth0"]
    flows = await page("/api/flows?domain=eth0")
    assert [row["weight"] for row in flows["domains"][0]["classes"]] == [1.0]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        await page("/api/policies/999999")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        await page("/api/flows?domain=nowhere")


class Browser:
    """One operator's, over restarts that change the port."""

    def __init__(self, controller: ControllerProcess) -> None:
        self.controller = controller
        self.cookie = ""

    def ask(self, path: str, form: dict[str, str] | None = None) -> tuple[Any, str]:
        origin = "http://" + self.controller.admin.call("status")["status_address"]
        request = urllib.request.Request(f"{origin}/console/{path}")
        request.add_header("Cookie", self.cookie)
        if form is not None:
            request.data = urllib.parse.urlencode(form).encode()
            request.add_header("Origin", origin)
        opener = urllib.request.build_opener(_Stay)
        with opener.open(request, timeout=60) as answer:
            return answer.headers, answer.read().decode()

    def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.ask("policies")[1])
        return found[1] if found else ""


class _Stay(urllib.request.HTTPRedirectHandler):
    """The answer itself, not where it points."""

    def http_error_303(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        return fp


async def test_a_session_and_what_members_told_outlive_a_restart(
    controller: ControllerProcess, members: list[FakelessMember]
) -> None:
    pytest.importorskip("jinja2")
    members[0].kit.changes.add("", "signal", "reload", "", "refused: name: got 1")
    secret = controller.admin.call("tokens.new", name="ann", role="operate")["secret"]
    browser = Browser(controller)
    headers, _ = await asyncio.to_thread(browser.ask, "login", {"token": secret, "next": "/"})
    browser.cookie = headers["Set-Cookie"].partition(";")[0]
    csrf = await asyncio.to_thread(browser.csrf)
    assert csrf

    def told() -> list[tuple[str, ...]]:
        rows = controller.admin.call("audit")["entries"]
        return [
            (row["via"], row["action"], row["about"], row["result"])
            for row in rows
            if row["about"].startswith("agent/")
        ]

    def heard() -> int:
        rows = controller.admin.call("members")["members"]
        return next((row["reports"] for row in rows if row["name"] == "a"), 0)

    await until(lambda: bool(told()))
    for number in (signal.SIGTERM, signal.SIGKILL):
        controller.end(number)
        await controller.start()
        assert await asyncio.to_thread(browser.csrf) == csrf
    await until(lambda: heard() > 0)
    before = heard()
    await until(lambda: heard() > before + 2)
    assert told() == [("signal", "reload", "agent/a", "refused: name: got 1")]
    await asyncio.to_thread(browser.ask, "logout", {"csrf": csrf})
    controller.end(signal.SIGKILL)
    await controller.start()
    assert await asyncio.to_thread(browser.csrf) == ""
