"""One agent a device: a claim that the kernel gives up by itself when its holder dies.

The record of what was found (``state``) keeps two agents of one state directory apart; this keeps
apart any two of one network namespace, whose verifications and restorations would else undo each
other's trees. A claim is a listening abstract Unix socket: such names belong to the network
namespace (unix(7), network_namespaces(7)), and so do devices and their indexes.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from intentd.agent.tc.state import AgentAliveError

_CREDENTIALS: Final = struct.Struct("=iII")  # SO_PEERCRED: pid, uid, gid


class Claims:
    """What this process holds. Call from the thread that lives in the devices' namespace."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], tuple[int, socket.socket]] = {}

    def take(self, ifindex: int, device: str, direction: str) -> None:
        """Hold a device's direction; idempotent. Raises AgentAliveError naming who has it."""
        held = self._held.get((device, direction))
        if held is not None and held[0] == ifindex:
            return
        self.drop(device, direction)  # a device that came again under the name of one that went
        name = f"\0intentd/tc/{ifindex}/{direction}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(name)
            sock.listen(1)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
            pid, uid = _holder(name)
            # Abstract names have no permissions: a user who may not shape cannot keep us from it.
            if pid != os.getpid() and uid in (0, os.geteuid()):
                raise AgentAliveError(
                    f"device {device!r}: another agent shapes its {direction} (pid {pid})"
                ) from None
            return
        self._held[device, direction] = ifindex, sock

    def drop(self, device: str, direction: str) -> None:
        held = self._held.pop((device, direction), None)
        if held is not None:
            held[1].close()

    def drop_all(self) -> None:
        for device, direction in list(self._held):
            self.drop(device, direction)


def _holder(name: str) -> tuple[int, int]:
    """Process and user id of who listens on a name; (0, -1) if nobody does any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(name)
        except BlockingIOError:  # its queue of askers is full: it lives
            return 0, 0
        except OSError:
            return 0, -1
        raw = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid
