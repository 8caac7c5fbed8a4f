"""Network namespaces for tests, benchmarks and experiments: made here, and removed here.

Names are ``<prefix>-<pid>-<random>-<name>``, so that runs side by side never meet and what a
killed run left behind can be told from what lives (``remove_stale``). Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from intentd.core.errors import IntentdError

NETNS_DIR: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000
COMMAND_TIMEOUT_S: Final = 20.0
PREFIX: Final = "intentd"
_STALE: Final = re.compile(r"[a-z][a-z0-9]{0,15}-([0-9]+)-[0-9a-f]{6}-.+\Z")

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(IntentdError):
    """A command that builds or uses a namespace failed; the text carries its answer."""


def unavailable() -> str:
    """Why namespaces cannot be made here, or "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the ip command (iproute2) is not installed"
    probe = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(3)}-probe"
    made = _ip("netns", "add", probe, check=False)
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    _ip("netns", "del", probe, check=False)
    return ""


def remove_stale(prefix: str = PREFIX) -> list[str]:
    """Remove namespaces of runs whose process is gone; their names."""
    removed = []
    for path in NETNS_DIR.glob(f"{prefix}-*"):
        match = _STALE.match(path.name)
        if match and not Path(f"/proc/{match.group(1)}").exists():
            _ip("netns", "del", path.name, check=False)
            removed.append(path.name)
    return removed


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["ip", *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if check and done.returncode != 0:
        raise NamespaceError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done


@dataclass(slots=True)
class Interface:
    """One end of a veth pair inside its namespace."""

    namespace: Namespace
    device: str
    ipv4: str = ""
    ipv6: str = ""


@dataclass(slots=True)
class Namespace:
    """One host of a topology. name: as the topology calls it; full_name: as the kernel does."""

    name: str
    full_name: str
    interfaces: dict[str, Interface] = field(default_factory=dict)
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def ip(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``ip -n <namespace> <words>``. Raises NamespaceError."""
        return _ip("-n", self.full_name, *words, check=check)

    def tc(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``tc -n <namespace> <words>``: the judge that shares no code with ours."""
        done = subprocess.run(
            ["tc", "-n", self.full_name, *words],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if check and done.returncode != 0:
            raise NamespaceError(f"tc {' '.join(words)}: {done.stderr.strip() or done.returncode}")
        return done

    def command(self, argv: Sequence[str]) -> list[str]:
        """argv as it is started inside, for whoever starts processes by other means."""
        return ["ip", "netns", "exec", self.full_name, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
        env: Mapping[str, str] | None = None,
        text_in: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run argv inside to its end; the exit status is the caller's to judge."""
        return subprocess.run(
            self.command(argv),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            input=text_in,
            check=False,
        )

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start argv inside; what still runs when the topology closes is killed.

        ``ip netns exec`` replaces itself, so the pid is that of argv.
        """
        process = subprocess.Popen(
            self.command(argv), stdin=stdin, stdout=stdout, stderr=stderr, env=env
        )
        self.processes.append(process)
        return process

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling *thread* is inside until the block ends.

        Sockets made there stay there. Never across an await: other tasks of the loop's thread
        would find themselves inside.
        """
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(NETNS_DIR / self.full_name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this namespace for a process that is not in it."""
        with self.entered():
            return socket.socket(family, kind)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


class Topology:
    """Namespaces and the veth pairs between them; a context manager that leaves nothing behind.

    >>> with Topology() as net:
    ...     client, server = net.namespace("client"), net.namespace("server")
    ...     net.pair(client, server)        # 10.77.1.1 - 10.77.1.2, fd77:1::1 - fd77:1::2
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", prefix):
            raise NamespaceError(f"prefix: got {prefix!r}, expected 1-16 of [a-z0-9]")
        self.prefix = f"{prefix}-{os.getpid()}-{secrets.token_hex(3)}"
        self.namespaces: dict[str, Namespace] = {}
        self._subnets = 0

    def __enter__(self) -> Topology:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def namespace(self, name: str) -> Namespace:
        """A new host with its loopback up."""
        if name in self.namespaces:
            raise NamespaceError(f"namespace: got {name!r}, expected a name used once")
        made = Namespace(name, f"{self.prefix}-{name}")
        _ip("netns", "add", made.full_name)
        self.namespaces[name] = made
        made.ip("link", "set", "lo", "up")
        return made

    def pair(
        self,
        left: Namespace,
        right: Namespace,
        *,
        left_device: str = "",
        right_device: str = "",
        addresses: bool = True,
        mtu: int = 1500,
    ) -> tuple[Interface, Interface]:
        """A veth pair, up, with an IPv4 and an IPv6 subnet of its own unless told otherwise."""
        left_device = left_device or f"eth{len(left.interfaces)}"
        right_device = right_device or f"eth{len(right.interfaces)}"
        _ip(
            *f"link add {left_device} mtu {mtu} netns {left.full_name} type veth".split(),
            *f"peer name {right_device} mtu {mtu} netns {right.full_name}".split(),
        )
        ends = (Interface(left, left_device), Interface(right, right_device))
        if addresses:
            subnet = self._next_subnet()
            for host, end in enumerate(ends, start=1):
                self.address(end, subnet, host)
        for end in ends:
            end.namespace.interfaces[end.device] = end
            end.namespace.ip("link", "set", end.device, "up")
        return ends

    def star(
        self, hosts: Sequence[Namespace], *, name: str = "switch", mtu: int = 1500
    ) -> Namespace:
        """A switch (bridge ``br0`` in a namespace of its own) with every host on one subnet.

        A host's device is its next free ``ethN``; the switch's port towards it is ``p<index>``.
        The hosts' addresses follow their order: 10.77.S.1, .2, ... and fd77:S::1, ...
        """
        switch = self.namespace(name)
        switch.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        switch.ip("link", "set", "br0", "up")
        subnet = self._next_subnet()
        for index, host in enumerate(hosts):
            end, port = self.pair(host, switch, right_device=f"p{index}", addresses=False, mtu=mtu)
            switch.ip("link", "set", port.device, "master", "br0")
            self.address(end, subnet, index + 1)
        return switch

    def address(self, end: Interface, subnet: int, host: int) -> None:
        """Give an interface 10.77.<subnet>.<host>/24 and fd77:<subnet>::<host>/64."""
        end.ipv4, end.ipv6 = f"10.77.{subnet}.{host}", f"fd77:{subnet:x}::{host:x}"
        end.namespace.ip(*f"addr add {end.ipv4}/24 brd + dev {end.device}".split())
        end.namespace.ip("addr", "add", f"{end.ipv6}/64", "dev", end.device, "nodad")

    def _next_subnet(self) -> int:
        self._subnets += 1
        if self._subnets > 254:
            raise NamespaceError("topology: more than 254 subnets")
        return self._subnets

    def close(self) -> None:
        """Kill what was started inside, remove every namespace. Safe to call twice."""
        for namespace in self.namespaces.values():
            for process in namespace.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
            for process in namespace.processes:
                process.wait(COMMAND_TIMEOUT_S)
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()
        errors = []
        for namespace in self.namespaces.values():
            done = _ip("netns", "del", namespace.full_name, check=False)
            if done.returncode != 0:
                errors.append(done.stderr.strip())
        self.namespaces.clear()
        if errors:
            raise NamespaceError("; ".join(errors))
