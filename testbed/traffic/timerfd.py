"""A timer with microseconds: the loop's own timers have a millisecond, a small flow takes less."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_CLOCK_MONOTONIC: Final = 1
_TFD_TIMER_ABSTIME: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("it_interval", _TimeSpec), ("it_value", _TimeSpec))


class TimerFd:
    """timerfd_create(2) on the clock of ``time.monotonic``; readable when it has expired.

    ``os.timerfd_create`` exists from Python 3.13 on.
    """

    def __init__(self) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self.fd = int(_libc.timerfd_create(_CLOCK_MONOTONIC, flags))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def arm(self, when_s: float) -> None:
        """Expire once at when_s; a time that has passed expires at once."""
        whole = int(when_s)
        nanos = max(1, int((when_s - whole) * 1e9))
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(whole, nanos))
        if _libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Take the expiry, so that the descriptor is no longer readable."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self.fd)
