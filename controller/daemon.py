"""intentd-controller: who is there, what they measure, what they shall do.

A thin shell: the link's callbacks feed the registry and the applications (flows, jobs, prompts),
timers let them compute, what they issue is published. HTTP: /api/... (read only) beside the kit's
endpoints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final

from aiohttp import web

from intentd.controller import flows_app, jobs_app, prompts_app
from intentd.controller.alarms import find_alarms
from intentd.controller.api import Api
from intentd.controller.application import ApplicationTimers
from intentd.controller.audit import AuditLog, Entry
from intentd.controller.commands import APPLICATIONS, CHANGES, SIGNED, answer
from intentd.controller.config import ControllerConfig
from intentd.controller.flows_app import APPLICATION, FlowsApplication
from intentd.controller.jobs_app import JobsApplication
from intentd.controller.member_changes import MemberChanges
from intentd.controller.metrics import ControllerMetrics
from intentd.controller.policies import MIGRATIONS, PolicyBook, StoredPolicy
from intentd.controller.prompts_app import PromptsApplication
from intentd.controller.registry import Registry, member_plain
from intentd.controller.stores import claim, leadership_of
from intentd.core.errors import InputError, IntentdError, NotLeadingError
from intentd.core.flows.reports import domain_reports
from intentd.core.messages import PolicyAck, Report
from intentd.core.prompts import steering
from intentd.daemons.kit.admin import peer_uid
from intentd.daemons.kit.changes import Change, account_of
from intentd.daemons.kit.hub import HubLink, Member
from intentd.daemons.kit.lifecycle import Daemon, Kit, Tasks, leaves, run_daemon
from intentd.daemons.kit.store import Storage, Store, StoreError

if TYPE_CHECKING:
    from intentd.controller.console.sessions import Sessions
    from intentd.controller.leader import Leadership

_log = logging.getLogger(__name__)

STORE: Final = "controller.sqlite3"
WITNESS: Final = "controller.newest"
PROBE_INTERVAL_S: Final = 10.0
PAUSE_S: Final = 1.0


class Controller(Daemon[ControllerConfig]):
    """States are the lifecycle's; everything that must survive is in the store."""

    role: ClassVar[str] = "controller"
    config_model = ControllerConfig
    fixed: ClassVar[tuple[str, ...]] = ("hub.bind", "hub.key_file", "store")

    def __init__(self, config: ControllerConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self.registry = Registry()
        self.metrics = ControllerMetrics(kit.metrics)
        self.hub = self._make_hub()
        self._store: Storage | None = None
        self._claim: int | None = None
        self._made_s = kit.clock.now()
        self._leadership: Leadership | None = None
        self._turns: asyncio.Task[None] | None = None
        self._flows: FlowsApplication | None = None
        self._jobs: JobsApplication | None = None
        self._prompts: PromptsApplication | None = None
        self._book: PolicyBook | None = None
        self._audit: AuditLog | None = None
        self._member_changes: MemberChanges | None = None
        self.sessions: Sessions | None = None  # of the console, which is an extra
        self._timers: ApplicationTimers[Any, Any, Any, Any] | None = None
        self._jobs_timers: ApplicationTimers[Any, Any, Any, Any] | None = None
        self._prompts_timers: ApplicationTimers[Any, Any, Any, Any] | None = None

    # -- lifecycle ---------------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        config, kit = self.config, self.kit
        if config.store.url:
            self._leadership = leadership_of(config, kit)
            self._turns = tasks.create_task(self._lead_by_turns(), name="leadership")
        else:
            self._claim = claim(config.state_dir / STORE)
            await self._begin_term(tasks, Store(config.state_dir / STORE, MIGRATIONS))
        tasks.create_task(self._watch(), name="watch")

    async def _lead_by_turns(self) -> None:
        """Lead whenever the database lets this controller, for ever."""
        leadership = self._leadership
        assert leadership is not None
        while True:
            store = await leadership.acquire()
            try:
                async with Tasks() as term:
                    try:
                        await self._begin_term(term, store)
                        reason = await leadership.lost()
                        _log.warning("leads no more", extra={"reason": reason})
                    finally:
                        await self._end_term()
                        term.cancel_all()
            except* StoreError as group:
                for error in leaves(group):
                    _log.error("the term ends: %s", error)
            await leadership.resign()
            await self.kit.clock.sleep(PAUSE_S)  # the others first

    async def _begin_term(self, tasks: asyncio.TaskGroup, store: Storage) -> None:
        """Go on from what is stored, and let members come. Raises IntentdError."""
        config, kit = self.config, self.kit
        self._store = store
        self.registry = Registry()
        self.hub = self._make_hub()
        self.metrics.leading.set(True)
        self._audit = AuditLog(store, kit.clock.wall)
        self._member_changes = MemberChanges(self._audit)
        if self.sessions is not None:
            await self.sessions.load(store)
        self._book = PolicyBook(
            self._store,
            witness=config.run_dir / WITNESS,
            wall=kit.clock.wall,
            differences={
                flows_app.APPLICATION: flows_app.differences,
                jobs_app.APPLICATION: jobs_app.differences,
                prompts_app.APPLICATION: steering.differences,
            },
            shared=self._leadership is not None,
        )
        self._flows = FlowsApplication(
            config.flows,
            kit.clock,
            self._store,
            self._book,
            on_issue=self._issued,
            seed=kit.rng.getrandbits(64),
        )
        self._timers = ApplicationTimers(
            self._flows,
            kit.clock,
            thresholds_interval_s=config.flows.thresholds_interval_s,
            rates_interval_s=config.flows.rates_interval_s,
        )
        self._jobs = JobsApplication(
            config.jobs, kit.clock, self._store, self._book, on_issue=self._issued
        )
        self._jobs_timers = ApplicationTimers(
            self._jobs,
            kit.clock,
            thresholds_interval_s=config.jobs.history_interval_s,
            rates_interval_s=config.jobs.history_interval_s,
        )
        self._prompts = PromptsApplication(
            config.prompts, kit.clock, self._store, self._book, on_issue=self._issued
        )
        self._prompts_timers = ApplicationTimers(
            self._prompts,
            kit.clock,
            thresholds_interval_s=config.prompts.interval_s,
            rates_interval_s=config.prompts.interval_s,
        )
        for newest in (self._flows.newest, self._jobs.newest, self._prompts.newest):
            if newest is not None:
                self.hub.publish(newest.message())
        await self.hub.start(tasks)
        tasks.create_task(self._timers.run(), name="flows-timers")
        tasks.create_task(self._jobs_timers.run(), name="jobs-timers")
        tasks.create_task(self._jobs.run(), name="jobs-search")
        tasks.create_task(self._prompts_timers.run(), name="prompts-timers")
        tasks.create_task(self._member_changes.run(), name="member-changes")

    async def _end_term(self) -> None:
        """Stop speaking first; what is in memory is the next leader's to read from the store."""
        await self.hub.stop()
        self.metrics.leading.set(False)
        self._flows = self._jobs = self._prompts = None
        self._book = self._audit = self._member_changes = None
        self._timers = self._jobs_timers = self._prompts_timers = None
        store, self._store = self._store, None
        if store is not None:
            await asyncio.to_thread(store.close)

    def _make_hub(self) -> HubLink:
        return HubLink(
            self.config.hub,
            self.kit,
            name=self.config.name,
            on_hello=self._hello,
            on_report=self._report,
            on_ack=self._ack,
            on_goodbye=self._goodbye,
            leads=lambda: self._leadership is None or self._leadership.holds(),
        )

    async def reload(self, config: ControllerConfig) -> None:
        """Hub's bounds and allow list, and all of the three applications."""
        if self._flows is None:  # standing by: the next term begins with it
            self.hub.prepare(config.hub)()
            return
        async with self.timers.lock, self.jobs_timers.lock, self.prompts_timers.lock:
            swaps = (
                self.hub.prepare(config.hub),
                self.flows.prepare(config.flows),
                self.jobs.prepare(config.jobs),
                self.prompts.prepare(config.prompts),
            )
            for swap in swaps:
                swap()
        self.timers.set_intervals(
            thresholds_interval_s=config.flows.thresholds_interval_s,
            rates_interval_s=config.flows.rates_interval_s,
        )
        self.jobs_timers.set_intervals(
            thresholds_interval_s=config.jobs.history_interval_s,
            rates_interval_s=config.jobs.history_interval_s,
        )
        self.prompts_timers.set_intervals(
            thresholds_interval_s=config.prompts.interval_s,
            rates_interval_s=config.prompts.interval_s,
        )
        for timers in (self.timers, self.jobs_timers, self.prompts_timers):
            timers.wake()

    async def stop(self) -> None:
        if self._turns is not None:
            self._turns.cancel()
            await asyncio.wait([self._turns])
        await self._end_term()
        if self._leadership is not None:
            await asyncio.to_thread(self._leadership.close)
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def unready(self) -> list[str]:
        if self._leadership is not None and self._flows is None:
            # Standing by is what a standby is for.
            away = self._leadership.away
            return [f"store: {self._leadership.reason}"] if away else []
        return self._store.unready() if self._store is not None else ["store not open"]

    def _standby(self) -> NotLeadingError:
        summary = self.leadership()
        leader = summary["leader"]
        name = f"{leader['name']} on {leader['host']}" if leader else "none, as far as known"
        return NotLeadingError(
            f"controller {self.config.name} is {summary['state']}: ask the leader ({name})"
        )

    def leadership(self) -> dict[str, Any]:
        """Who leads, since when, and who stands by."""
        if self._leadership is not None:
            return self._leadership.summary()
        return {
            "state": "leading" if self._store is not None else "away",
            "since_s": round(self.kit.clock.now() - self._made_s, 3),
            "reason": "",
            "store": "sqlite",
            "leader": {"name": self.config.name, "host": self.config.host},
            "others": [],
        }

    @property
    def flows(self) -> FlowsApplication:
        if self._flows is None:
            raise self._standby()
        return self._flows

    @property
    def jobs(self) -> JobsApplication:
        if self._jobs is None:
            raise self._standby()
        return self._jobs

    @property
    def jobs_timers(self) -> ApplicationTimers[Any, Any, Any, Any]:
        if self._jobs_timers is None:
            raise self._standby()
        return self._jobs_timers

    @property
    def prompts(self) -> PromptsApplication:
        if self._prompts is None:
            raise self._standby()
        return self._prompts

    @property
    def prompts_timers(self) -> ApplicationTimers[Any, Any, Any, Any]:
        if self._prompts_timers is None:
            raise self._standby()
        return self._prompts_timers

    @property
    def book(self) -> PolicyBook:
        if self._book is None:
            raise self._standby()
        return self._book

    @property
    def audit(self) -> AuditLog:
        if self._audit is None:
            raise self._standby()
        return self._audit

    @property
    def timers(self) -> ApplicationTimers[Any, Any, Any, Any]:
        if self._timers is None:
            raise self._standby()
        return self._timers

    async def _watch(self) -> None:
        """Keep the gauges, and let a store whose disk was full recover."""
        while True:
            if self._flows is not None:
                self._measure()
            if self._store is not None and self._store.unready():
                await self._store.run(lambda store: store.probe())
            await self.keep_sessions()
            await self.kit.clock.sleep(PROBE_INTERVAL_S)

    async def keep_sessions(self) -> None:
        """Where that is not possible now (a full disk, a standby) they live in memory alone."""
        if self.sessions is not None and self._store is not None:
            try:
                await self.sessions.keep(self._store)
            except StoreError as error:
                _log.warning("sessions are not kept", extra={"error": str(error)})

    def _measure(self) -> None:
        members = self.hub.members()
        connected = sum(member.connected for member in members)
        self.metrics.members.labels("connected").set(connected)
        self.metrics.members.labels("away").set(len(members) - connected)
        for application in APPLICATIONS:
            self.metrics.held.labels(application).set(self.book.hold(application) is not None)
        self.metrics.measure_jobs(self.jobs.describe())
        for name, domain in self.flows.domains.items():
            self.metrics.changes.labels(name).set(domain.learner.changes)
            self.metrics.classes.labels(name).set(
                len(domain.policy.classes) if domain.policy else 0
            )
            self.metrics.load.labels(name).set(domain.measured_load or 0.0)

    # -- the link ------------------------------------------------------------------------------

    def _hello(self, member: Member) -> None:
        if self.registry.hello(member):
            if member.role == "agent":
                self.flows.member_restarted(member.key)
            elif member.role == "proxy":
                self.prompts.member_restarted(member.key)
        self._compare_numbers(member)
        try:
            if member.role == "agent":
                if self.flows.note_domains(member.key, member.capabilities):
                    self.timers.wake()
            elif member.role == "gpu" and self.jobs.note_cluster(member.key, member.capabilities):
                self.jobs_timers.wake()
        except InputError as error:
            self._bad(member, error)

    def _report(self, member: Member, report: Report) -> None:
        self.registry.report(member, report.sequence)
        self._compare_numbers(member)
        if "changes" in report.body and self._member_changes is not None:
            who = f"{member.role}/{member.name}"
            try:
                self._member_changes.take(who, member.boot, report.body["changes"])
            except InputError as error:
                self._bad(member, error)
        if "jobs" in report.body and member.role == "gpu":
            try:
                self.jobs.take_report(member.key, report.body["jobs"])
            except InputError as error:
                self._bad(member, error)
        if "prompts" in report.body and member.role == "proxy":
            try:
                self.prompts.take_report(member.key, report.body["prompts"])
            except InputError as error:
                self._bad(member, error)
        if "flows" not in report.body or member.role != "agent":
            return
        try:
            fresh = self.flows.take_report(member.key, domain_reports(report.body["flows"]))
        except InputError as error:
            self._bad(member, error)
            return
        if fresh:
            self.timers.wake()

    def _ack(self, member: Member, ack: PolicyAck) -> None:
        self.registry.ack(member, ack, wall_s=self.kit.clock.wall())
        if not ack.applied:
            self.metrics.refused.labels(ack.application).inc()

    def _goodbye(self, member: Member, reason: str) -> None:
        self.registry.gone(member, reason)
        self.flows.member_gone(member.key)

    def _compare_numbers(self, member: Member) -> None:
        for application in (self.flows, self.jobs, self.prompts):
            numbers = member.policies.get(application.name)
            if numbers is not None:
                try:
                    application.seen(numbers[0], numbers[1], f"{member.role}@{member.name}")
                except StoreError as error:  # the member's next report asks again
                    _log.error("no new era", extra={"error": str(error)})

    def _bad(self, member: Member, error: InputError) -> None:
        self.metrics.bad_reports.inc()
        if not self.registry.record(member.key).bad_reports:
            _log.error(
                "bad report",
                extra={"member": f"{member.role}@{member.name}", "error": str(error)},
            )
        self.registry.bad_report(member, str(error))

    def _issued(self, stored: StoredPolicy) -> None:
        author = "automatic" if stored.author == "automatic" else "operator"
        self.metrics.issued.labels(stored.application, author).inc()
        self.hub.publish(stored.message())

    # -- for people ------------------------------------------------------------------------------

    def add_routes(self, app: web.Application) -> None:
        Api(self).add_routes(app)
        try:
            from intentd.controller.console.site import Console
        except ModuleNotFoundError as error:  # a controller without the console's extra
            _log.warning("no console", extra={"missing": error.name})
            return
        Console(self).add_routes(app)

    def status(self) -> dict[str, Any]:
        if self._flows is None:
            return {"leadership": self.leadership(), "members": [], "domains": []}
        hold = self.book.hold(APPLICATION)
        return {
            "leadership": self.leadership(),
            "era": self.book.era,
            "eras": self.book.eras()[:3],
            "held": None if hold is None else {"number": hold.number, "author": hold.author},
            "members": self.members(),
            "domains": [self.flows.describe(name) for name in sorted(self.flows.domains)],
            "jobs": self.jobs.describe(),
            "prompts": self.prompts.describe(),
        }

    def members(self) -> list[dict[str, Any]]:
        if self._flows is None:
            raise self._standby()
        now, newest = self.kit.clock.now(), self.hub.policies()
        return [
            member_plain(member, self.registry.record(member.key), now, newest)
            for member in self.hub.members()
        ]

    def policies_page(
        self, limit: int, application: str = APPLICATION, before: int | None = None
    ) -> dict[str, Any]:
        """Newest first, without bodies; before: only smaller numbers."""
        hold = self.book.hold(application)
        return {
            "era": self.book.era,
            "held": None
            if hold is None
            else {"number": hold.number, "since_wall_s": hold.since_wall_s, "author": hold.author},
            "policies": [
                policy.to_plain(whole=False)
                for policy in self.book.history(application, limit, before)
            ],
        }

    def policy(self, number: int | None, application: str = APPLICATION) -> dict[str, Any]:
        """One policy whole, with who runs it; None: the newest. Raises InputError."""
        newest = self.applied(application)[0].newest
        found = newest if number is None else self.book.get(application, number)
        if found is None:
            raise InputError("number", number, "a policy: none was issued yet")
        plain = found.to_plain(whole=True)
        pair = [found.era, found.number]
        plain["run_by"] = [
            f"{m.role}/{m.name}" for m in self.hub.members() if m.policies.get(application) == pair
        ]
        plain["refused_by"] = [
            {"member": f"{m.role}/{m.name}", "reason": ack.reason}
            for m in self.hub.members()
            for name, ack in m.acks.items()
            if name == application and not ack.applied and [ack.era, ack.number] == pair
        ]
        return plain

    def domains_page(self) -> dict[str, Any]:
        return {"domains": [self.flows.describe(name) for name in sorted(self.flows.domains)]}

    def flows_page(self, domain: str | None) -> dict[str, Any]:
        if domain is not None:
            self.flows.describe(domain)
        names = sorted(self.flows.domains) if domain is None else [domain]
        return {"domains": [self.flows.flows(name) for name in names]}

    def jobs_page(self) -> dict[str, Any]:
        return self.jobs.describe()

    def prompts_page(self) -> dict[str, Any]:
        return self.prompts.describe()

    def audit_page(self, limit: int, before: int) -> dict[str, Any]:
        return {"entries": self.audit.page(limit, before)}

    def front_page(self) -> dict[str, Any]:
        return self.jobs.show_front()

    def alarms(self) -> list[dict[str, str]]:
        held = {name: self.book.hold(name) for name in APPLICATIONS}
        found = find_alarms(
            unready=self.unready(),
            members=self.members(),
            held={name: hold.number for name, hold in held.items() if hold is not None},
            domains=self.domains_page()["domains"],
            jobs=self.jobs.describe(),
            prompts=self.prompts.describe(),
        )
        return [alarm.to_plain() for alarm in found]

    async def note(self, change: Change) -> None:
        await self.record(
            Entry(change.who, change.via, change.action, change.about, result=change.result)
        )

    async def record(self, entry: Entry) -> None:
        """Into the audit log; where that cannot be written (the table is the leader's, a full disk)
        into the log alone: what it tells of has happened."""
        try:
            await self.audit.add(entry)
        except (NotLeadingError, StoreError) as error:
            told = {"who": entry.who, "action": entry.action, "about": entry.about}
            _log.warning(
                "not on the audit log", extra={**told, "result": entry.result, "error": str(error)}
            )

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        if command in CHANGES and not args.get("preview"):
            return await self.change(command, args, who=account_of(peer_uid.get()), via="admin")
        return await self.command(command, args)

    async def change(
        self, command: str, args: dict[str, Any], *, who: str, via: str
    ) -> dict[str, Any]:
        """One of CHANGES, on the audit log whatever becomes of it. Raises IntentdError."""
        name = args.get("application", jobs_app.APPLICATION if "pareto" in command else APPLICATION)
        signed = {"author": who, **args} if command in SIGNED else args
        before = self._number_of(name)
        about = f"{name}: {args.get(CHANGES[command], '')}" if CHANGES[command] else str(name)
        try:
            done = await self.command(command, signed)
        except IntentdError as error:
            await self.record(Entry(who, via, command, about, before, result=f"refused: {error}"))
            raise
        await self.record(Entry(who, via, command, about, before, self._number_of(name)))
        return done

    def _number_of(self, application: object) -> str:
        """ERA.NUMBER in force; "" where there is none."""
        if application not in APPLICATIONS:
            return ""
        newest = self.applied(str(application))[0].newest
        return "" if newest is None else f"{newest.era}.{newest.number}"

    async def command(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """One command, without the audit log. Raises IntentdError."""
        return await answer(self, command, args)

    def applied(
        self, application: str
    ) -> tuple[
        FlowsApplication | JobsApplication | PromptsApplication,
        ApplicationTimers[Any, Any, Any, Any],
    ]:
        """An application by its name, and its timers."""
        if application == prompts_app.APPLICATION:
            return self.prompts, self.prompts_timers
        if application == jobs_app.APPLICATION:
            return self.jobs, self.jobs_timers
        return self.flows, self.timers


def main() -> int:
    return run_daemon(Controller)


if __name__ == "__main__":
    sys.exit(main())
