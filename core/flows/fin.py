"""The FIN datagram: "these ids of mine are over", broadcast to agents and sequencer.

Layout, network byte order: magic ``2F``, version, number of runs, sender, boot, counter, epoch,
domain (64 bits each), the runs (class, announced, count, first id), and a keyed BLAKE2s MAC of 16
bytes over all of it. The key is the sender's own, derived from the domain key and its id; so a
datagram speaks for its sender alone, for one process (boot), once (counter) and in one epoch.
Whether the sender holds the ids it finishes is for the receiver to check: the sequencer knows the
holder of every id, a member knows its own (docs/adr/turn-protocol.md has the argument).
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from dataclasses import dataclass
from struct import Struct
from typing import Final

from intentd.core.errors import WireError
from intentd.core.flows.policy import MAX_CLASSES
from intentd.core.flows.turn.wire import MAX_ID, Run, name_id

MAGIC: Final = b"2F"
VERSION: Final = 1
MAC_BYTES: Final = 16
KEY_BYTES: Final = 32
MAX_RUNS: Final = 64
MAX_RUN_IDS: Final = 65535
WINDOW: Final = 1024  # counters of a sender that may arrive out of order
MAX_SENDERS: Final = 4096  # (sender, boot) pairs remembered

_HEAD: Final = Struct("!2sBBQQQQQ")
_RUN: Final = Struct("!BBHQ")
MIN_BYTES: Final = _HEAD.size + _RUN.size + MAC_BYTES
MAX_BYTES: Final = _HEAD.size + MAX_RUNS * _RUN.size + MAC_BYTES


@dataclass(frozen=True, slots=True)
class Fin:
    """Ids of one domain and epoch that are over, or announced, at their holder."""

    domain_id: int
    epoch: int
    sender: int
    boot: int
    counter: int
    runs: tuple[Run, ...]


def sender_key(domain_key: bytes, sender: int) -> bytes:
    """The key of one sender. From it neither the domain key nor another's key can be derived."""
    if len(domain_key) != KEY_BYTES:
        raise ValueError(f"FIN key: got {len(domain_key)} bytes, expected {KEY_BYTES}")
    return hashlib.blake2s(
        sender.to_bytes(8, "big"), key=domain_key, digest_size=KEY_BYTES, person=b"2dfin-v1"
    ).digest()


def _mac(key: bytes, body: bytes) -> bytes:
    return hashlib.blake2s(body, key=key, digest_size=MAC_BYTES).digest()


def decode(datagram: bytes) -> Fin:
    """The contents, without checking the MAC. Raises WireError for anything else."""
    size = len(datagram)
    if not MIN_BYTES <= size <= MAX_BYTES:
        raise WireError(f"FIN: got {size} bytes, expected {MIN_BYTES} to {MAX_BYTES}")
    magic, version, count, sender, boot, counter, epoch, domain_id = _HEAD.unpack_from(datagram)
    if magic != MAGIC:
        raise WireError("FIN: wrong magic")
    if version != VERSION:
        raise WireError(f"FIN version: got {version}, expected {VERSION}")
    if not 1 <= count <= MAX_RUNS or size != _HEAD.size + count * _RUN.size + MAC_BYTES:
        raise WireError(f"FIN: {count} runs do not fit {size} bytes")
    runs = []
    for class_index, announced, length, first in _RUN.iter_unpack(
        datagram[_HEAD.size : size - MAC_BYTES]
    ):
        if class_index >= MAX_CLASSES or announced > 1 or length < 1:
            raise WireError("FIN run: class, announced or count out of range")
        if not 1 <= first <= MAX_ID - length:
            raise WireError(f"FIN run: got first id {first}, expected 1 to {MAX_ID}")
        runs.append(Run(class_index, first, length, bool(announced)))
    return Fin(domain_id, epoch, sender, boot, counter, tuple(runs))


class FinSigner:
    """Makes the FINs of one process. The counter grows by one a datagram.

    key: the sender's own key (``sender_key``); name: the member's name; boot: random, 64 bits.
    """

    def __init__(self, key: bytes, name: str, boot: int) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"FIN key: got {len(key)} bytes, expected {KEY_BYTES}")
        self.sender = name_id(name)
        self.boot = boot
        self._key = key
        self._counter = 0

    def set_domain_key(self, domain_key: bytes) -> None:
        """Sign with a key derived from this one from now on; the counter goes on."""
        self._key = sender_key(domain_key, self.sender)

    @classmethod
    def from_domain_key(cls, domain_key: bytes, name: str, boot: int) -> FinSigner:
        return cls(sender_key(domain_key, name_id(name)), name, boot)

    def sign(self, domain_id: int, epoch: int, runs: tuple[Run, ...]) -> bytes:
        """One datagram. runs: 1 to MAX_RUNS."""
        if not 1 <= len(runs) <= MAX_RUNS:
            raise ValueError(f"FIN runs: got {len(runs)}, expected 1 to {MAX_RUNS}")
        self._counter += 1
        body = b"".join(
            (
                _HEAD.pack(
                    MAGIC,
                    VERSION,
                    len(runs),
                    self.sender,
                    self.boot,
                    self._counter,
                    epoch,
                    domain_id,
                ),
                *(_RUN.pack(run.class_index, run.announced, run.count, run.first) for run in runs),
            )
        )
        return body + _mac(self._key, body)


class FinVerifier:
    """Lets through what a holder of the domain key's derived keys sent, each datagram once.

    While a key is rotated there are several domain keys (``set_domain_keys``), each as good.

    Bounded: MAX_SENDERS (sender, boot) pairs, the longest unheard forgotten first; an entry is
    made only by a datagram whose MAC holds. ``dropped`` counts refusals by reason.
    """

    def __init__(self, domain_key: bytes, *, max_senders: int = MAX_SENDERS) -> None:
        self._domain_keys: tuple[bytes, ...] = ()
        self._max = max_senders
        # (sender, boot) -> [key last used, highest counter, bits of those seen below it]
        self._windows: OrderedDict[tuple[int, int], tuple[bytes, int, int]] = OrderedDict()
        self.accepted = 0
        self.dropped: dict[str, int] = {"malformed": 0, "forged": 0, "replayed": 0, "late": 0}
        self.set_domain_keys((domain_key,))

    def set_domain_keys(self, domain_keys: tuple[bytes, ...]) -> None:
        """Accept what any of these signed, nothing else. Counters seen stay seen."""
        for domain_key in domain_keys:
            sender_key(domain_key, 0)  # refuses a key of the wrong length
        self._domain_keys = domain_keys
        for at, (_, highest, seen) in self._windows.items():
            self._windows[at] = (b"", highest, seen)

    def _signing_key(self, datagram: bytes, sender: int, known: bytes) -> bytes:
        """The sender's key that the MAC was made with; empty if it was none of them."""
        body, mac = datagram[:-MAC_BYTES], datagram[-MAC_BYTES:]
        if known and hmac.compare_digest(_mac(known, body), mac):
            return known
        for domain_key in self._domain_keys:
            key = sender_key(domain_key, sender)
            if key != known and hmac.compare_digest(_mac(key, body), mac):
                return key
        return b""

    def __len__(self) -> int:
        return len(self._windows)

    def accept(self, datagram: bytes) -> Fin | None:
        """The FIN, or None (counted) if it is malformed, forged, replayed or too late."""
        try:
            fin = decode(datagram)
        except WireError:
            self.dropped["malformed"] += 1
            return None
        at = (fin.sender, fin.boot)
        window = self._windows.get(at)
        key = self._signing_key(datagram, fin.sender, window[0] if window else b"")
        if not key:
            self.dropped["forged"] += 1
            return None
        if window is None:
            if len(self._windows) >= self._max:
                self._windows.popitem(last=False)
            self._windows[at] = (key, fin.counter, 1)
            self.accepted += 1
            return fin
        _, highest, seen = window
        ahead = fin.counter - highest
        if ahead > 0:
            seen = ((seen << ahead) | 1) & ((1 << WINDOW) - 1) if ahead < WINDOW else 1
            highest = fin.counter
        elif ahead <= -WINDOW:
            self.dropped["late"] += 1
            return None
        elif seen >> -ahead & 1:
            self.dropped["replayed"] += 1
            return None
        else:
            seen |= 1 << -ahead
        self._windows[at] = (key, highest, seen)
        self._windows.move_to_end(at)
        self.accepted += 1
        return fin
