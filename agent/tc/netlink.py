"""Traffic control over route netlink: apply changes, read back, take away. Blocking.

Everything here runs in one thread of its own (KernelThread): pyroute2's synchronous socket fails
inside a running event loop, and its asynchronous one under uvloop.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from intentd.agent.tc import rtnl
from intentd.agent.tc.plan import (
    FILTER_PREFS,
    HANDLE,
    KERNEL_HANDLE,
    MAJOR,
    QUEUE_MAJOR,
    UNMARKED_MINOR,
    Change,
    DropClass,
    DropFilter,
    DscpFilter,
    HtbClass,
    InstallRoot,
    PutClass,
    PutFilter,
    PutQueue,
    RemoveRoot,
    SeenClass,
    SeenFilter,
    SeenTree,
)
from intentd.core.errors import IntentdError

TC_H_ROOT: Final = 0xFFFFFFFF
TC_H_INGRESS: Final = 0xFFFFFFF1
INGRESS_HANDLE: Final = 0xFFFF0000
ETH_P: Final = {"ipv4": 0x0800, "ipv6": 0x86DD}
ETH_P_ALL: Final = 0x0003
IFF_UP: Final = 0x1
SIOCGIFFLAGS: Final = 0x8913
SIOCGIFINDEX: Final = 0x8933
CAP_NET_ADMIN: Final = 12
TICK_S: Final = 64e-9  # sch_generic: PSCHED_SHIFT 6
IFB_QUEUE_LEN: Final = 1000
REDIRECT_PREF: Final = 0x2D17

T = TypeVar("T")


class TcError(IntentdError):
    """The kernel refused a change; the text names the change and the refusal."""


class TcUnavailableError(TcError):
    """This process or kernel cannot shape at all: no privilege, or no such qdisc."""


class NoDeviceError(TcError):
    """The device does not exist (any more)."""


@dataclass(frozen=True, slots=True)
class Device:
    """A network device. up: administratively up."""

    name: str
    index: int
    up: bool


@dataclass(frozen=True, slots=True)
class ClassCounters:
    """What a class has sent since it was made, and what waits in it."""

    minor: int
    sent_bytes: int
    sent_packets: int
    dropped_packets: int
    backlog_bytes: int
    backlog_packets: int


@dataclass(frozen=True, slots=True)
class Reading:
    """One consistent look at a device's egress."""

    device: Device
    tree: SeenTree
    counters: tuple[ClassCounters, ...] = ()
    qdiscs: tuple[str, ...] = field(default=())


def has_net_admin() -> bool:
    """Does the effective set of this process hold CAP_NET_ADMIN?"""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_NET_ADMIN & 1)
    return False


class TrafficControl:
    """The kernel's traffic control as seen from the thread that calls. Not thread-safe.

    root_kind: the qdisc to install; anything but "htb" exists for tests, which ask for a kind
    that the kernel lacks.
    """

    def __init__(self, root_kind: str = "htb") -> None:
        self.root_kind = root_kind
        self._socket: rtnl.RouteSocket | None = None

    @property
    def _ip(self) -> Any:
        if self._socket is None:
            self._socket = rtnl.RouteSocket()
        return self._socket.ip

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def device(self, name: str) -> Device:
        """Look a device up. Raises NoDeviceError."""
        if not 0 < len(name.encode()) < 16:
            raise NoDeviceError(f"device: got {name!r}, expected a name of 1 to 15 bytes")
        # By ioctl (netdevice(7)): a netlink answer about a link is a hundred attributes that
        # pyroute2 decodes one by one, a third of the cost of a whole verification.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            request = struct.pack("16s16x", name.encode())
            try:
                index = struct.unpack("16xi", fcntl.ioctl(asking, SIOCGIFINDEX, request)[:20])[0]
                flags = struct.unpack("16xH", fcntl.ioctl(asking, SIOCGIFFLAGS, request)[:18])[0]
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise NoDeviceError(f"device {name!r} does not exist") from None
                raise TcError(f"device {name!r}: {error.strerror}") from error
        return Device(name, index, bool(flags & IFF_UP))

    def read(self, name: str) -> Reading:
        """What the device's egress holds now. Raises NoDeviceError, TcError."""
        device = self.device(name)
        with _refusals(f"reading {name}"):
            qdiscs = list(self._ip.get_qdiscs(device.index))
            root = next((q for q in qdiscs if q["parent"] == TC_H_ROOT), None)
            kind = str(root.get_attr("TCA_KIND")) if root is not None else ""
            handle = int(root["handle"]) if root is not None else KERNEL_HANDLE
            tree = SeenTree(kind, handle)
            counters: tuple[ClassCounters, ...] = ()
            if tree.ours:
                tree, counters = self._read_tree(device, root, qdiscs)
        shown = tuple(
            f"{q.get_attr('TCA_KIND')} {q['handle']:08x} parent {q['parent']:08x}" for q in qdiscs
        )
        return Reading(device, tree, counters, shown)

    def _read_tree(
        self, device: Device, root: Any, qdiscs: list[Any]
    ) -> tuple[SeenTree, tuple[ClassCounters, ...]]:
        queues = {
            int(q["parent"]) & 0xFFFF: int(q.get_attr("TCA_OPTIONS")["limit"])
            for q in qdiscs
            if q["parent"] >> 16 == MAJOR
            and q.get_attr("TCA_KIND") == "pfifo"
            and q["handle"] == (QUEUE_MAJOR + (q["parent"] & 0xFFFF)) << 16
        }
        classes: dict[int, SeenClass] = {}
        counters = []
        for message in self._ip.get_classes(device.index):
            if message["handle"] >> 16 != MAJOR or message.get_attr("TCA_KIND") != "htb":
                continue
            shape, counted = _parse_class(message)
            classes[shape.minor] = SeenClass(
                shape, queues.get(shape.minor), counted.backlog_packets
            )
            counters.append(counted)
        filters = [
            _parse_filter(message)
            for message in self._ip.get_filters(device.index, parent=HANDLE)
            if message["handle"] & 0xFFF
        ]
        init = root.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_INIT")
        tree = SeenTree(
            "htb", HANDLE, int(init["defcls"]) & 0xFFFF, dict(sorted(classes.items())), filters
        )
        return tree, tuple(sorted(counters, key=lambda counted: counted.minor))

    def apply(self, device: Device, changes: Iterable[Change]) -> int:
        """Make the changes in order; how many were made. Raises TcError at the first refusal.

        A class that turned busy since it was read is left where it is.
        """
        made = 0
        for change in changes:
            try:
                with _refusals(f"{type(change).__name__} on {device.name}"):
                    self._make(device.index, change)
            except TcError as error:
                busy = getattr(error.__cause__, "code", None) == errno.EBUSY
                if not (busy and isinstance(change, DropClass)):
                    raise
            made += 1
        return made

    def _make(self, index: int, change: Change) -> None:
        tc = self._ip.tc
        match change:
            case RemoveRoot():
                tc("del", index=index, handle=HANDLE, parent=TC_H_ROOT)
            case InstallRoot():
                tc("add", self.root_kind, index, HANDLE, parent=TC_H_ROOT, default=UNMARKED_MINOR)
            case PutClass(shape, new):
                tc(
                    "add-class" if new else "change-class",
                    "htb",
                    index,
                    HANDLE | shape.minor,
                    parent=HANDLE | shape.parent_minor,
                    rate=shape.rate_bps // 8,
                    ceil=shape.ceil_bps // 8,
                    burst=shape.burst_bytes,
                    cburst=shape.cburst_bytes,
                    quantum=shape.quantum_bytes,
                    prio=shape.prio,
                )
            case PutQueue(minor, limit, new):
                handle = (QUEUE_MAJOR + minor) << 16
                # "replace": a queue of somebody else's under our leaf is ours to replace
                command = "replace" if new else "change"
                tc(command, "pfifo", index, handle, parent=HANDLE | minor, limit=limit)
            case PutFilter(shape):
                tc(
                    "add-filter",
                    "u32",
                    index,
                    parent=HANDLE,
                    prio=FILTER_PREFS[shape.protocol],
                    protocol=ETH_P[shape.protocol],
                    target=HANDLE | shape.minor,
                    keys=[_filter_key(shape)],
                )
            case DropFilter(protocol, pref, handle):
                info = pref << 16 | socket.htons(ETH_P[protocol])
                tc("del-filter", index=index, handle=handle, info=info, parent=HANDLE)
            case DropClass(minor):
                tc("del-class", index=index, handle=HANDLE | minor)

    def make_ifb(self, name: str) -> Device:
        """An IFB device, up. Raises TcUnavailableError where the kernel has none."""
        with _refusals(f"IFB device {name}"):
            self._ip.link("add", ifname=name, kind="ifb", txqlen=IFB_QUEUE_LEN)
            made = self.device(name)
            self._ip.link("set", index=made.index, state="up")
        return self.device(name)

    def remove_device(self, name: str) -> bool:
        """Take a device of ours away; False if it was gone."""
        try:
            device = self.device(name)
        except NoDeviceError:
            return False
        with _refusals(f"removing {name}"):
            self._ip.link("del", index=device.index)
        return True

    def has_ingress(self, device: Device) -> bool:
        """Does the device have an ingress or clsact qdisc?"""
        with _refusals(f"reading {device.name}"):
            return any(q["parent"] == TC_H_INGRESS for q in self._ip.get_qdiscs(device.index))

    def redirect_ingress(self, device: Device, target: Device) -> None:
        """All that arrives at the device passes the target's egress first."""
        with _refusals(f"ingress of {device.name}"):
            self._ip.tc("add", "ingress", device.index, INGRESS_HANDLE)
            self._ip.tc(
                "add-filter",
                "u32",
                device.index,
                parent=INGRESS_HANDLE,
                prio=REDIRECT_PREF,
                protocol=ETH_P_ALL,
                target=HANDLE | UNMARKED_MINOR,
                keys=["0x0/0x0+0"],
                action={
                    "kind": "mirred",
                    "direction": "egress",
                    "action": "redirect",
                    "ifindex": target.index,
                },
            )

    def redirects(self, device: Device, target: Device) -> bool:
        """Is our redirection in place, and the target up to take it?"""
        with _refusals(f"reading {device.name}"):
            filters = list(self._ip.get_filters(device.index, parent=INGRESS_HANDLE))
        return target.up and any(
            message["info"] >> 16 == REDIRECT_PREF and message["handle"] & 0xFFF
            for message in filters
        )

    def remove_ingress(self, device: Device) -> None:
        with _refusals(f"ingress of {device.name}"):
            self._ip.tc("del", "ingress", device.index, INGRESS_HANDLE)


def _filter_key(shape: DscpFilter) -> str:
    """The u32 key in pyroute2's notation: value/mask+offset, leading zero bytes of the mask cut.

    IPv4: bits 2-7 of byte 1 are the DSCP (RFC 2474). IPv6: the upper six bits of the traffic
    class, bits 4-9 of the packet. Both leave the ECN bits out.
    """
    if shape.protocol == "ipv4":
        return f"{shape.dscp << 2:#x}/0xfc+1"
    return f"{shape.dscp << 6:#06x}/0x0fc0+0"


def _parse_class(message: Any) -> tuple[HtbClass, ClassCounters]:
    options = message.get_attr("TCA_OPTIONS")
    htb = options.get_attr("TCA_HTB_PARMS")
    rate = options.get_attr("TCA_HTB_RATE64") or htb["rate"]  # bytes per second
    ceil = options.get_attr("TCA_HTB_CEIL64") or htb["ceil"]
    parent = int(message["parent"])
    shape = HtbClass(
        minor=int(message["handle"]) & 0xFFFF,
        parent_minor=0 if parent == TC_H_ROOT else parent & 0xFFFF,
        rate_bps=int(rate) * 8,
        ceil_bps=int(ceil) * 8,
        burst_bytes=round(htb["buffer"] * TICK_S * rate),
        cburst_bytes=round(htb["cbuffer"] * TICK_S * ceil),
        quantum_bytes=int(htb["quantum"]),
        prio=int(htb["prio"]),
    )
    stats = message.get_attr("TCA_STATS2")
    basic, queue = stats.get_attr("TCA_STATS_BASIC"), stats.get_attr("TCA_STATS_QUEUE")
    return shape, ClassCounters(
        minor=shape.minor,
        sent_bytes=int(basic["bytes"]),
        sent_packets=int(basic["packets"]),
        dropped_packets=int(queue["drops"]),
        backlog_bytes=int(queue["backlog"]),
        backlog_packets=int(queue["qlen"]),
    )


def _parse_filter(message: Any) -> SeenFilter:
    """One of our filters, or shape None for anything that differs from how we write them."""
    pref = int(message["info"]) >> 16
    handle = int(message["handle"])
    foreign = SeenFilter(pref, handle, None)
    protocol = next((name for name, ours in FILTER_PREFS.items() if ours == pref), None)
    options = message.get_attr("TCA_OPTIONS")
    if protocol is None or message.get_attr("TCA_KIND") != "u32" or options is None:
        return foreign
    target = int(options.get_attr("TCA_U32_CLASSID") or 0)
    selector = options.get_attr("TCA_U32_SEL")
    if target >> 16 != MAJOR or selector is None or len(selector["keys"]) != 1:
        return foreign
    # pyroute2 0.9.7 decodes u32 keys four bytes early (it skips the selector's fields but not its
    # attribute header): val holds the mask, off the value in network order, offmask the offset.
    key = selector["keys"][0]
    value = socket.ntohl(int(key["key_off"]) & 0xFFFFFFFF)
    match protocol, int(key["key_val"]), int(key["key_offmask"]):
        case "ipv4", 0xFC000000, 1:  # as pyroute2 packs it
            dscp = value >> 26
        case "ipv4", 0x00FC0000, 0:  # as the tc tool does
            dscp = value >> 18
        case "ipv6", 0x0FC00000, 0:
            dscp = value >> 22
        case _:
            return foreign
    return SeenFilter(pref, handle, DscpFilter(protocol, dscp, target & 0xFFFF))


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn the kernel's refusals into errors of ours that say what was tried."""
    try:
        yield
    except IntentdError:
        raise
    except Exception as error:
        code = rtnl.error_code(error)
        if code is None:
            raise
        text = f"{what}: {os.strerror(code)}"
        if code in {errno.EPERM, errno.EACCES}:
            raise TcUnavailableError(f"{text} (shaping needs CAP_NET_ADMIN)") from error
        if code == errno.ENODEV:
            raise NoDeviceError(f"{what} does not exist") from error
        if what.startswith("InstallRoot") and code in {errno.ENOENT, errno.EOPNOTSUPP}:
            raise TcUnavailableError(f"{text} (this kernel lacks the qdisc, sch_htb)") from error
        if what.startswith("IFB") and code in {errno.EOPNOTSUPP, errno.ENOENT}:
            raise TcUnavailableError(f"{text} (this kernel lacks IFB devices)") from error
        raise TcError(text) from error


class KernelThread:
    """The one thread in which traffic control is done, and the calls handed to it.

    It lives in the network namespace of the thread that made this object. Calls are served in
    order; a caller that is cancelled leaves its call to finish.
    """

    def __init__(self, control: TrafficControl | None = None) -> None:
        self.control = control or TrafficControl()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tc")
        self._closed = threading.Event()
        self._executor.submit(lambda: None).result()  # born here, hence in this namespace

    async def call(self, function: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function)

    def close(self) -> None:
        """Close socket and thread. Safe to call twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._executor.submit(self.control.close).result()
            self._executor.shutdown()
