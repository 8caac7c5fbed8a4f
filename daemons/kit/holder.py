"""The service manager's part of the descriptor store, for where systemd does not run.

``intentctl up`` holds what its daemons hand over, as systemd does for units with
``FileDescriptorStoreMax=``: FDSTORE, FDSTOREREMOVE and BARRIER of sd_notify(3) come in on a
datagram socket, and a new process gets the descriptors as sd_listen_fds(3) says.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

MAX_MESSAGE: Final = 4096
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class FdHolder:
    """Holds descriptors for one service. path: the notification socket it listens on."""

    def __init__(
        self,
        path: Path,
        *,
        capacity: int = 8192,
        on_notice: Callable[[dict[str, str]], None] = lambda notice: None,
    ) -> None:
        """on_notice: hears every message, as a map. Raises OSError."""
        self.path = path
        self.capacity = capacity
        self._on_notice = on_notice
        self._held: list[tuple[str, int]] = []
        path.unlink(missing_ok=True)
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        before = os.umask(0o177)
        try:
            self.socket.bind(str(path))
        except BaseException:
            self.socket.close()
            raise
        finally:
            os.umask(before)

    @property
    def fds(self) -> list[int]:
        """For the child: subprocess's pass_fds, and ``held.inherit`` in it."""
        return [fd for _, fd in self._held]

    def names(self) -> list[str]:
        return [name for name, _ in self._held]

    def environment(self) -> dict[str, str]:
        """What a child finds in its environment; ``held.inherit`` adds LISTEN_PID."""
        return {
            "NOTIFY_SOCKET": str(self.path),
            "FDSTORE": str(self.capacity),
            "LISTEN_FDS": str(len(self._held)),
            "LISTEN_FDNAMES": ":".join(self.names()),
        }

    def receive(self) -> None:
        """Serve what has come; call when ``socket`` is readable."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(
                    MAX_MESSAGE, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            fds = array.array("i")
            for level, kind, raw in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
            notice = dict(
                line.partition("=")[::2] for line in data.decode(errors="replace").split("\n")
            )
            self._serve(notice, list(fds))
            self._on_notice(notice)

    def close(self) -> None:
        """Close what is held: connections end, waiting peers are refused."""
        self.socket.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        for _, fd in self._held:
            os.close(fd)
        self._held.clear()

    def _serve(self, notice: dict[str, str], fds: list[int]) -> None:
        name = notice.get("FDNAME", "stored")
        if notice.get("FDSTOREREMOVE") == "1":
            for known, fd in self._held:
                if known == name:
                    os.close(fd)
            self._held = [(known, fd) for known, fd in self._held if known != name]
        keep = notice.get("FDSTORE") == "1"
        for fd in fds:
            if keep and len(self._held) < self.capacity:
                self._held.append((name, fd))
            else:
                os.close(fd)  # also a BARRIER's: that is the answer
