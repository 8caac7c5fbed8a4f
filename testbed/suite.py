"""The suite itself in the testbed: controller, sequencer and agents as real processes.

Each runs from a TOML file of its own with keys of its own, in the namespace of its host. Sockets
and state live in a private directory under /tmp (a Unix socket's path is short), logs beside the
results.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from intentd.core.flows.policy import DomainPolicy, domain_to_plain
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.keys import (
    new_curve_keys,
    new_fin_key,
    write_curve_keys,
    write_fin_key,
)
from intentd.testbed.playing import Host, PlayError, favour, python_env
from intentd.testbed.toml import to_toml

MODULES: Final = {
    "controller": "intentd.controller.daemon",
    "sequencer": "intentd.daemons.sequencer.daemon",
    "agent": "intentd.agent.daemon",
}
READY_TIMEOUT_S: Final = 30.0
POLICY_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 15.0
FIN_PORT: Final = 7430
_LOOK_S: Final = 0.05


@dataclass(slots=True)
class Member:
    """One daemon. name: the host's; process None while it does not run."""

    role: str
    name: str
    host: Host
    config: Path
    run_dir: Path
    state_dir: Path
    log: Path
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.run_dir / f"{self.role}.admin.sock", timeout_s=10.0)


@dataclass(slots=True)
class _Addresses:
    controller: str
    sequencer: str
    broadcast: str


@dataclass(slots=True)
class Suite:
    """Starts in order, ready when it is entered; everything stops, by pid, when it is left.

    shaped: the servers' agents shape their devices (with downlink: the first client's agent shapes
    its own). learning: the controller computes policies; else it only issues those it is given.
    """

    servers: Sequence[Host]
    clients: Sequence[Host]
    sequencer: Host
    controller: Host
    domain: str
    rate_bps: float
    directory: Path
    shaped: bool = True
    learning: bool = False
    downlink: bool = False
    members: list[Member] = field(default_factory=list)
    _root: Path = Path()
    _addresses: _Addresses | None = None

    async def __aenter__(self) -> Suite:
        self._root = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="itb-"))
        try:
            await asyncio.to_thread(self._configure)
            await self._start_all()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        """Agents first, so that they say goodbye; the directory last."""
        await self.stop_all()
        await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)

    # -- configuration ----------------------------------------------------------------------------

    def _configure(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self._root / "keys").mkdir()
        write_fin_key(self._root / "keys" / "fin", new_fin_key())
        alone = self.controller.namespace is None
        self._addresses = _Addresses(
            controller=f"tcp://{self.controller.ipv4}:{_free_port() if alone else 7400}",
            sequencer=f"tcp://{self.sequencer.ipv4}:{_free_port() if alone else 7410}",
            broadcast="" if alone else f"{self.controller.ipv4.rpartition('.')[0]}.255:{FIN_PORT}",
        )
        self._add("controller", self.controller, self._controller_config())
        self._add("sequencer", self.sequencer, self._sequencer_config())
        agents = [*self.clients, *(self.servers if self._servers_shape else [])]
        for host in agents:
            self._add("agent", host, self._agent_config(host))
        self._allow()

    @property
    def _servers_shape(self) -> bool:
        return self.shaped and not self.downlink

    def _add(self, role: str, host: Host, config: dict[str, Any]) -> None:
        """A member with directories, a key pair and its file."""
        home = self._root / f"{role}-{host.name}"
        member = Member(
            role,
            host.name,
            host,
            config=home / f"{role}.toml",
            run_dir=home / "run",
            state_dir=home / "state",
            log=self.directory / f"{role}-{host.name}.log",
        )
        home.mkdir()
        member.state_dir.mkdir(mode=0o700)
        if not self._key(f"{role}-{host.name}").exists():
            write_curve_keys(self._key(f"{role}-{host.name}"), new_curve_keys())
        common = {
            "name": host.name,
            "host": host.name,
            "state_dir": member.state_dir,
            "run_dir": member.run_dir,
            "drain_timeout_s": 2.0,
            "status": {"bind": "127.0.0.1:0"},
        }
        member.config.write_text(to_toml(common | config))
        self.members.append(member)

    def _key(self, name: str) -> Path:
        return self._root / "keys" / name

    def _public(self, role: str, host: Host) -> Path:
        path = self._key(f"{role}-{host.name}")
        return path.with_name(path.name + ".pub")

    def _controller_config(self) -> dict[str, Any]:
        assert self._addresses is not None
        return {
            "hub": {
                "bind": self._addresses.controller,
                "key_file": self._key(f"controller-{self.controller.name}"),
                "allow_file": self._key("members"),
                "report_interval_s": 0.5,
            },
            "flows": {
                "policy": "2d" if self.learning else "ps",
                "thresholds_interval_s": 1.0,
                "rates_interval_s": 1.0,
                "default_rate": self.rate_bps,
            },
        }

    def _sequencer_config(self) -> dict[str, Any]:
        assert self._addresses is not None
        fin = f"0.0.0.0:{FIN_PORT}" if self._addresses.broadcast else "127.0.0.1:0"
        return {
            "turns": {
                "bind": self._addresses.sequencer,
                "key_file": self._key(f"sequencer-{self.sequencer.name}"),
                "allow_file": self._key("members"),
            },
            "fin": {"bind": fin, "key_file": self._key("fin")},
            "controller": self._controller_link("sequencer", self.sequencer),
        }

    def _agent_config(self, host: Host) -> dict[str, Any]:
        assert self._addresses is not None
        shapes = host in self.servers if self._servers_shape else self.shaped and self.downlink
        domain: dict[str, Any] = {
            "name": self.domain,
            "default": True,
            "rate_bps": self.rate_bps,
        }
        if shapes:
            domain |= {"device": host.device, "direction": "ingress" if self.downlink else "egress"}
        config: dict[str, Any] = {
            "controller": self._controller_link("agent", host),
            "domains": [domain],
        }
        if host in self.clients and self._addresses.broadcast:
            config["fin"] = {"bind": f"0.0.0.0:{FIN_PORT}", "key_file": self._key("fin")}
            domain["sequencer"] = {
                "endpoint": self._addresses.sequencer,
                "key_file": self._key(f"agent-{host.name}"),
                "server_key_file": self._public("sequencer", self.sequencer),
                "fin_addresses": [self._addresses.broadcast],
            }
        return config

    def _controller_link(self, role: str, host: Host) -> dict[str, Any]:
        assert self._addresses is not None
        return {
            "endpoint": self._addresses.controller,
            "key_file": self._key(f"{role}-{host.name}"),
            "server_key_file": self._public("controller", self.controller),
            "backoff_max_s": 0.5,
        }

    def _allow(self) -> None:
        """Every member's public key, for controller and sequencer."""
        lines = [
            self._public(member.role, member.host).read_text().strip()
            for member in self.members
            if member.role != "controller"
        ]
        self._key("members").write_text("\n".join(lines) + "\n")

    # -- processes --------------------------------------------------------------------------------

    async def _start_all(self) -> None:
        """All at once; members find the controller when it is there."""
        for member in self.members:
            await self._spawn(member)
        for member in self.members:
            await self.ready(member)

    async def start(self, member: Member) -> None:
        """Start and wait until it says that it is ready. Raises PlayError."""
        await self._spawn(member)
        await self.ready(member)

    async def _spawn(self, member: Member) -> None:
        command = [sys.executable, "-m", MODULES[member.role], "--config", str(member.config)]
        with member.log.open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                *member.host.command(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=python_env(),
            )
        if member.role != "controller":  # it computes for long, and no flow waits for it
            favour(member.process.pid)

    async def ready(self, member: Member, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Raises PlayError if it is not ready in time or has ended."""
        reasons: object = "no answer"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if member.process is None or member.process.returncode is not None:
                break
            try:
                status = await member.admin.acall("status")
            except AdminUnreachableError as error:
                reasons = str(error)
            else:
                if status.get("ready"):
                    return
                reasons = status.get("reasons")
            await asyncio.sleep(_LOOK_S)
        last = member.log.read_bytes()[-1500:].decode(errors="replace")
        raise PlayError(f"{member.role} {member.name} is not ready: {reasons}\n{last}")

    async def stop(self, member: Member) -> int | None:
        """In order, by SIGTERM; by SIGKILL if it does not listen. Its exit status."""
        process = member.process
        if process is None or process.returncode is not None:
            return process.returncode if process is not None else None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    return await process.wait()
        return None

    async def stop_all(self) -> None:
        for member in reversed(self.members):
            await self.stop(member)

    async def kill(self, member: Member) -> None:
        """kill -9, and wait until it is gone."""
        assert member.process is not None
        with contextlib.suppress(ProcessLookupError):
            member.process.kill()
        await member.process.wait()

    async def restart(self, member: Member) -> None:
        """Start again what was killed, as systemd would."""
        member.restarts += 1
        await self.start(member)

    # -- what experiments ask ---------------------------------------------------------------------

    def agents(self) -> list[Member]:
        return [member for member in self.members if member.role == "agent"]

    def member(self, role: str, host: Host | None = None) -> Member:
        return next(
            member
            for member in self.members
            if member.role == role and (host is None or member.host == host)
        )

    def gate(self, client: int) -> dict[str, Any]:
        """The gate table of a client process on that client host."""
        path = self.member("agent", self.clients[client]).run_dir / "agent.sock"
        return {"kind": "agent", "path": str(path), "domain": self.domain}

    async def set_policy(self, policy: DomainPolicy) -> None:
        """Have the controller issue it, pinned, and wait until every agent runs it.

        Raises PlayError if an agent does not take it in time, AdminRefusedError if the controller
        refuses it.
        """
        await self.member("controller").admin.acall(
            "policy_set", document=domain_to_plain(policy), author="testbed"
        )
        deadline = time.monotonic() + POLICY_TIMEOUT_S
        for member in self.agents():
            while not await self._runs(member, policy):
                if time.monotonic() > deadline:
                    raise PlayError(f"agent {member.name} does not run policy {policy.name}")
                await asyncio.sleep(_LOOK_S)

    async def _runs(self, member: Member, policy: DomainPolicy) -> bool:
        state = await self.domain_state(member)
        if state is None or state["policy"]["name"] != policy.name:
            return False
        wanted = domain_to_plain(policy)["classes"]
        compared = ("threshold_bytes", "weight", "mpl", "order", "sequencing")
        return [{key: row[key] for key in compared} for row in wanted] == [
            {key: row[key] for key in compared} for row in state["classes"]
        ]

    async def domain_state(self, member: Member) -> dict[str, Any] | None:
        """The domain as an agent describes it; None while the agent does not answer."""
        with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
            status = await member.admin.acall("status")
            state: dict[str, Any] | None = status["detail"]["domains"].get(self.domain)
            return state
        return None

    async def tc_state(self, member: Member) -> dict[str, Any]:
        """Whether the agent's device is shaped, and if not, why."""
        state = await self.domain_state(member)
        tc: dict[str, Any] = {} if state is None else state["tc"]
        return tc

    async def learned(self) -> dict[str, Any]:
        """What the controller knows of the domain; nothing while it does not answer."""
        with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
            answer = await self.member("controller").admin.acall("domains")
            for row in answer["domains"]:
                if row["domain"] == self.domain:
                    return dict(row)
        return {}

    async def all_joined(self, timeout_s: float) -> None:
        """Until every daemon is ready and the controller is connected to all of them.

        Raises PlayError.
        """
        deadline = time.monotonic() + timeout_s
        for member in self.members:
            await self.ready(member, max(0.1, deadline - time.monotonic()))
        wanted = {(m.role, m.name) for m in self.members if m.role != "controller"}
        there: set[tuple[str, str]] = set()
        while time.monotonic() < deadline:
            with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
                answer = await self.member("controller").admin.acall("members")
                there = {(m["role"], m["name"]) for m in answer["members"] if m["connected"]}
            if wanted <= there:
                return
            await asyncio.sleep(_LOOK_S)
        raise PlayError(f"the controller does not see {sorted(wanted - there)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
