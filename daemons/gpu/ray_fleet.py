"""What the driver of a Ray cluster decides: which slot runs what, what is lost, what to tell.

Pure: events in (with ``now``, monotonic seconds), acts out. A run has a member on each of its
nodes, led by the slot of its first GPU there; it begins when all have begun and ends when all have
ended (gang start). A run is called lost only once it cannot be running any more: its slot's
successor has cleared the GPU, or nothing was heard for so long that the slot's own lease is over.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Key = tuple[str, int]  # node, index of the GPU
RETRY_S: Final = 5.0  # between attempts to make a slot
AWAY_S: Final = 90.0  # how long Ray may go on to list a dead node
SLOW_S: Final = 300.0  # a slot takes longer than so: it is made anew


@dataclass(frozen=True, slots=True)
class Create:
    """Make the slot of a GPU; ``number`` comes back with everything heard of it."""

    key: Key
    node_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the slot's actor, whatever it does."""

    key: Key
    number: int


@dataclass(frozen=True, slots=True)
class Call:
    """method(*args) of the slot. run: what a failure of the call is about."""

    key: Key
    number: int
    method: str
    args: tuple[Any, ...]
    run: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """A message to the daemon."""

    message: dict[str, Any]


Act = Create | Kill | Call | Say


class SlotState(enum.Enum):
    """MAKING: asked for or found, not heard yet. SILENT: answered before, does not now. DEAD:
    its process has certainly ended, or was told to."""

    MAKING = "making"
    READY = "ready"
    SILENT = "silent"
    DEAD = "dead"


class Where(enum.Enum):
    """Of a member. EXPECTED: a former driver started it. WAITING: its start was not sent yet."""

    EXPECTED = "expected"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"


GONE: Final = frozenset({Where.ENDED, Where.LOST})


@dataclass(slots=True)
class _Slot:
    """since: it is in its state. quiet: since when nothing was heard of this GPU's slots. buried:
    since when none of them can prolong its lease, for Ray counts it as dead. unreached: it fell
    silent, rather than dying. found: made by a former driver. condemned: told to end."""

    number: int
    state: SlotState
    since: float
    quiet: float
    buried: float | None = None
    unreached: bool = False
    found: bool = False
    condemned: bool = False
    gpu: str = ""
    address: str = ""
    port: int = 0
    run: dict[str, Any] | None = None


@dataclass(slots=True)
class _Node:
    """known: to the daemon. joined: it was told, by this driver, that all slots are there.
    listed: among Ray's living nodes, as of the last look."""

    node_id: str
    gpus: int
    known: bool
    joined: bool = False
    listed: bool = True
    slots: dict[int, _Slot] = field(default_factory=dict)


@dataclass(slots=True)
class _Member:
    """number: of the slot it was sent to. doubt: whether its start arrived is not known."""

    key: Key
    devices: list[int]
    order: dict[str, Any] | None
    where: Where
    number: int = 0
    doubt: bool = False
    began: bool = False
    why: str = ""
    status: int = 0
    started_s: float = 0.0
    ended_s: float = 0.0


@dataclass(slots=True)
class _Run:
    job: int
    epoch: int
    members: list[_Member]
    told: bool = False
    stop: tuple[int, float] | None = None
    progress: list[float] | None = None

    @property
    def name(self) -> str:
        return f"{self.job}.{self.epoch}"


class Fleet:
    """lost_after_s: silence after which a slot's run has certainly ended. A slot that is silent is
    condemned first, so that it cannot prolong its lease of lease_s, which then runs out; margin_s
    is for the clocks between. expected: nodes the daemon knows, to be called lost if they do not
    show up."""

    def __init__(
        self,
        lost_after_s: float,
        lease_s: float,
        margin_s: float,
        now: float,
        expected: Iterable[str] = (),
    ) -> None:
        self.lost_after_s = lost_after_s
        self._ended_after_s = lease_s + margin_s
        self._condemned_after_s = lost_after_s - self._ended_after_s
        self.nodes: dict[str, _Node] = {}
        self.runs: dict[str, _Run] = {}
        self._expected = dict.fromkeys(expected, now)
        self._known = set(self._expected)
        self._gone: dict[str, float] = {}  # node ids that were called lost, and when
        self._told_all = False
        self._number = 0
        self._acts: list[Act] = []

    def take(self) -> list[Act]:
        acts, self._acts = self._acts, []
        return acts

    # -- from the daemon -----------------------------------------------------------------------

    def start(self, message: Mapping[str, Any], now: float) -> None:
        """{job, epoch, order, devices: {node: [index]}}: a new run."""
        run = self._book(message, Where.WAITING, message["order"])
        for member in run.members:
            if member.key[0] not in self.nodes and member.key[0] not in self._expected:
                member.where, member.why = Where.LOST, f"node {member.key[0]} is not there"
        self._send(run)
        self._settle(run)

    def adopt(self, message: Mapping[str, Any], now: float) -> None:
        """{job, epoch, devices, began, stop: [signal, grace_s] or null}: a run of a former
        driver."""
        run = self._book(message, Where.EXPECTED, None)
        for member in run.members:
            member.began = bool(message["began"])
        if message["stop"]:
            run.stop = (int(message["stop"][0]), float(message["stop"][1]))
        for member in run.members:
            slot = self._slot(member.key)
            if slot is not None and slot.state is SlotState.READY:
                self._compare(run, member, slot)
        self._settle(run)

    def told_all(self) -> None:
        """Every run the daemon knows was named: what else runs is ended."""
        self._told_all = True
        for name, node in self.nodes.items():
            for index, slot in node.slots.items():
                self._end_stray((name, index), slot)

    def stop(self, message: Mapping[str, Any], now: float) -> None:
        """{job, epoch, signal, grace_s}"""
        run = self.runs.get(f"{message['job']}.{message['epoch']}")
        if run is None:
            return
        run.stop = (int(message["signal"]), float(message["grace_s"]))
        for member in run.members:
            if member.where is Where.WAITING:
                member.where, member.why = Where.LOST, "stopped before its start"
            elif member.where not in GONE:
                self._call_stop(member, run, *run.stop)
        self._settle(run)

    # -- from the cluster ----------------------------------------------------------------------

    def found(self, key: Key, node_id: str, now: float) -> int:
        """A slot of a former driver; its number, 0 if it is one too many."""
        node = self.nodes.get(key[0])
        if node is None:
            node = self.nodes[key[0]] = _Node(node_id, 0, key[0] in self._known)
        if node.node_id != node_id or key[1] in node.slots:
            return 0
        self._number += 1
        node.slots[key[1]] = _Slot(self._number, SlotState.MAKING, now, now, found=True)
        return self._number

    def nodes_seen(self, seen: Iterable[tuple[str, str, int]], now: float) -> None:
        """(name, node id, GPUs) of every living node. A name that changes its id is a node that
        was restarted; the new one is taken once the old one is silent."""
        found = list(seen)
        ids = {node_id for _, node_id, _ in found}
        for known in self.nodes.values():
            known.listed = known.node_id in ids
        for name, node_id, gpus in found:
            # one that is listed for long after it was lost has come back
            if now - self._gone.get(node_id, -AWAY_S) < AWAY_S:
                continue
            node = self.nodes.get(name)
            if node is None:
                node = self.nodes[name] = _Node(node_id, gpus, name in self._known)
            if node.node_id == node_id:
                node.gpus = gpus
                self._expected.pop(name, None)
                self._fill(name, node, now)
                self._join(name)

    def up(self, key: Key, number: int, hello: Mapping[str, Any], now: float) -> None:
        """The slot answered for the first time."""
        slot = self._current(key, number)
        if slot is None:
            return
        slot.gpu, slot.address = str(hello["gpu"]) or str(key[1]), str(hello["address"])
        # what ran in its predecessor has been ended, or it would not be up
        self.heard(key, number, hello, now)
        self._join(key[0])

    def heard(self, key: Key, number: int, state: Mapping[str, Any], now: float) -> None:
        """The slot's state."""
        slot = self._current(key, number)
        if slot is None:
            return
        slot.state, slot.since, slot.quiet = SlotState.READY, now, now
        slot.buried, slot.unreached = None, False
        slot.run, slot.port = state["run"], int(state["port"])
        for run, member in self._led_by(key):
            if member.where is Where.WAITING:
                self._send(run)
            if member.doubt:
                self._call_stop(member, run, int(signal.SIGKILL), 0.0)
            self._compare(run, member, slot)
            self._tell_news(run, slot, state)
            self._settle(run)
        self._end_stray(key, slot)

    def began(self, key: Key, number: int, run_name: str, answer: Mapping[str, Any]) -> None:
        """What a start gave."""
        run = self.runs.get(run_name)
        if run is None or self._current(key, number) is None:
            return
        for member in run.members:
            if member.key != key or member.where is not Where.STARTING:
                continue
            if "refused" in answer:
                member.where, member.why = Where.LOST, str(answer["refused"])
            else:
                member.where, member.began = Where.RUNNING, True
                member.started_s = float(answer["at_s"])
                if run.stop is not None:
                    self._call_stop(member, run, *run.stop)
        self._settle(run)

    def call_failed(self, key: Key, number: int, run_name: str) -> None:
        """A start that nobody answered may have happened: the run is stopped there, and only
        then looked for."""
        run = self.runs.get(run_name)
        for member in run.members if run is not None else ():
            if member.key == key and member.where is Where.STARTING and run is not None:
                member.doubt = True
                self._call_stop(member, run, int(signal.SIGKILL), 0.0)

    def stopped(self, key: Key, number: int, run_name: str) -> None:
        """A stop has arrived: the run cannot start there any more."""
        run = self.runs.get(run_name)
        for member in run.members if run is not None else ():
            if member.key == key and member.doubt:
                member.doubt, member.where = False, Where.EXPECTED

    def down(self, key: Key, number: int, now: float, *, dead: bool) -> None:
        """The slot does not answer; dead: its process has certainly ended."""
        slot = self._current(key, number)
        if slot is None or slot.state is SlotState.DEAD:
            return
        if dead:
            again = slot.state is SlotState.MAKING and not slot.found
            slot.state, slot.since = SlotState.DEAD, now
            slot.buried = now if slot.buried is None else slot.buried
            slot.number = 0 if again else slot.number  # one that dies young is made later
            self._fill(key[0], self.nodes[key[0]], now)
        elif slot.state is SlotState.READY:
            slot.state, slot.since, slot.unreached = SlotState.SILENT, now, True

    def buried(self, key: Key, number: int, now: float) -> None:
        """Ray counts the slot that was to be killed as dead: it cannot prolong its lease."""
        slot = self._current(key, number)
        if slot is not None and slot.state is not SlotState.DEAD:
            slot.state, slot.since = SlotState.DEAD, now
            slot.buried = now if slot.buried is None else slot.buried
            self._fill(key[0], self.nodes[key[0]], now)

    def tick(self, now: float) -> None:
        """Silence that lasted too long."""
        for name, since in list(self._expected.items()):
            if now - since >= self.lost_after_s and name not in self.nodes:
                del self._expected[name]
                self._say_lost(name, "it is not in the cluster")
        for name, node in list(self.nodes.items()):
            known = node.known or node.joined
            if known and node.slots and self._is_lost(node, now):
                self._node_lost(name, node, now)
                continue
            for index, slot in node.slots.items():
                if self._is_late(slot, now):
                    self._orphan((name, index), f"the slot of GPU {index} of {name} was lost")
                if self._is_due(slot, now):
                    self._acts.append(Kill((name, index), slot.number))
                    slot.condemned, slot.unreached = True, slot.unreached or slot.found
            self._fill(name, node, now)

    def _is_due(self, slot: _Slot, now: float) -> bool:
        """Whether the slot is to be given up."""
        silent_s = now - slot.since
        if slot.condemned:
            return False
        if slot.state is SlotState.MAKING:
            return silent_s >= (self.lost_after_s if slot.found else SLOW_S)
        return slot.state is SlotState.SILENT and silent_s >= self._condemned_after_s

    def _is_lost(self, node: _Node, now: float) -> bool:
        """Nothing was heard of it for too long, and its slots are not merely being made anew."""
        if not all(self._is_late(slot, now) for slot in node.slots.values()):
            return False
        unreached = all(slot.unreached for slot in node.slots.values())
        return unreached or not node.listed

    def _is_late(self, slot: _Slot, now: float) -> bool:
        """Whether what ran there has certainly ended, though no successor says so."""
        if slot.state is SlotState.READY or slot.buried is None:
            return False
        return now - slot.buried >= self._ended_after_s

    # -- inside --------------------------------------------------------------------------------

    def _book(self, message: Mapping[str, Any], where: Where, order: dict[str, Any] | None) -> _Run:
        members = [
            _Member((node, min(devices)), list(devices), order, where)
            for node, devices in message["devices"].items()
        ]
        run = _Run(int(message["job"]), int(message["epoch"]), members)
        self.runs[run.name] = run
        return run

    def _slot(self, key: Key) -> _Slot | None:
        node = self.nodes.get(key[0])
        return node.slots.get(key[1]) if node is not None else None

    def _current(self, key: Key, number: int) -> _Slot | None:
        slot = self._slot(key)
        return slot if slot is not None and slot.number == number else None

    def _led_by(self, key: Key) -> list[tuple[_Run, _Member]]:
        return [
            (run, member)
            for run in list(self.runs.values())
            for member in run.members
            if member.key == key and member.where not in GONE
        ]

    def _fill(self, name: str, node: _Node, now: float) -> None:
        """A slot for each GPU that has none."""
        for index in range(node.gpus):
            slot = node.slots.get(index)
            if slot is not None and slot.state is not SlotState.DEAD:
                continue
            if slot is not None and slot.number == 0 and now - slot.since < RETRY_S:
                continue
            self._number += 1
            fresh = _Slot(self._number, SlotState.MAKING, now, now)
            if slot is not None:
                fresh.quiet, fresh.buried, fresh.unreached = slot.quiet, slot.buried, slot.unreached
            node.slots[index] = fresh
            self._acts.append(Create((name, index), node.node_id, self._number))

    def _join(self, name: str) -> None:
        node = self.nodes[name]
        ready = [i for i, slot in node.slots.items() if slot.state is SlotState.READY]
        if not node.joined and node.gpus and len(ready) == node.gpus:
            node.joined = True
            self._say(kind="node_joined", node=name, gpus=node.gpus)

    def _send(self, run: _Run) -> None:
        """Starts the members once all their slots are there: together or not at all."""
        waiting = [member for member in run.members if member.where is Where.WAITING]
        slots = [self._slot(member.key) for member in run.members]
        if len(waiting) != len(run.members):
            return
        if any(slot is None or slot.state is not SlotState.READY for slot in slots):
            return
        first = slots[0]
        assert first is not None
        for rank, member in enumerate(run.members):
            order = self._order_of(run, rank, member, first)
            slot = self._slot(member.key)
            assert slot is not None
            member.where, member.number = Where.STARTING, slot.number
            self._acts.append(Call(member.key, slot.number, "start", (order,), run.name))

    def _order_of(self, run: _Run, rank: int, member: _Member, first: _Slot) -> dict[str, Any]:
        assert member.order is not None
        slots = self.nodes[member.key[0]].slots
        gpus = ",".join(slots[at].gpu or str(at) for at in member.devices if at in slots)
        environment = {
            **member.order["env"],
            "CUDA_VISIBLE_DEVICES": gpus,
            "INTENTD_GPU_INDICES": gpus,
            "INTENTD_NODE": member.key[0],
            "INTENTD_NODES": str(len(run.members)),
            "INTENTD_NODE_RANK": str(rank),
            "INTENTD_MASTER_ADDR": first.address,
            "INTENTD_MASTER_PORT": str(first.port),
        }
        return {**member.order, "job": run.job, "epoch": run.epoch, "env": environment}

    def _compare(self, run: _Run, member: _Member, slot: _Slot) -> None:
        """A member with what its slot says runs there."""
        here = slot.run if slot.run is not None and slot.run["run"] == run.name else None
        if member.where is Where.STARTING and member.number == slot.number:
            if here is None or here["state"] in ("starting", "refused"):
                return  # its call's own answer decides
        elif member.where not in (Where.STARTING, Where.EXPECTED, Where.RUNNING):
            return
        if here is None:
            member.began = member.began or member.where is Where.STARTING
            member.where = Where.LOST
            member.why = f"the slot of GPU {member.key[1]} of {member.key[0]} was lost"
            return
        member.started_s = float(here.get("started_s", 0.0))
        if here["state"] == "ended":
            member.where, member.began = Where.ENDED, True
            member.status, member.why = int(here["status"]), str(here["detail"])
            member.ended_s = float(here["ended_s"])
        elif here["state"] in ("lost", "refused"):
            member.where, member.why = Where.LOST, str(here["detail"]) or "refused"
            member.began = member.began or here["state"] == "lost"
        elif here["state"] == "running":
            member.where, member.began = Where.RUNNING, True
            if run.stop is not None and not here["stopping"]:
                self._call_stop(member, run, *run.stop)

    def _tell_news(self, run: _Run, slot: _Slot, state: Mapping[str, Any]) -> None:
        if slot.run is None or slot.run["run"] != run.name:
            return
        progress = state["progress"]
        if progress and progress != run.progress:
            run.progress = list(progress)
            self._say(
                kind="progress", job=run.job, epoch=run.epoch, done=progress[0], total=progress[1]
            )

    def _call_stop(self, member: _Member, run: _Run, number: int, grace_s: float) -> None:
        slot = self._slot(member.key)
        if slot is not None:
            args = (run.name, number, grace_s)
            self._acts.append(Call(member.key, slot.number, "stop", args, run.name))

    def _settle(self, run: _Run) -> None:
        """Tells the daemon where the run stands; one lost or failed member ends the others."""
        if run.name not in self.runs:
            return
        members = run.members
        if not run.told and all(m.where in (Where.RUNNING, Where.ENDED) for m in members):
            run.told = True
            at_s = max(member.started_s for member in members)
            self._say(kind="started", job=run.job, epoch=run.epoch, at_s=at_s)
        broken = [m for m in members if m.where is Where.LOST or m.status != 0]
        left = [member for member in members if member.where not in GONE]
        if broken and left and run.stop != (signal.SIGKILL, 0.0):
            run.stop = (int(signal.SIGKILL), 0.0)
            for member in left:
                if member.where is Where.WAITING:
                    member.where, member.why = Where.LOST, broken[0].why
                else:
                    self._call_stop(member, run, *run.stop)
            left = [member for member in members if member.where not in GONE]
        if left:
            return
        del self.runs[run.name]
        lost = [member for member in members if member.where is Where.LOST]
        if lost:
            began = any(member.began for member in members)
            self._say(kind="lost", job=run.job, epoch=run.epoch, why=lost[0].why, began=began)
            return
        worst = next((member for member in members if member.status), members[0])
        self._say(
            kind="exited",
            job=run.job,
            epoch=run.epoch,
            status=worst.status,
            detail=worst.why,
            at_s=max(member.ended_s for member in members),
        )

    def _orphan(self, key: Key, why: str) -> None:
        """The slot's runs have certainly ended without leaving a status."""
        for run, member in self._led_by(key):
            if member.where is Where.WAITING:
                continue  # for the slot that is being made
            member.began = member.began or member.where is Where.STARTING
            member.where, member.why = Where.LOST, why
            self._settle(run)

    def _end_stray(self, key: Key, slot: _Slot) -> None:
        here = slot.run
        if not self._told_all or here is None or here["state"] not in ("starting", "running"):
            return
        if here["run"] not in self.runs and not here["stopping"]:
            args = (here["run"], int(signal.SIGKILL), 0.0)
            self._acts.append(Call(key, slot.number, "stop", args))

    def _node_lost(self, name: str, node: _Node, now: float) -> None:
        self._gone[node.node_id] = now
        self._known.discard(name)
        del self.nodes[name]
        for index, slot in node.slots.items():
            if slot.number:
                self._acts.append(Kill((name, index), slot.number))
        quiet_s = now - max(slot.quiet for slot in node.slots.values())
        self._say_lost(name, f"nothing heard for {quiet_s:.0f} s")

    def _say_lost(self, name: str, why: str) -> None:
        self._say(kind="node_lost", node=name, why=why)
        for run in list(self.runs.values()):
            for member in run.members:
                if member.key[0] == name and member.where not in GONE:
                    member.where, member.why = Where.LOST, f"node {name} lost"
            self._settle(run)

    def _say(self, **message: Any) -> None:
        self._acts.append(Say(message))
