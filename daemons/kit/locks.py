"""Lock files: one process holds the file, and the file says which."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from intentd.core.errors import IntentdError


class LockHeldError(IntentdError):
    """Another process holds the lock; owner is its number as it wrote it, or ?."""

    def __init__(self, path: Path, owner: str) -> None:
        self.owner = owner
        super().__init__(f"{path} is held by process {owner}")


def hold_lock(path: Path) -> int:
    """The descriptor that holds the lock until it is closed. Raises LockHeldError, OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise LockHeldError(path, owner or "?") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
