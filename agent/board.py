"""The board: a page of memory where applications read which classes are free.

A flow whose class is free would be granted at once. Instead of waiting for two processes to wake
up to say so, its application reads the board, starts, and tells the agent (OPEN with STARTED). On a
flow of a few packets the question costs more than the flow: .4 ms of .7 (measured:
``intentctl testbed run overall``).

Two applications may see the same class free. So whoever starts claims it first, by a lock on the
flag's bytes that the kernel gives to one open file at a time and takes from who dies, then looks
again, and lets go when the agent has answered. The agent, before a flow that asked starts, shows
the class taken and then looks for a claim (``take``): whichever of the two comes second sees the
other.

Applications get it as a descriptor of an open file of their own with WELCOME. It is sealed: nobody
else can write it, shrink it or map it writable. The layout, in the host's byte order, is in
``docs/wire.md``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Final

from intentd.agent import app_protocol as wire
from intentd.agent.domain import Domain
from intentd.core.flows.policy import MAX_CLASSES, MAX_DOMAINS

_HEAD: Final = struct.Struct("=IIQIIII")
_DOMAIN: Final = struct.Struct("=64sQIIII")
_CLASS: Final = struct.Struct("=QIHH")
_HEAD_BYTES: Final = 64
_DOMAIN_BYTES: Final = _DOMAIN.size + MAX_CLASSES * _CLASS.size
BOARD_BYTES: Final = _HEAD_BYTES + MAX_DOMAINS * _DOMAIN_BYTES
_GENERATION: Final = 1  # where it is, in words of 64 bits
_STATE: Final = 5  # in words of 32 bits
_FREE: Final = (_CLASS.size - 2) // 2  # in words of 16 bits from a class's start
_LOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_NO_LIMIT: Final = 2**64 - 1
_UINT32_MAX: Final = 2**32 - 1
_NO_DOMAIN: Final = _UINT32_MAX
_SEAL_FUTURE_WRITE: Final = 0x10  # linux/fcntl.h, Linux 5.1; the module fcntl lacks the name


class Board:
    """The agent's side: the only writer. Life: construct, ``close``; both once.

    Raises OSError where the kernel has no sealed memory files; the agent then goes without.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("intentd-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, BOARD_BYTES)
            self._map = mmap.mmap(self.fd, BOARD_BYTES)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        view = memoryview(self._map)
        self._words = view.cast("H")
        self._state = view.cast("I")
        self._generations = view.cast("Q")
        self._at: dict[str, int] = {}  # domain -> where its first class's flag is, 16-bit words
        _HEAD.pack_into(self._map, 0, wire.BOARD_MAGIC, wire.BOARD_VERSION, 0, 0, 0, _NO_DOMAIN, 0)

    def publish(self, domains: Iterable[Domain], default: str, routed: bool) -> None:
        """Write everything anew: domains, classes and marks. While it lasts the number is odd."""
        self._generations[_GENERATION] += 1
        self._at.clear()
        chosen = list(domains)[:MAX_DOMAINS]
        default_index = _NO_DOMAIN
        for index, domain in enumerate(chosen):
            if domain.name == default:
                default_index = index
            self._write(domain, _HEAD_BYTES + index * _DOMAIN_BYTES)
        self._state[4:8] = memoryview(
            struct.pack("=IIII", len(chosen), 1, default_index, routed)
        ).cast("I")
        self._generations[_GENERATION] += 1

    def _write(self, domain: Domain, start: int) -> None:
        classes = domain.policy.classes
        _DOMAIN.pack_into(
            self._map,
            start,
            domain.name.encode(),
            domain.rate_bps,
            domain.early_fin_bytes,
            domain.grant_flags,
            len(classes),
            min(domain.policy.local_below_bytes, _UINT32_MAX),
        )
        free = domain.gate.admits()
        for index, cls in enumerate(classes):
            limit = cls.threshold_bytes
            priority, dscp = domain.mark_of(index)
            _CLASS.pack_into(
                self._map,
                start + _DOMAIN.size + index * _CLASS.size,
                _NO_LIMIT if limit >= _NO_LIMIT else int(limit),
                priority,
                dscp,
                free[index],
            )
        self._at[domain.name] = (start + _DOMAIN.size) // 2 + _FREE

    def descriptor(self) -> int:
        """The board as an open file of its own, for one application; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)

    def take(self, domain: Domain, class_index: int) -> bool:
        """A flow that asked is to have the class: True if an application has claimed it already,
        because it was shown free; its OPEN is on the way."""
        at = self._at.get(domain.name)
        if at is None:
            return False
        at += class_index * (_CLASS.size // 2)
        if not self._words[at]:
            return False
        self._words[at] = 0  # before looking: who claims it from now on will see
        return self._locked(at)

    def claimed(self, domain: Domain, class_index: int) -> bool:
        at = self._at.get(domain.name)
        return at is not None and self._locked(at + class_index * (_CLASS.size // 2))

    def _locked(self, word: int) -> bool:
        asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 2 * word, 2, 0)
        try:
            found = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, asked)
        except OSError:  # then nobody has got such a lock either
            return False
        return bool(_LOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def show(self, domain: Domain) -> None:
        """After a call of the domain's gate: which classes are free now."""
        at = self._at.get(domain.name)
        if at is None:
            return
        words = self._words
        for free in domain.gate.admits():
            if words[at] != free:
                words[at] = free
            at += _CLASS.size // 2

    def withdraw(self) -> None:
        """The agent stops: nobody starts by the board any more."""
        self._generations[_GENERATION] += 1
        self._state[_STATE] = 0
        self._generations[_GENERATION] += 1

    def close(self) -> None:
        """Applications keep their mapping; it says that nobody is there."""
        self.withdraw()
        for view in (self._words, self._state, self._generations):
            view.release()
        self._map.close()
        os.close(self.fd)
