"""Where experiments run: hosts as namespaces with a bottleneck, or this machine's loopback.

    async with Lab(Setup(), directory, progress) as lab:
        run = await lab.run(Scenario("2d", "cache", 0.8, 1, trace, policy))

Everything started is stopped by its pid and every namespace removed, also after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from intentd.core.flows.policy import DomainPolicy, domain_to_plain
from intentd.testbed import netns, shaping
from intentd.testbed.awake import processors_awake
from intentd.testbed.metrics import busy_while_waiting, completion_metrics, floor_s, handover_s
from intentd.testbed.playing import Host, Played, PlayPlan, Progress, play
from intentd.testbed.replay import replay, write_completions
from intentd.testbed.results import Run
from intentd.testbed.suite import Suite
from intentd.testbed.traffic.records import FlowRecord, as_trace, write_records
from intentd.testbed.traffic.trace import TraceFlow, goodput_bps, offered_load

PREFIX: Final = "itb"
DOMAIN: Final = "bottleneck"
# A virtual machine whose host takes more than this away cannot time fractions of a millisecond.
# Set before looking at any completion time: a run is judged by the machine, not by its result.
STEAL_AT_MOST: Final = 0.01
# A persistent connection that paused must not fall back to its first window: without this every
# turn begins with slow start and the link idles 3 % of the time (measured: busy .96 -> .99).
SYSCTLS: Final = ("net.ipv4.tcp_slow_start_after_idle=0", "net.ipv4.tcp_no_metrics_save=1")


@dataclass(frozen=True, slots=True)
class Setup:
    """clients, servers: hosts of each kind. gate: "agent", or "local" for the gate in the client.

    namespaces: False puts everything on the loopback, unshaped. shared_gate: all client hosts use
    the agent of the first. downlink: the bottleneck is the switch's port to the first client, not
    the egress of the servers. learning: the controller computes policies itself. repeats: how often
    a run is played again because the host of this virtual machine took its processors away.
    """

    clients: int = 1
    servers: int = 1
    rate_bps: float = 1e9
    gate: str = "agent"
    namespaces: bool = True
    shared_gate: bool = False
    downlink: bool = False
    learning: bool = False
    ipv6: bool = False
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run. policy None: whatever the controller issues (needs learning)."""

    label: str
    workload: str
    load: float
    seed: int
    trace: Sequence[TraceFlow]
    policy: DomainPolicy | None
    simulate: bool = True
    mode: str = "open"
    drain_s: float = 60.0


class Lab:
    """Hosts, the bottleneck and, with gate "agent", the daemons of the suite."""

    def __init__(self, setup: Setup, directory: Path, progress: Progress) -> None:
        self.setup = setup
        self.directory = directory
        self.progress = progress
        self.clients: list[Host] = []
        self.servers: list[Host] = []
        self.suite: Suite | None = None
        self.played: Played | None = None
        self.before: dict[str, str] = {}
        self._playing = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Lab:
        try:
            await self._build()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def shaped(self) -> bool:
        return self.setup.namespaces

    async def _build(self) -> None:
        setup = self.setup
        names = [f"server{i}" for i in range(setup.servers)]
        names += [f"client{i}" for i in range(setup.clients)]
        names += ["sequencer", "controller"] if setup.gate == "agent" else []
        if setup.namespaces:
            hosts = await asyncio.to_thread(self._namespaces, names)
        else:
            hosts = {name: Host(name) for name in names}
        self.servers = [hosts[f"server{i}"] for i in range(setup.servers)]
        self.clients = [hosts[f"client{i}"] for i in range(setup.clients)]
        self.before = await self.qdiscs()
        if setup.gate == "agent":
            self.suite = await self._stack.enter_async_context(
                Suite(
                    servers=self.servers,
                    clients=self.clients,
                    sequencer=hosts["sequencer"],
                    controller=hosts["controller"],
                    domain=DOMAIN,
                    rate_bps=setup.rate_bps,
                    shaped=setup.namespaces,
                    learning=setup.learning,
                    downlink=setup.downlink,
                    directory=self.directory / "suite",
                )
            )

    def _namespaces(self, names: Sequence[str]) -> dict[str, Host]:
        netns.remove_stale(PREFIX)
        net = netns.Topology(PREFIX)
        self._stack.callback(net.close)
        spaces = [net.namespace(name) for name in names]
        switch = net.star(spaces)
        hosts = {}
        for space in spaces:
            end = space.interfaces["eth0"]
            for setting in SYSCTLS:
                space.run(["sysctl", "-q", "-w", setting])
            hosts[space.name] = Host(space.name, end.ipv4, end.ipv6, end.device, space)
        if self.setup.downlink:
            port = f"p{names.index('client0')}"
            _limit_port(switch, port, self.setup.rate_bps)
        return hosts

    async def run(self, scenario: Scenario) -> Run:
        """Play the scenario, save its records, replay it in the simulator."""
        name = _file_name(scenario)
        work = self.directory / "work" / name
        for repeat in range(self.setup.repeats + 1):
            await self._apply(scenario.policy)
            self._playing.clear()
            before = processor_times()
            with processors_awake(wanted=self.shaped):
                played = await self._play(scenario, work)
            steal = steal_share(before, processor_times())
            if steal <= STEAL_AT_MOST or repeat == self.setup.repeats:
                break
            self.progress(f"the host took {steal:.1%} of the processors: this run is played again")
            shutil.rmtree(work)
        self.played = played
        run = await asyncio.to_thread(self._judge, scenario, played, name, work)
        run.steal_share, run.repeats = steal, repeat
        return run

    async def _play(self, scenario: Scenario, work: Path) -> Played:
        return await play(
            PlayPlan(
                trace=scenario.trace,
                clients=self.clients,
                servers=self.servers,
                gates=[self._gate(index, scenario.policy) for index in range(len(self.clients))],
                mark="priority" if self.shaped else "dscp",
                mode=scenario.mode,
                drain_s=scenario.drain_s,
                ipv6=self.setup.ipv6,
                sampled=[host.name for host in self.servers] if self._sampled else [],
            ),
            work,
            lambda text: self._progress(f"{scenario.label} {scenario.workload}: {text}"),
        )

    def _progress(self, text: str) -> None:
        self._playing.set()
        self.progress(text)

    async def until_playing(self, run: asyncio.Task[Run]) -> None:
        """Until flows of this run have been seen, or it ended."""
        seen = asyncio.create_task(self._playing.wait(), name="until playing")
        try:
            await asyncio.wait({seen, run}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            seen.cancel()

    async def qdiscs(self) -> dict[str, str]:
        """What tc says of each server's device, by host name: the judge of what was restored."""
        return {
            host.name: (
                await asyncio.to_thread(host.namespace.tc, "qdisc", "show", "dev", host.device)
            ).stdout
            for host in self.servers
            if host.namespace is not None
        }

    @property
    def _sampled(self) -> bool:
        return self.shaped and not self.setup.downlink

    async def _apply(self, policy: DomainPolicy | None) -> None:
        if self.suite is not None:
            if policy is not None:
                await self.suite.set_policy(policy)
            return
        if policy is None:
            raise ValueError("without agents a scenario needs a policy")
        if self.shaped and not self.setup.downlink:
            for host in self.servers:
                assert host.namespace is not None
                await asyncio.to_thread(shaping.shape, host.namespace, host.device, policy)

    def _gate(self, index: int, policy: DomainPolicy | None) -> dict[str, Any]:
        if self.suite is not None:
            return self.suite.gate(0 if self.setup.shared_gate else index)
        assert policy is not None
        marks = shaping.priorities(policy) if self.shaped else []
        return {"kind": "local", "policy": domain_to_plain(policy), "priorities": marks}

    def _judge(self, scenario: Scenario, played: Played, name: str, work: Path) -> Run:
        records, policy = played.records, scenario.policy
        flows = self.directory / "flows"
        flows.mkdir(parents=True, exist_ok=True)
        write_records(flows / f"{name}.csv", records)
        run = Run(
            label=scenario.label,
            workload=scenario.workload,
            load=scenario.load,
            seed=scenario.seed,
            gate=self.setup.gate,
            rate_bps=self.setup.rate_bps,
            flows=len(scenario.trace),
            finished=len(records),
            stalled=len(played.stalled),
            kernel=completion_metrics(record.fct_s for record in records),
            wait=completion_metrics(record.wait_s for record in records),
            degraded=dict(Counter(r.degraded for r in records if r.degraded)),
            offered_load=offered_load(scenario.trace, self.setup.rate_bps),
            floor_s=_number(floor_s(records)),
            restarted=sum(summary["restarted"] for summary in played.summaries),
            arrival_lag_s=_mean_lag(records),
            client_cpu_s=sum(summary["cpu_s"] for summary in played.summaries),
            records=f"flows/{name}.csv",
        )
        self._busy(run, played)
        if policy is not None:
            run.thresholds = [_number(cls.threshold_bytes) for cls in policy.classes]
            if all(cls.mpl == 1 for cls in policy.classes):
                run.handover = completion_metrics(handover_s(records))
            run.weights = [cls.weight for cls in policy.classes]
            if scenario.simulate and self.shaped:
                self.progress(f"{scenario.label} {scenario.workload}: simulator, same trace")
                completions = replay(as_trace(records), policy, goodput_bps(self.setup.rate_bps))
                run.simulator = completion_metrics(completions)
                write_completions(flows / f"{name}.sim.csv", completions)
        shutil.rmtree(work)
        return run

    def _busy(self, run: Run, played: Played) -> None:
        """Of the first server: each has a bottleneck of its own."""
        samples = played.samples.get(self.servers[0].name)
        if samples:
            first = [record for record in played.records if record.server == 0]
            busy = busy_while_waiting(samples, played.start_s, first, self.setup.rate_bps)
            run.busy_share = _number(busy["busy_share"])
            run.busy_observed_s = busy["observed_s"]


def processor_times() -> tuple[int, int]:
    """(ticks in all, ticks that the hypervisor gave to others) since boot, proc(5)."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = [int(word) for word in words]
    return sum(ticks[:8]), ticks[7]


def steal_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Share of the time in between in which a processor was wanted and not to be had."""
    total = after[0] - before[0]
    return (after[1] - before[1]) / total if total > 0 else 0.0


def _limit_port(switch: netns.Namespace, port: str, rate_bps: float) -> None:
    """A switch port of the link's rate: one queue, no classes."""
    rate = round(rate_bps)
    burst = f"burst {shaping.BURST_BYTES} cburst {shaping.BURST_BYTES}"
    switch.tc(*f"qdisc add dev {port} root handle 1: htb default 1".split())
    switch.tc(
        *f"class add dev {port} parent 1: classid 1:1 htb rate {rate}bit ceil {rate}bit".split(),
        *f"{burst} quantum {shaping.SMALLEST_QUANTUM_BYTES}".split(),
    )


def _mean_lag(records: Sequence[FlowRecord]) -> float:
    """How late arrivals were played on average, seconds."""
    if not records:
        return 0.0
    return math.fsum(record.arrival_s - record.due_s for record in records) / len(records)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _file_name(scenario: Scenario) -> str:
    text = f"{scenario.workload}-{scenario.load:.2f}-{scenario.label}-{scenario.seed}"
    return re.sub(r"[^a-zA-Z0-9.-]+", "_", text)
