"""The agent's side of shaping: policies go in, the kernel follows, the state is told.

ShapingHost is one a process: the thread that talks to the kernel, the record of what was found,
the dead-man process. Shaper is one a domain: a device and a direction.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from intentd.agent.tc import plan
from intentd.agent.tc.claim import Claims
from intentd.agent.tc.guard import Guard
from intentd.agent.tc.netlink import (
    ClassCounters,
    Device,
    KernelThread,
    NoDeviceError,
    Reading,
    TcError,
    TcUnavailableError,
    TrafficControl,
    has_net_admin,
)
from intentd.agent.tc.restore import Restored, restore_all
from intentd.agent.tc.state import (
    AgentAliveError,
    Found,
    Owner,
    Record,
    StateFile,
    boot_id,
    netns_inode,
)
from intentd.core.errors import InputError, IntentdError, PolicyError
from intentd.core.flows.policy import DomainPolicy

log = logging.getLogger(__name__)

# The queue has to form at the receiver, not at the port before it: arrivals are held to less than
# the link carries.
INGRESS_SHARE: Final = 0.95
DIRECTIONS: Final = ("egress", "ingress")
UNSHAPED_TEXT: Final = "ordered but unshaped"


class Shaping(enum.Enum):
    """unshaped: cannot or need not shape here (the gate works all the same); shaped: the kernel
    was read back and holds the policy; foreign: somebody else's qdisc is there and stays; failed:
    the device is missing or the kernel refused, verify() tries again."""

    UNSHAPED = "unshaped"
    SHAPED = "shaped"
    FOREIGN = "foreign"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ShaperState:
    """state and, unless shaped, why."""

    state: Shaping
    reason: str = ""

    def to_plain(self) -> dict[str, str]:
        return {"state": self.state.value, "reason": self.reason}


class ShapingHost:
    """What the shapers of one process share. Make it before the first shaper, close it last."""

    def __init__(self, state_path: Path, control: TrafficControl | None = None) -> None:
        self.state = StateFile(state_path)
        self.guard = Guard(state_path)
        self.thread = KernelThread(control)
        # (device, direction) -> the one shaper that holds it, from its first policy on
        self.claims: dict[tuple[str, str], Shaper] = {}
        # the same among processes
        self.holds = Claims()
        # What was given back is not taken again: a repair may wait behind the last restoring.
        self.closing = False

    def shaper(self, device: str, direction: str = "egress", **options: Any) -> Shaper:
        """A shaper of this host; options as Shaper's."""
        return Shaper(self, device, direction, **options)

    @property
    def control(self) -> TrafficControl:
        return self.thread.control

    async def close(self) -> list[Restored]:
        """Give every recorded device back, stop the dead-man process and the thread.

        Raises nothing of the kernel's: what could not be restored is in the answer, and stays
        recorded for ``intentctl tc restore``. A second call does nothing.
        """
        outcomes: list[Restored] = []
        if self.closing:
            return outcomes
        self.closing = True
        try:
            outcomes = await self.thread.call(self._restore_all)
        except (IntentdError, OSError) as error:
            log.warning("restoring qdiscs", extra={"error": str(error)})
        finally:
            self.holds.drop_all()
            await self.thread.call(self.guard.disarm)
            self.thread.close()
        return outcomes

    def _restore_all(self) -> list[Restored]:
        if not self.state.path.exists():
            return []
        outcomes = restore_all(self.state, self.control)
        for outcome in outcomes:
            log.info("restored qdisc", extra={"device": outcome.device, "outcome": outcome.outcome})
        return outcomes

    def remember(self, found: Found) -> None:
        """Claim and record a device before its first change, and arm the dead-man.

        Holds the lock already. What an earlier agent recorded for the same device is kept: it saw
        the device untouched. Raises AgentAliveError if another agent holds the device, OSError if
        the disk refuses.
        """
        self.holds.take(found.ifindex, found.device, found.direction)
        me = Owner.current()
        record = self.state.load()
        if record is None or record.boot != boot_id():
            record = Record(boot_id(), me)
        record.owner.yield_or_raise()
        before = record.find(found.device, found.direction)
        same = before is not None and (before.ifindex, before.netns) == (found.ifindex, found.netns)
        if not same:
            others = tuple(entry for entry in record.devices if entry is not before)
            record = replace(record, devices=(*others, found))
        if not same or record.owner != me:
            self.state.save(replace(record, owner=me))
        self.guard.arm()


class Shaper:
    """Holds one device to one domain's policy.

    direction "egress" shapes what this host sends. "ingress" shapes what it receives, for a
    domain that is a receiver's downlink: arrivals pass an IFB device, classified by DSCP, so the
    senders must mark and every class needs a mark of its own.
    link_share: part of the policy's rate to shape to, INGRESS_SHARE for ingress unless given.
    """

    def __init__(
        self,
        host: ShapingHost,
        device: str,
        direction: str = "egress",
        *,
        link_share: float | None = None,
        unmarked_share: float = plan.UNMARKED_SHARE,
        queue_packets: int = plan.QUEUE_PACKETS,
    ) -> None:
        if direction not in DIRECTIONS:
            raise InputError("direction", direction, " or ".join(DIRECTIONS))
        if link_share is None:
            link_share = INGRESS_SHARE if direction == "ingress" else 1.0
        if not 0 < link_share <= 1:
            raise InputError("link_share", link_share, "a share in (0, 1]")
        self.host = host
        self.device = device
        self.direction = direction
        self.link_share = link_share
        self.unmarked_share = unmarked_share
        self.queue_packets = queue_packets
        self._state = ShaperState(Shaping.UNSHAPED, f"{UNSHAPED_TEXT}: no policy yet")
        self._tree: plan.HtbTree | None = None
        self._policy_name = self._ifb_name = ""
        self._reading: Reading | None = None
        self._changes = self._repairs = 0
        self._apply_s = 0.0

    @property
    def state(self) -> ShaperState:
        return self._state

    def priority_of(self, class_index: int) -> int:
        """The SO_PRIORITY of a class, 0 where the kernel would not classify by it."""
        if self._state.state is not Shaping.SHAPED or self.direction == "ingress":
            return 0
        return plan.priority_of(class_index)

    def check(self, policy: DomainPolicy) -> None:
        """Raises what apply would raise; nothing changes."""
        try:
            self._plan(policy)
        except PolicyError as error:
            if not self._tells_no_classes(error):
                raise

    def _plan(self, policy: DomainPolicy) -> plan.HtbTree:
        return plan.tree_for(
            policy,
            rate_bps=policy.rate_bps * self.link_share,
            unmarked_share=self.unmarked_share,
            queue_packets=self.queue_packets,
            by_dscp=self.direction == "ingress",
        )

    def _tells_no_classes(self, error: PolicyError) -> bool:
        """Whether a receiver gets no marks to tell classes by: such a domain goes unshaped."""
        return self.direction == "ingress" and error.value == 0

    async def apply(self, policy: DomainPolicy) -> ShaperState:
        """Make the kernel hold the policy, changing in place what differs, and read it back.

        Raises PolicyError or InputError for a policy that cannot be shaped (two classes with one
        DSCP); then nothing has changed. Whatever the kernel says ends in the state.
        """
        try:
            tree = self._plan(policy)
        except PolicyError as error:
            if not self._tells_no_classes(error):
                raise
            await self.restore()
            return self._become(
                Shaping.UNSHAPED, f"the receiver tells classes by DSCP, and {error}"
            )
        if self.host.claims.setdefault((self.device, self.direction), self) is not self:
            return self._become(
                Shaping.FAILED, f"another domain shapes the {self.direction} of {self.device}"
            )
        previous, self._tree, self._policy_name = self._tree, tree, policy.name
        began = time.monotonic()
        made = await self.host.thread.call(lambda: self._enforce(tree, previous))
        self._apply_s = time.monotonic() - began
        self._changes += made
        return self._state

    async def verify(self) -> ShaperState:
        """Read back, repair what somebody changed or what failed before, refresh the counters."""
        tree = self._tree
        if tree is not None:
            was_shaped = self._state.state is Shaping.SHAPED
            made = await self.host.thread.call(lambda: self._enforce(tree, None))
            if made and was_shaped:
                self._repairs += made
                log.warning("repaired qdisc", extra={"device": self.device, "changes": made})
        return self._state

    async def differences(self) -> list[str]:
        """What the kernel holds otherwise than the policy, as tc commands that would mend it.

        Changes nothing. Raises TcError, NoDeviceError when the device cannot be read.
        """
        tree = self._tree
        if tree is None:
            return []
        target = self._target_name
        reading = await self.host.thread.call(lambda: self.host.control.read(target))
        if reading.tree.foreign:
            return [f"{target} has a root qdisc {reading.tree.kind} that is not the agent's"]
        return [plan.as_command(step, target) for step in plan.changes(tree, reading.tree)]

    async def restore(self) -> ShaperState:
        """Give this device back; the shaper then waits for the next policy."""
        self._tree = self._reading = None
        reason = "given back"
        key = (self.device, self.direction)
        if self.host.claims.get(key) is not self:
            return self._become(Shaping.UNSHAPED, "nothing to give back")
        del self.host.claims[key]
        try:
            for outcome in await self.host.thread.call(self._restore_own):
                if outcome.outcome == "failed":
                    return self._become(Shaping.FAILED, outcome.detail)
                reason = f"given back ({outcome.outcome})"
        except (IntentdError, OSError) as error:
            return self._become(Shaping.FAILED, str(error))
        return self._become(Shaping.UNSHAPED, reason)

    async def counters(self) -> tuple[ClassCounters, ...]:
        """Read the classes' counters now; () while not shaped."""
        if self._state.state is not Shaping.SHAPED:
            return ()
        try:
            target = self._target_name
            self._reading = await self.host.thread.call(lambda: self.host.control.read(target))
        except TcError:
            return ()
        return self._reading.counters

    def status(self) -> dict[str, Any]:
        """For /status; the counters are those of the last reading."""
        tree, reading = self._tree, self._reading
        counted = {c.minor: c for c in reading.counters} if reading is not None else {}
        rows = plan.tree_to_plain(tree)["classes"] if tree is not None else []
        assert isinstance(rows, list)
        for row, cls in zip(rows, tree.classes if tree is not None else (), strict=True):
            counters = counted.get(cls.minor)
            for name in ClassCounters.__slots__[1:]:
                row[name] = getattr(counters, name) if counters is not None else 0
        return {
            **self._state.to_plain(),
            "device": self.device,
            "direction": self.direction,
            "policy": self._policy_name,
            "link_up": reading.device.up if reading is not None else False,
            "guarded": self.host.guard.armed,
            "changes": self._changes,
            "repairs": self._repairs,
            "last_apply_s": round(self._apply_s, 6),
            "classes": rows,
        }

    @property
    def _target_name(self) -> str:
        return self.device if self.direction == "egress" else self._ifb_name

    def _become(self, state: Shaping, reason: str = "") -> ShaperState:
        if state is Shaping.UNSHAPED:
            reason = f"{UNSHAPED_TEXT}: {reason}"
        new = ShaperState(state, reason)
        if new != self._state:
            level = logging.INFO if state is Shaping.SHAPED else logging.WARNING
            log.log(
                level,
                "shaping is %s",
                state.value,
                extra={"device": self.device, "direction": self.direction, "reason": reason},
            )
        self._state = new
        return new

    def _enforce(self, tree: plan.HtbTree, previous: plan.HtbTree | None) -> int:
        """In the kernel's thread: make it so, set the state; the number of changes made."""
        if self.host.closing:
            self._become(Shaping.UNSHAPED, "the agent stops")
            return 0
        if not self.device:
            self._become(Shaping.UNSHAPED, "no device is configured")
            return 0
        if not has_net_admin():
            self._become(Shaping.UNSHAPED, "this process lacks CAP_NET_ADMIN")
            return 0
        try:
            with self.host.state.locked():
                return self._enforce_locked(tree)
        except TcUnavailableError as error:
            self._back_out(None)
            self._become(Shaping.UNSHAPED, str(error))
        except (NoDeviceError, AgentAliveError) as error:
            self._become(Shaping.FAILED, str(error))
        except (TcError, InputError) as error:
            self._back_out(previous)
            self._become(Shaping.FAILED, str(error))
        except OSError as error:
            self._become(Shaping.FAILED, f"the record of what was found: {error}")
        return 0

    def _enforce_locked(self, tree: plan.HtbTree) -> int:
        control = self.host.control
        device = control.device(self.device)
        if self.direction == "ingress":
            target = self._prepare_ingress(device)
            if target is None:
                self._become(Shaping.FOREIGN, f"{self.device} has an ingress qdisc already")
                return 0
        else:
            target = device
        reading = control.read(target.name)
        if reading.tree.foreign:
            seen = f"{reading.tree.kind} {reading.tree.handle >> 16:x}:"
            self._become(Shaping.FOREIGN, f"{target.name} has the root qdisc {seen}")
            return 0
        if self.direction == "egress":
            kind = "" if reading.tree.ours else reading.tree.kind
            self.host.remember(self._found(device, kind, reading.qdiscs))
        steps = plan.changes(tree, reading.tree)
        made = control.apply(target, steps)
        if made:
            reading = control.read(target.name)
            left = [c for c in plan.changes(tree, reading.tree) if type(c) is not plan.DropClass]
            if left:
                raise TcError(f"read back otherwise: {plan.as_command(left[0], target.name)}")
        if self.direction == "ingress" and not control.has_ingress(device):
            control.redirect_ingress(device, target)
            made += 1
        self._reading = reading
        self._become(Shaping.SHAPED)
        return made

    def _prepare_ingress(self, device: Device) -> Device | None:
        """The IFB device that arrivals pass; None if the device's ingress is somebody else's."""
        control = self.host.control
        self._ifb_name = f"ifb-2d{device.index}"
        try:
            ifb = control.device(self._ifb_name)
        except NoDeviceError:
            if control.has_ingress(device):
                return None
            ifb = None
        self.host.remember(self._found(device, "", (), ifb=self._ifb_name))
        if ifb is None:
            return control.make_ifb(self._ifb_name)
        if control.has_ingress(device) and not control.redirects(device, ifb):
            return None
        return ifb

    def _found(self, device: Device, kind: str, qdiscs: tuple[str, ...], ifb: str = "") -> Found:
        return Found(
            device=device.name,
            direction=self.direction,
            ifindex=device.index,
            netns=netns_inode(),
            kind=kind,
            handle=plan.KERNEL_HANDLE,
            qdiscs=qdiscs,
            ifb=ifb,
        )

    def _restore_own(self) -> list[Restored]:
        try:
            if not self.host.state.path.exists():
                return []
            return restore_all(self.host.state, self.host.control, select=self._is_mine)
        finally:
            self.host.holds.drop(self.device, self.direction)

    def _is_mine(self, found: Found) -> bool:
        return (found.device, found.direction) == (self.device, self.direction)

    def _back_out(self, previous: plan.HtbTree | None) -> None:
        """After a refusal: the tree that held before, else the device as it was found."""

        def attempt(action: Callable[[], object]) -> bool:
            try:
                action()
            except (IntentdError, OSError) as error:
                log.warning("backing out", extra={"device": self.device, "error": str(error)})
                return False
            return True

        def put_back(tree: plan.HtbTree) -> None:
            with self.host.state.locked():
                self._enforce_locked(tree)

        if previous is not None and attempt(lambda: put_back(previous)):
            self._tree = previous
            return
        attempt(self._restore_own)
