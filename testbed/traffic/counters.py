"""Reads the byte counters of a device's tc classes by one netlink dump (rtnetlink(7), tc(8)).

A dump of eight classes costs about 50 us, so the server samples the bottleneck every few
milliseconds beside its traffic; starting ``tc`` would cost a hundred times that.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_RTM_NEWTCLASS: Final = 40
_RTM_GETTCLASS: Final = 42
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST_DUMP: Final = 0x301
_TCA_STATS2: Final = 7
_TCA_STATS_BASIC: Final = 1
_TCA_STATS_QUEUE: Final = 3
_TC_H_ROOT: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("=IHHII")
_TCMSG: Final = struct.Struct("=BxxxiIII")
_ATTR: Final = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class ClassCounter:
    """handle, parent: (major << 16) | minor; a class right under the qdisc has 0xffffffff."""

    handle: int
    parent: int
    sent_bytes: int
    backlog_bytes: int


class ClassCounters:
    """A netlink socket in the caller's namespace. Raises OSError if the device is not there."""

    def __init__(self, device: str) -> None:
        self._index = socket.if_nametoindex(device)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.bind((0, 0))
        self._socket.settimeout(1.0)
        self._sequence = 0

    def read(self) -> list[ClassCounter]:
        """All classes of the device. Raises OSError."""
        self._sequence += 1
        body = _TCMSG.pack(socket.AF_UNSPEC, self._index, 0, 0, 0)
        self._socket.send(
            _HEADER.pack(
                _HEADER.size + len(body), _RTM_GETTCLASS, _NLM_F_REQUEST_DUMP, self._sequence, 0
            )
            + body
        )
        found: list[ClassCounter] = []
        while True:
            data = self._socket.recv(1 << 16)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
                if kind == _NLMSG_DONE and sequence == self._sequence:
                    return found
                if kind == _NLMSG_ERROR:
                    code = struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                    raise OSError(-code, "tc class dump refused")
                if kind == _RTM_NEWTCLASS and sequence == self._sequence:
                    found.append(_class(data[offset + _HEADER.size : offset + length]))
                offset += (length + 3) & ~3

    def sent_bytes(self) -> int:
        """What the device's top classes have sent since they were made."""
        return sum(cls.sent_bytes for cls in self.read() if cls.parent == _TC_H_ROOT)

    def close(self) -> None:
        self._socket.close()


def _class(message: bytes) -> ClassCounter:
    _, _, handle, parent, _ = _TCMSG.unpack_from(message)
    sent = backlog = 0
    for kind, value in _attributes(message[_TCMSG.size :]):
        if kind == _TCA_STATS2:
            for inner, numbers in _attributes(value):
                if inner == _TCA_STATS_BASIC:
                    sent = struct.unpack_from("=Q", numbers)[0]
                elif inner == _TCA_STATS_QUEUE:
                    backlog = struct.unpack_from("=II", numbers)[1]
    return ClassCounter(handle, parent, sent, backlog)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTR.size <= len(data):
        length, kind = _ATTR.unpack_from(data, offset)
        if length < _ATTR.size:
            return
        yield kind & 0x3FFF, data[offset + _ATTR.size : offset + length]
        offset += (length + 3) & ~3
