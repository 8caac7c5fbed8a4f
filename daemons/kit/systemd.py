"""The service manager's notification protocol (sd_notify(3)), without libsystemd.

READY, RELOADING with MONOTONIC_USEC, STOPPING, STATUS and WATCHDOG go as datagrams to
$NOTIFY_SOCKET, which may be a path or an abstract name (``@name``).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)


class Notifier:
    """Speaks to the service manager; does nothing where there is none."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self.address = address
        self.watchdog_s = watchdog_s
        self._socket: socket.socket | None = None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Take the variables out of the environment: children must not speak for the daemon."""
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        owner = environ.pop("WATCHDOG_PID", "")
        watchdog_s = int(interval) / 1e6 if interval.isdecimal() else 0.0
        if owner and owner != str(os.getpid()):
            watchdog_s = 0.0
        return cls(address, watchdog_s)

    def send(self, *fields: str) -> None:
        """Send ``NAME=value`` lines as one datagram; a manager that is gone is not our failure."""
        if not self.address:
            return
        target = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            if self._socket is None:
                self._socket = socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                )
            self._socket.sendto("\n".join(fields).encode(), target)
        except OSError as error:
            _log.debug("sd_notify failed", extra={"address": self.address, "error": str(error)})

    def ready(self, text: str = "") -> None:
        self.send("READY=1", f"STATUS={_one_line(text)}", f"MAINPID={os.getpid()}")

    def reloading(self) -> None:
        """Type=notify-reload compares MONOTONIC_USEC with its own clock: CLOCK_MONOTONIC."""
        stamp_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send("RELOADING=1", f"MONOTONIC_USEC={stamp_us}")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def status(self, text: str) -> None:
        self.send(f"STATUS={_one_line(text)}")

    def watchdog(self) -> None:
        self.send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _one_line(text: str) -> str:
    return text.replace("\n", " ")
