"""The agent's daemon object in the test's loop, with a hub for a controller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from intentd.agent.client import AsyncFlows
from intentd.agent.config import AgentConfig, DomainSection
from intentd.agent.daemon import AgentDaemon
from intentd.core.errors import ConfigError, InputError
from intentd.core.flows.policy import (
    ClassPolicy,
    DomainPolicy,
    FlowsPolicy,
    flows_to_plain,
)
from intentd.core.messages import NumberedPolicy, PolicyAck, Report
from intentd.core.stats import LogHistogram
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.config import ControllerSection, HubSection, validate
from intentd.daemons.kit.hub import HubLink
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.daemons.kit.reloading import refuse_fixed

INF = float("inf")


class Site:
    """A hub and agents that join it; what the hub hears."""

    def __init__(self, base: Path, tasks: Tasks) -> None:
        self.base = base
        self.tasks = tasks
        self.acks: asyncio.Queue[PolicyAck] = asyncio.Queue()
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.daemons: list[AgentDaemon] = []

    async def open(self) -> None:
        self.hub = HubLink(
            HubSection(bind="tcp://127.0.0.1:0", report_interval_s=0.05),
            Kit("controller"),
            name="c",
            on_report=lambda member, report: self.reports.put_nowait(report),
            on_ack=lambda member, ack: self.acks.put_nowait(ack),
        )
        await self.hub.start(self.tasks)

    def config(self, **fields: Any) -> AgentConfig:
        plain = {
            "name": "a",
            "state_dir": self.base / "state",
            "run_dir": self.base / "run",
            "controller": ControllerSection(endpoint=self.hub.endpoint, backoff_min_s=0.01),
            "domains": (
                DomainSection(name="up"),
                DomainSection(name="lab", peers=("10.9.0.0/16",)),
            ),
        }
        return validate(AgentConfig, {**plain, **fields})

    async def agent(self, **fields: Any) -> AgentDaemon:
        (self.base / "state").mkdir(exist_ok=True)
        daemon = AgentDaemon(self.config(**fields), Kit("agent"))
        self.daemons.append(daemon)
        await daemon.start(self.tasks)
        return daemon

    def publish(self, number: int, body: dict[str, Any]) -> None:
        self.hub.publish(NumberedPolicy("flows", 1, number, 0.0, body))

    async def ack(self) -> PolicyAck:
        async with asyncio.timeout(30):
            return await self.acks.get()


def policy(domain: str, *cut: float, **fields: Any) -> DomainPolicy:
    thresholds = (*cut, INF)
    classes = tuple(ClassPolicy(t, 1 / len(thresholds), **fields) for t in thresholds)
    return DomainPolicy(domain, 1e9, classes)


def body(*policies: DomainPolicy) -> dict[str, Any]:
    return flows_to_plain(FlowsPolicy(policies))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Tasks() as tasks:
        site = Site(tmp_path, tasks)
        await site.open()
        yield site
        for daemon in site.daemons:
            await daemon.stop()
        await site.hub.stop()
        tasks.cancel_all()


async def test_a_policy_is_applied_acked_and_kept_over_a_restart(site: Site) -> None:
    daemon = await site.agent()
    site.publish(3, body(policy("up", 1000.0), policy("elsewhere", 5.0)))
    assert await site.ack() == PolicyAck("flows", 1, 3, True)
    domains = daemon.status()["domains"]
    assert domains["up"]["policy"] == {"name": "2d", "era": 1, "number": 3}
    assert [row["threshold_bytes"] for row in domains["up"]["classes"]] == [1000.0, None]
    assert domains["lab"]["policy"]["number"] == 0  # the policy does not speak of it
    await daemon.stop()
    site.daemons.clear()
    again = await site.agent(controller=ControllerSection(enabled=False))
    assert again.status()["domains"]["up"]["policy"]["number"] == 3
    assert again.policies() == {"flows": [1, 3]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p["domains"][0].pop("rate_bps"), "domains[0].rate_bps: got None"),
        (lambda p: p["domains"][0].update(colour=1), "domains[0].colour: got 1"),
        (
            lambda p: p["domains"][0]["classes"][0].update(weight=0.9),
            "domains[0].classes[*].weight: got 1.4",
        ),
        (
            lambda p: p["domains"][1]["classes"].reverse(),
            "domains[1].classes[1].threshold_bytes: got 1000.0",
        ),
        (lambda p: p.update(domains=7), "policy.domains: got 7"),
    ],
)
async def test_a_policy_that_does_not_validate_is_refused_whole(
    site: Site, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    daemon = await site.agent()
    site.publish(1, body(policy("up", 1000.0), policy("lab", 1000.0)))
    assert (await site.ack()).applied
    broken = body(policy("up", 2000.0), policy("lab", 1000.0))
    change(broken)
    site.publish(2, broken)
    ack = await site.ack()
    assert (ack.number, ack.applied) == (2, False)
    assert ack.reason.startswith(reason)
    classes = daemon.status()["domains"]["up"]["classes"]
    assert [row["threshold_bytes"] for row in classes] == [1000.0, None]
    assert daemon.policies() == {"flows": [1, 1]}


async def test_a_policy_for_another_application_is_refused(site: Site) -> None:
    daemon = await site.agent()
    with pytest.raises(InputError, match=r"policy\.application: got 'jobs', expected flows"):
        await daemon._on_policy(NumberedPolicy("jobs", 1, 1, 0.0, {}))


async def test_the_report_says_what_happened(site: Site) -> None:
    daemon = await site.agent()
    aflows = AsyncFlows(str(daemon.config.socket_path), answer_timeout_s=20.0)
    for size in (100, 200, 300):
        async with aflows.open(size):
            pass
    async with aflows.open(50, peer="10.9.1.1"):
        pass
    total: dict[str, Any] = {}
    sample: list[int] = []
    async with asyncio.timeout(30):
        while total.get("finished") != 3:
            report = await site.reports.get()
            assert json.dumps(report.body)
            total = report.body["flows"]["up"]
            sample += [size for _, size in total["sample"]]
    assert (total["arrivals"], total["arrived_bytes"]) == (3, 600)
    assert sorted(sample) == [100, 200, 300]
    assert LogHistogram.from_plain(total["histogram"]).count == 3
    assert LogHistogram.from_plain(total["fct"]["0"]).count == 3
    assert total["tc"] == {"state": "unshaped", "reason": "no device is configured"}
    assert report.body["flows"]["lab"]["arrivals"] == 1
    aflows.close()


async def test_a_device_that_does_not_exist_is_told_and_flows_go_on(site: Site) -> None:
    daemon = await site.agent(domains=(DomainSection(name="up", device="nope0"),))
    state = daemon.status()["domains"]["up"]["tc"]
    assert state["state"] in ("failed", "unshaped")  # unshaped: without CAP_NET_ADMIN
    assert state["reason"]
    if state["state"] == "failed":
        assert daemon.unready() == [f"domain up: failed: {state['reason']}"]
    aflows = AsyncFlows(str(daemon.config.socket_path), answer_timeout_s=20.0)
    async with aflows.open(100) as flow:
        assert flow.degraded == ""
    aflows.close()


async def test_reload_keeps_gates_that_did_not_change(site: Site) -> None:
    daemon = await site.agent()
    site.publish(1, body(policy("up", 1000.0), policy("new", 7000.0)))
    assert (await site.ack()).applied
    aflows = AsyncFlows(str(daemon.config.socket_path), answer_timeout_s=20.0)
    held = await aflows.open(100)
    moved = (DomainSection(name="up", default=True), DomainSection(name="new", peers=("::/0",)))
    changed = site.config(domains=moved)
    await daemon.reload(changed)
    daemon.config = changed
    status = daemon.status()["domains"]
    assert sorted(status) == ["new", "up"]
    assert status["up"]["classes"][0]["active"] == 1
    assert [row["threshold_bytes"] for row in status["new"]["classes"]] == [7000.0, None]
    with pytest.raises(ConfigError, match="recent_flows: got 1, expected the value it started"):
        refuse_fixed(daemon.config, site.config(recent_flows=1), daemon.fixed)
    await held.close()
    aflows.close()


async def test_admin_commands(site: Site) -> None:
    daemon = await site.agent()
    domains = (await daemon.admin("domains", {}))["domains"]
    assert [(row["name"], row["peers"]) for row in domains] == [
        ("up", []),
        ("lab", ["10.9.0.0/16"]),
    ]
    assert json.dumps(await daemon.admin("flows", {}))
    with pytest.raises(AdminRefusedError, match="unknown to agent"):
        await daemon.admin("dance", {})
    assert json.dumps(daemon.dump())
