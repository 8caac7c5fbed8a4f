"""Keeps the processors of a virtual machine awake while fractions of a millisecond are measured.

A virtual processor without work is given back to its host, and getting it again takes from tens to
hundreds of microseconds, at every one of a flow's six wake-ups. A spinner of class SCHED_IDLE on
each processor gives way to anything else (sched(7)) and stands for the kernel's ``idle=poll``.
Measured, web search, 2D through real agents: mean 1.071 times the simulator's without, 1.038 with.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Ends with its parent, however that ends.
_SPIN: Final = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass\n"


def is_virtual() -> bool:
    """Whether the processor says that a hypervisor runs it (x86)."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "hypervisor" in words


@contextlib.contextmanager
def processors_awake(*, wanted: bool = True) -> Iterator[list[int]]:
    """One spinner a processor on virtual machines; else none. Yields their process ids."""
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        if wanted and is_virtual():
            for cpu in sorted(os.sched_getaffinity(0)):
                spinner = subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN])
                spinners.append(spinner)
                os.sched_setscheduler(spinner.pid, os.SCHED_IDLE, os.sched_param(0))
                os.sched_setaffinity(spinner.pid, {cpu})
        yield [spinner.pid for spinner in spinners]
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
