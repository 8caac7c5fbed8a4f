"""intentd-agent: the host's daemon for network flows.

It owns the application socket, one gate and one shaper a domain, and the links to sequencer and
controller. The decisions are ``core.flows``'s, the wiring to applications ``agent/shell.py``'s;
this module starts and stops the parts, applies policies and configuration, and tells people.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from intentd.agent.app_socket import AppSocket
from intentd.agent.board import Board
from intentd.agent.config import AgentConfig, DomainSection
from intentd.agent.domain import Domain, Route, parse_network
from intentd.agent.explain import explain
from intentd.agent.handover import hand_over, listener, take_over
from intentd.agent.marking import mark
from intentd.agent.metrics import AgentCollector
from intentd.agent.shell import GateShell
from intentd.agent.tc.shaper import Shaper, Shaping, ShapingHost
from intentd.agent.turns import Sequenced, Turns
from intentd.core.errors import ConfigError, InputError, IntentdError
from intentd.core.flows.policy import DomainPolicy, flows_from_plain
from intentd.core.flows.turn.domain import DomainGate
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.lifecycle import Daemon, Kit, run_daemon
from intentd.daemons.kit.link import MemberLink

log = logging.getLogger(__name__)

_RECENT_SHOWN: Final = 20
_OTHER_DESCRIPTORS: Final = 256  # links, status, descriptors passed for marking


@dataclass(slots=True)
class Held:
    """A domain as this daemon holds it: configured by section, shaped unless shaper is None."""

    section: DomainSection
    domain: Domain
    gate: DomainGate
    shaper: Shaper | None

    def tc(self) -> dict[str, str]:
        if self.shaper is None:
            return {"state": Shaping.UNSHAPED.value, "reason": "no device is configured"}
        return self.shaper.state.to_plain()

    def refresh_marks(self) -> None:
        """Take over what the shaper says: which SO_PRIORITY each class has, whether it shares."""
        shaper, classes = self.shaper, range(len(self.domain.policy.classes))
        if shaper is None:
            self.domain.mark_with((), False)
            return
        shaped = shaper.state.state is Shaping.SHAPED
        self.domain.mark_with(tuple(shaper.priority_of(index) for index in classes), shaped)


class AgentDaemon(Daemon[AgentConfig]):
    """See the module's docstring."""

    role: ClassVar[str] = "agent"
    config_model = AgentConfig
    fixed: ClassVar[tuple[str, ...]] = ("socket", "fin", "recent_flows", "controller.enabled")

    def __init__(self, config: AgentConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self._board = _make_board() if config.socket.board else None
        self.shell = GateShell(
            now=kit.clock.now,
            mark=mark,
            woken=self._wake_at,
            changed=self._flush,
            boot=int(kit.boot, 16),
            max_flows=config.socket.max_flows_per_connection,
            honour_hints=config.socket.allow_class_hints,
            recent=config.recent_flows,
            board=self._board,
        )
        self._turns = Turns(
            name=config.name,
            boot=int(kit.boot, 16),
            now=kit.clock.now,
            released=self.shell.released,
        )
        self._held: dict[str, Held] = {}
        self._shaping: ShapingHost | None = None
        self._socket: AppSocket | None = None
        self._link: MemberLink | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._given_back = False  # drained: no device is shaped
        self._applying = asyncio.Lock()  # one change of policy, configuration or tc at a time

    # -- life -------------------------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        _allow_descriptors(self.config.socket.max_connections + _OTHER_DESCRIPTORS)
        self._held = {section.name: self._hold(section) for section in self.config.domains}
        self._publish(self.config)
        self._turns.set_domains(_sequenced(self._held), self.config.fin)
        for held in self._held.values():
            await self._shape(held, held.domain.policy)
        self.kit.metrics.registry.register(
            AgentCollector(
                self.shell, lambda: {name: h.tc()["state"] for name, h in self._held.items()}
            )
        )
        self._link = MemberLink(
            self.config,
            self.kit,
            on_policy=self._on_policy,
            collect_report=self._report,
            capabilities=self._capabilities,
        )
        await self._link.start(tasks)
        self._socket = self._open_socket(self.config)
        tasks.create_task(self._verify_for_ever(), name="tc-verify")

    async def drain(self, deadline_s: float) -> None:
        """Where the manager holds descriptors, the next agent gets connections and flows. Else no
        new flows; those that wait or send may end."""
        self.shell.stop()
        if self._socket is not None and self.kit.held.capacity:
            await hand_over(self.kit.held, self._socket, self.shell)
            return
        if self._socket is not None:
            self._socket.stop_accepting()
        empty = asyncio.Event()
        self.shell.emptied = empty.set
        if self.shell.flows:
            await empty.wait()

    async def set_aside(self) -> None:
        """New flows are told to go on at once, unordered and in no class."""
        self.shell.stop()

    def work_left(self) -> dict[str, int]:
        return {"flows": len(self.shell.flows)}

    async def set_down(self) -> None:
        """The devices are as they were found."""
        async with self._applying:
            self._given_back = True
            for held in self._held.values():
                if held.shaper is not None:
                    await held.shaper.restore()
                    held.refresh_marks()

    async def take_up(self) -> None:
        async with self._applying:
            self._given_back = False
            for held in self._held.values():
                await self._shape(held, held.domain.policy)
            self.shell.take_up()

    async def stop(self) -> None:
        """Close the socket (applications go on without us), give the devices back."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
        try:
            self._turns.stop()
            if self._link is not None:
                await self._link.stop()
        finally:
            if self._shaping is not None:
                shaping, self._shaping = self._shaping, None
                await shaping.close()
            if self._board is not None:
                self._board.close()

    async def reload(self, config: AgentConfig) -> None:
        """Domains, controller and limits; sockets need a restart."""
        async with self._applying:
            held = self._build(config)
            link = self._link
            assert link is not None, "before start"
            link.reconfigure(config.controller)
            try:
                self._turns.set_domains(_sequenced(held), config.fin)
            except BaseException:
                link.reconfigure(self.config.controller)
                raise
            before, self._held = self._held, held
            self._publish(config)
            for name, old in before.items():
                new = held.get(name)
                if old.shaper is not None and (new is None or new.shaper is not old.shaper):
                    await old.shaper.restore()
            for entry in held.values():
                await self._shape(entry, entry.domain.policy)
            link.report_soon()

    def _build(self, config: AgentConfig) -> dict[str, Held]:
        """The domains of a configuration, those that stay as they are and those it makes anew.

        Raises InputError for what could not be shaped; nothing that runs has changed.
        """
        held: dict[str, Held] = {}
        numbered = self._link.applied("flows") if self._link is not None else None
        wanted = flows_from_plain(numbered.body) if numbered is not None else None
        for index, section in enumerate(config.domains):
            before = self._held.get(section.name)
            if before is not None and _same_gate(before.section, section):
                held[section.name] = Held(section, before.domain, before.gate, before.shaper)
                continue
            made = held[section.name] = self._hold(section)
            policy = wanted.domain(section.name) if wanted is not None else None
            if policy is not None and numbered is not None:
                made.gate.set_policy(policy, now=self.kit.clock.now())
                made.domain.adopt(policy, (numbered.era, numbered.number))
            if made.shaper is not None:
                try:
                    made.shaper.check(made.domain.policy)
                except InputError as error:
                    where = f"domains[{index}].policy.{error.field}"
                    raise ConfigError(where, error.value, error.expected) from None
        return held

    def _hold(self, section: DomainSection) -> Held:
        policy = section.first_policy()
        gate = DomainGate(policy, name=self.config.name, boot=int(self.kit.boot, 16))
        domain = Domain(section.name, policy, gate)
        shaper = None
        if section.device:
            if self._shaping is None:
                self.config.state_dir.mkdir(parents=True, exist_ok=True)
                self._shaping = ShapingHost(self.config.state_dir / "tc.json")
            shaper = self._shaping.shaper(section.device, section.direction)
        return Held(section, domain, gate, shaper)

    def _publish(self, config: AgentConfig) -> None:
        """Give the shell the domains held and the routes to them."""
        routes = [
            Route(parse_network(peer), section.name)
            for section in config.domains
            for peer in section.peers
        ]
        domains = [held.domain for held in self._held.values()]
        self.shell.set_domains(domains, routes, config.default_domain)

    def _open_socket(self, config: AgentConfig) -> AppSocket:
        allowed = frozenset(config.socket.allow_uids)
        app_socket = AppSocket(
            config.socket_path,
            self.shell,
            limits=config.socket.limits(),
            mode=int(config.socket.mode, 8),
            allowed=lambda uid, gid: not allowed or uid == 0 or uid in allowed,
        )
        try:
            app_socket.open(listener(self.kit.held), accept=False)
        except OSError as error:
            raise IntentdError(f"socket {config.socket_path}: {error.strerror}") from None
        self.shell.connections = lambda: len(app_socket.connections)
        take_over(self.kit.held, app_socket, self.shell)
        app_socket.resume()
        return app_socket

    def _flush(self, domain: Domain) -> None:
        self._turns.flush(domain)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, at - self.kit.clock.now())
        self._timer = asyncio.get_running_loop().call_later(delay, self.shell.tick)

    # -- policies ---------------------------------------------------------------------------------

    async def _on_policy(self, numbered: NumberedPolicy) -> PolicyAck:
        """Validate, build, swap. Raises IntentdError to refuse; then the old policy stays."""
        if numbered.application != "flows":
            expected = "flows (an agent runs no other application)"
            raise InputError("policy.application", numbered.application, expected)
        policies = flows_from_plain(numbered.body)
        async with self._applying:
            wanted = [
                (held, policy)
                for name, held in self._held.items()
                if (policy := policies.domain(name)) is not None
            ]
            await self._shape_all(wanted)
            number = (numbered.era, numbered.number)
            for held, policy in wanted:
                self.shell.set_policy(held.domain, policy, number)
                held.refresh_marks()
            self.shell.publish_board()
        return PolicyAck("flows", numbered.era, numbered.number, True)

    async def _shape_all(self, wanted: list[tuple[Held, DomainPolicy]]) -> None:
        """Shape every domain, or none: who was changed goes back when one is refused."""
        changed: list[Held] = []
        try:
            for asked, policy in wanted:
                if asked.shaper is not None and self._given_back:
                    asked.shaper.check(policy)
                elif asked.shaper is not None:
                    await asked.shaper.apply(policy)
                    changed.append(asked)
        except InputError as error:
            for held in changed:
                await self._shape(held, held.domain.policy)
            where = f"domains.{asked.domain.name}.{error.field}"
            raise InputError(where, error.value, error.expected) from None

    async def _shape(self, held: Held, policy: DomainPolicy) -> None:
        if held.shaper is not None and not self._given_back:
            await held.shaper.apply(policy)
        held.refresh_marks()
        self.shell.publish_board()

    async def _verify_for_ever(self) -> None:
        """Read the kernel's classes back, repair what somebody changed, find devices that came."""
        while True:
            await self.kit.clock.sleep(self.config.tc_verify_interval_s)
            async with self._applying:
                for held in self._held.values():
                    if held.shaper is not None:
                        await held.shaper.verify()
                        held.refresh_marks()
                self.shell.publish_board()

    # -- telling ----------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        body = self.shell.report()
        for name, held in self._held.items():
            body[name]["tc"] = held.tc()
        return {"flows": body}

    def _capabilities(self) -> dict[str, Any]:
        states = [held.tc()["state"] for held in self._held.values()]
        domains = [
            {"name": name, "rate_bps": held.section.rate_bps}
            for name, held in sorted(self._held.items())
        ]
        return {"domains": domains, "shapes": Shaping.SHAPED.value in states}

    def unready(self) -> list[str]:
        reasons = []
        if self._socket is None:
            reasons.append("the application socket is not open")
        for name, held in self._held.items():
            tc = held.tc()
            if tc["state"] in (Shaping.FOREIGN.value, Shaping.FAILED.value):
                reasons.append(f"domain {name}: {tc['state']}: {tc['reason']}")
        if self._link is not None:
            reasons.extend(self._link.unready())
        return reasons

    def status(self) -> dict[str, Any]:
        counts = self.shell.counts
        return {
            "socket": str(self.config.socket_path),
            "applications": self.shell.connections(),
            "flows_open": len(self.shell.flows),
            "flows_opened": counts.opened,
            "app_errors": counts.errors,
            "marks": counts.marks,
            "mark_failures": counts.mark_failures,
            "default_domain": self.config.default_domain,
            "turns": self._turns.status(),
            "domains": {
                name: {
                    **held.domain.describe(),
                    "tc": held.tc(),
                    "turns": self._turns.member_status(held.domain),
                }
                for name, held in self._held.items()
            },
        }

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        match command:
            case "flows":
                return self._admin_flows(args)
            case "explain":
                return self.shell.explain(_flow_number(args.get("flow", args.get("id"))))
            case "domains":
                return {"domains": [self._describe(held) for held in self._held.values()]}
        return await super().admin(command, args)

    async def prove(self) -> list[Claim]:
        """The qdiscs of every domain with a device are those of its policy."""
        claims = []
        for name, held in sorted(self._held.items()):
            shaper = held.shaper
            if shaper is None or not held.section.device:
                continue
            if self._given_back:
                state = shaper.state
                claims.append(
                    Claim(
                        "qdisc", f"{held.section.device} is given back while the agent is drained",
                        state.state is Shaping.UNSHAPED, f"{state.state.value}: {state.reason}",
                        "intentctl tc restore",
                    )
                )  # fmt: skip
                continue
            statement = f"the qdisc of {held.section.device} is the policy of domain {name}"
            if shaper.state.state is not Shaping.SHAPED:
                claims.append(
                    Claim(
                        "qdisc", statement, False, f"{shaper.state.state.value}: "
                        f"{shaper.state.reason}", "see the reason; intentctl tc show",
                    )
                )  # fmt: skip
                continue
            try:
                wrong = await shaper.differences()
            except IntentdError as error:
                claims.append(Claim("qdisc", statement, None, str(error), "intentctl tc show"))
                continue
            found = "; ".join(wrong[:5]) or f"read back, policy {held.domain.policy.name}"
            cure = "the agent repairs it at its next look (tc interval); find out who changes it"
            claims.append(Claim("qdisc", statement, not wrong, found, cure if wrong else ""))
        return claims

    def _admin_flows(self, args: dict[str, Any]) -> dict[str, Any]:
        name = args.get("domain")
        if name is not None and name not in self._held:
            raise InputError("domain", name, f"one of {', '.join(sorted(self._held)) or 'none'}")
        now = self.kit.clock.now()
        open_flows = list(self.shell.flows.values())[:_RECENT_SHOWN]
        return {
            "domains": {
                known: {**held.domain.describe(), "tc": held.tc()}
                for known, held in self._held.items()
                if name in (None, known)
            },
            "open": [explain(record, now) for record in open_flows],
            "recent": [explain(record, now) for record in self.shell.recent(_RECENT_SHOWN)],
        }

    def _describe(self, held: Held) -> dict[str, Any]:
        section = held.section
        return {
            "name": section.name,
            "device": section.device or None,
            "direction": section.direction,
            "peers": list(section.peers),
            "default": section.name == self.config.default_domain,
            "sequencer": self._turns.member_status(held.domain),
            "policy": held.domain.describe()["policy"],
            "rate_bps": held.domain.policy.rate_bps,
            "tc": held.shaper.status() if held.shaper is not None else held.tc(),
        }


def _make_board() -> Board | None:
    try:
        return Board()
    except OSError as error:
        log.warning("no board of free classes", extra={"reason": str(error)})
        return None


def _allow_descriptors(wanted: int) -> None:
    """Raise the soft limit (often 1,024) as far as the hard one allows: one a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            log.warning("fewer descriptors than connections", extra={"limit": most})


def _sequenced(held: dict[str, Held]) -> list[Sequenced]:
    return [
        Sequenced(entry.domain, entry.gate, entry.section.sequencer)
        for entry in held.values()
        if entry.section.sequencer.endpoint
    ]


def _same_gate(before: DomainSection, after: DomainSection) -> bool:
    """Whether only what the shell looks up (peers, default) differs."""
    looked_up = {"peers", "default"}
    return before.model_dump(exclude=looked_up) == after.model_dump(exclude=looked_up)


def _flow_number(value: object) -> int:
    text = str(value).strip()
    if not text.isdecimal():
        raise InputError("flow", value, "the number of a flow")
    return int(text)


def main() -> int:
    return run_daemon(AgentDaemon)


if __name__ == "__main__":
    sys.exit(main())
