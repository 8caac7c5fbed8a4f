"""Which congestion control the testbed's connections use.

Every experiment sets cubic, so that figures of machines with other defaults compare. A user who is
not root may only set what net.ipv4.tcp_allowed_congestion_control lists; then the host's own stays.
"""

from __future__ import annotations

import contextlib
import socket


def set_congestion(sock: socket.socket, name: str) -> str:
    """Ask for an algorithm ("" for the host's own); the name of the one the socket now uses."""
    if name:
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    used = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return used.rstrip(b"\0").decode()


def congestion_in_use(name: str = "cubic") -> str:
    """What connections that ask for ``name`` get on this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return set_congestion(sock, name)
