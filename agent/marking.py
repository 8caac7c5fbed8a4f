"""Put an application's socket into its class: SO_PRIORITY for the qdisc here, DSCP for the others.

The order matters: setting IP_TOS resets SO_PRIORITY to what the kernel derives from the TOS
(ip(7)), so the priority goes last. Without CAP_NET_ADMIN the kernel refuses priorities above 6;
the DSCP is set all the same.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import InputError

FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
# (type, protocol): what an agent takes from applications
KINDS: Final = (
    (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
)
ECN_MASK: Final = 0x3
UNPRIVILEGED: Final = (errno.EPERM, errno.EACCES)


@dataclass(frozen=True, slots=True)
class Marked:
    """Which marks the kernel took. priority is False where it asks for CAP_NET_ADMIN."""

    priority: bool
    dscp: bool = True


def check_socket(sock: socket.socket) -> None:
    """Accept TCP and UDP over IPv4 and IPv6. Raises InputError.

    The kernel is asked, not the object: the socket came from another process.
    """
    family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    if family not in FAMILIES:
        raise InputError("socket.family", _name("AF_", family), "AF_INET or AF_INET6")
    kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    if (kind, protocol) not in KINDS:
        got = f"{_name('SOCK_', kind)} {_name('IPPROTO_', protocol)}"
        raise InputError("socket.protocol", got, "TCP or UDP")


def mark(sock: socket.socket, *, priority: int, dscp: int) -> Marked:
    """Mark a checked socket; 0 takes a mark off. Safe to repeat: only what differs is set.

    priority: of tc.Shaper.priority_of, 0 where nothing is shaped. dscp: 0 to 63; the ECN bits are
    left as they are. On an IPv6 socket the IPv4 TOS is set too, for peers with mapped addresses.
    Raises OSError for anything but missing privilege.
    """
    family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    _mark_dscp(sock, socket.IPPROTO_IP, socket.IP_TOS, dscp)
    if family == socket.AF_INET6:
        _mark_dscp(sock, socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == priority:
        return Marked(priority=True)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
    except OSError as error:
        if error.errno not in UNPRIVILEGED:
            raise
        return Marked(priority=False)
    return Marked(priority=True)


def _mark_dscp(sock: socket.socket, level: int, option: int, dscp: int) -> None:
    before = sock.getsockopt(level, option)
    # IPV6_TCLASS reads as -1 (the default) where it never was set
    value = dscp << 2 | max(before, 0) & ECN_MASK
    if value != before and not (before < 0 and value == 0):
        sock.setsockopt(level, option, value)


def _name(prefix: str, number: int) -> str:
    names = {
        value: name
        for name, value in vars(socket).items()
        if name.startswith(prefix) and isinstance(value, int)
    }
    return names.get(number, f"{prefix}{number}")
