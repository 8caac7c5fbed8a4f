"""Descriptors that outlive the process: systemd's descriptor store, spoken without libsystemd.

A daemon hands sockets to its service manager (``FDSTORE=1`` with a name, sd_notify(3)); the next
process of the service receives them at descriptor 3 and on (``LISTEN_FDS``, sd_listen_fds(3)).
Between the two, connections wait in the kernel: nobody is refused and nothing is reset.
``$FDSTORE`` says how many the manager takes; where it is not set, nothing is kept. systemd sets it
from version 254 on, the units set it for older ones, and ``holder`` speaks the manager's part.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import select
import socket
from collections.abc import MutableMapping
from typing import Final

from intentd.daemons.kit.systemd import Notifier

_log = logging.getLogger(__name__)

FIRST_FD: Final = 3  # sd_listen_fds(3)
MAX_FDS_A_MESSAGE: Final = 200  # SCM_MAX_FD of unix(7) is 253
SEND_TIMEOUT_S: Final = 5.0


class Held:
    """What the manager holds for this service. capacity: how many descriptors it takes."""

    def __init__(self, notifier: Notifier, capacity: int = 0) -> None:
        self.capacity = capacity if notifier.address else 0
        self._notifier = notifier
        self._received: list[tuple[str, int]] = []

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str], notifier: Notifier) -> Held:
        """Take the variables out of the environment, and the descriptors they speak of."""
        count, owner = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
        names = environ.pop("LISTEN_FDNAMES", "").split(":")
        capacity = environ.pop("FDSTORE", "")
        made = cls(notifier, int(capacity) if capacity.isdecimal() else 0)
        if owner == str(os.getpid()) and count.isdecimal():
            for index in range(int(count)):
                os.set_inheritable(FIRST_FD + index, False)
                os.set_blocking(FIRST_FD + index, False)
                name = names[index] if index < len(names) else ""
                made._received.append((name, FIRST_FD + index))
        return made

    def take(self, name: str) -> list[int]:
        """The descriptors received under a name; they are the caller's now."""
        found = [fd for known, fd in self._received if known == name]
        self._received = [(known, fd) for known, fd in self._received if known != name]
        return found

    def keep(self, name: str, fds: list[int]) -> bool:
        """Have the manager hold duplicates. False: it does not answer, nothing is kept."""
        for start in range(0, len(fds), MAX_FDS_A_MESSAGE):
            part = fds[start : start + MAX_FDS_A_MESSAGE]
            if not self._tell(["FDSTORE=1", f"FDNAME={name}"], part):
                return False
        return True

    def drop(self, name: str) -> None:
        """Have the manager close what it holds under a name."""
        if self.capacity:
            self._tell(["FDSTOREREMOVE=1", f"FDNAME={name}"], [])

    def settle(self) -> bool:
        """Wait until the manager has done all that it was told (BARRIER=1). May block."""
        if not self.capacity:
            return False
        read, write = os.pipe()
        try:
            try:
                if not self._tell(["BARRIER=1"], [write]):
                    return False
            finally:
                os.close(write)
            poll = select.poll()
            poll.register(read, select.POLLHUP)
            return bool(poll.poll(int(SEND_TIMEOUT_S * 1000)))
        finally:
            os.close(read)

    def close_unused(self) -> None:
        """What nobody took: an earlier version's, or of a setting that has changed since."""
        for name, fd in self._received:
            _log.warning("a kept descriptor is not used", extra={"descriptor": name})
            os.close(fd)
            self.drop(name)
        self._received.clear()

    def listen(self, name: str, host: str, port: int, *, backlog: int = 128) -> socket.socket:
        """A listening TCP socket, kept over restarts: the one that was received if it listens
        there (port 0: anywhere on host), else a new one. Raises OSError."""
        found: socket.socket | None = None
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for fd in self.take(name):
            kept = socket.socket(fileno=fd)
            there = kept.getsockname()[:2] if kept.family == family else ("", 0)
            if found is None and there[0] == address[0] and port in (0, there[1]):
                found = kept
                continue
            kept.close()
            self.drop(name)
        if found is not None:
            return found
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
            made.listen(backlog)
        except BaseException:
            made.close()
            raise
        if self.capacity:
            self.keep(name, [made.fileno()])
        return made

    def _tell(self, fields: list[str], fds: list[int]) -> bool:
        """One datagram, waiting while the manager's queue is full; False when it is not there."""
        if not self.capacity:
            return False
        address = self._notifier.address
        target = f"\0{address[1:]}" if address.startswith("@") else address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_TIMEOUT_S)
                sender.sendmsg(["\n".join(fields).encode()], rights if fds else [], 0, target)
        except OSError as error:
            _log.warning("the manager keeps nothing", extra={"error": str(error)})
            return False
        return True


def inherit(fds: list[int]) -> None:
    """In a child of ``holder``, before its program: put the descriptors where they belong."""
    base = FIRST_FD + len(fds)
    safe = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, base) for fd in fds]
    for fd in fds:
        os.close(fd)
    for index, fd in enumerate(safe):
        os.dup2(fd, FIRST_FD + index, inheritable=False)
        os.close(fd)
    os.environ["LISTEN_PID"] = str(os.getpid())
