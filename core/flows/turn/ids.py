"""Which ids of a class are over: a floor and bit maps above it, bounded.

Bit i of a map is id floor + 1 + i. Python's integers make the maps: union, shift and count are
single operations at C speed, and the memory is that of the widest gap, at most SPAN ids (8 KB).
"""

from __future__ import annotations

from typing import Final

SPAN: Final = 65536  # ids above the floor that are kept track of


class Progress:
    """What is known to be over in one class and epoch. Knowledge only grows.

    done: over for certain. lease: declared over because the holder's lease ran out. announced:
    passed on early, still sending. The three are disjoint; an id may move from the latter two to
    done, never back.
    """

    __slots__ = ("announced", "done", "floor", "lease")

    def __init__(self, floor: int = 0) -> None:
        self.floor = floor
        self.done = 0
        self.lease = 0
        self.announced = 0

    def finish(self, first: int, count: int) -> bool:
        """first .. first + count - 1 are over. False when they lie beyond SPAN: not kept."""
        mask = self._mask(first, count)
        if mask is None:
            return False
        if mask:
            self._settle(mask)
        return True

    def finish_mask(self, base: int, mask: int) -> None:
        """Like finish for the ids base + 1 + i of the set bits i; base may lie below the floor."""
        shift = base - self.floor
        mask = mask << shift if shift >= 0 else mask >> -shift
        if mask:
            self._settle(mask & ((1 << SPAN) - 1))

    def announce(self, first: int, count: int) -> bool:
        """They passed their turn on and still send."""
        mask = self._mask(first, count)
        if mask is None:
            return False
        self.announced |= mask & ~(self.done | self.lease)
        return True

    def expire_mask(self, base: int, mask: int) -> None:
        """Declared over: their holder's lease ran out."""
        shift = base - self.floor
        mask = mask << shift if shift >= 0 else mask >> -shift
        mask &= ((1 << SPAN) - 1) & ~self.done
        self.lease |= mask
        self.announced &= ~mask

    def raise_floor(self, floor: int) -> None:
        """Every id up to floor is over."""
        gained = floor - self.floor
        if gained > 0:
            self.floor = floor
            self.done >>= gained
            self.lease >>= gained
            self.announced >>= gained
            self._normalise()

    def merge(self, floor: int, done: int, lease: int, announced: int) -> None:
        """What somebody else knew, perhaps some time ago."""
        self.raise_floor(floor)
        shift = self.floor - floor
        done, lease, announced = done >> shift, lease >> shift, announced >> shift
        if done:
            self._settle(done)
            shift = self.floor - floor - shift
            lease, announced = lease >> shift, announced >> shift
        self.lease |= lease & ~self.done
        self.announced = (self.announced | announced) & ~(self.done | self.lease)

    def before(self, first: int) -> tuple[int, int, int]:
        """Of the ids below first: how many are not over, over by lease, announced."""
        below = first - 1 - self.floor
        if below <= 0:
            return 0, 0, 0
        mask = (1 << below) - 1
        lease = (self.lease & mask).bit_count()
        announced = (self.announced & mask).bit_count()
        return below - (self.done & mask).bit_count() - lease - announced, lease, announced

    def _mask(self, first: int, count: int) -> int | None:
        start = first - 1 - self.floor
        end = start + count
        if end > SPAN:
            return None
        if start < 0:
            return (1 << end) - 1 if end > 0 else 0
        return ((1 << count) - 1) << start

    def _settle(self, mask: int) -> None:
        self.done |= mask
        self.lease &= ~mask
        self.announced &= ~mask
        self._normalise()

    def _normalise(self) -> None:
        if self.done & 1:
            gained = (~self.done & (self.done + 1)).bit_length() - 1
            self.floor += gained
            self.done >>= gained
            self.lease >>= gained
            self.announced >>= gained
