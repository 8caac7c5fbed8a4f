"""Reading what a job printed while it prints: pieces by offsets that stay true over rotations."""

from __future__ import annotations

import codecs
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from intentd.daemons.gpu.hands import open_own
from intentd.daemons.gpu.supervisor import older

LOOKS: Final = 5  # a file is rotated at most every half of what is kept: once in a look is rare
LONGEST_CHARACTER: Final = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """A piece of an output. at: bytes of the output before it; end: bytes written so far."""

    data: bytes
    at: int
    end: int


def read_output(path: Path, offset: int, limit: int) -> Kept:
    """From offset on (negative: from the end), or from the first byte kept after it.

    At most limit bytes, or the longest character's. Begins with a whole character where it does not
    begin at the offset asked for.
    """
    look = 1
    while True:
        with contextlib.ExitStack() as opened:
            parts, whole = _parts(path, opened)
            if whole or look == LOOKS:
                return _piece(parts, offset, max(limit, LONGEST_CHARACTER))
        look += 1  # rotated meanwhile


def _parts(path: Path, opened: contextlib.ExitStack) -> tuple[list[tuple[int, int, int]], bool]:
    """(offset, bytes, descriptor) of each file, oldest first, and whether they fit together."""
    live = _open(path, opened)
    parts: list[tuple[int, int, int]] = []
    with contextlib.suppress(OSError):
        for start, name in older(path)[-2:]:
            descriptor = _open(name, opened)
            if descriptor is not None:
                parts.append((start, os.fstat(descriptor).st_size, descriptor))
    if live is None:
        return parts, not path.exists()
    found = os.fstat(live)
    try:
        same = path.lstat().st_ino == found.st_ino
    except OSError:
        same = False
    start = parts[-1][0] + parts[-1][1] if parts else 0
    return [*parts, (start, found.st_size, live)], same


def _open(path: Path, opened: contextlib.ExitStack) -> int | None:
    try:
        descriptor = open_own(path)
    except OSError:  # not there, or not a file of the job's owner
        return None
    opened.callback(os.close, descriptor)
    return descriptor


def _piece(parts: list[tuple[int, int, int]], offset: int, limit: int) -> Kept:
    if not parts:
        return Kept(b"", 0, 0)
    end = parts[-1][0] + parts[-1][1]
    at = min(max(end + offset if offset < 0 else offset, parts[0][0]), end)
    data = b""
    for start, size, descriptor in parts:
        here = at + len(data)
        if start <= here < start + size and len(data) < limit:
            data += os.pread(descriptor, limit - len(data), here - start)
    if at != offset and at > 0:
        lead = next(
            (i for i, byte in enumerate(data[:LONGEST_CHARACTER]) if byte & 0xC0 != 0x80), 0
        )
        return Kept(data[lead:], at + lead, end)
    return Kept(data, at, end)


def decode(data: bytes, *, final: bool) -> tuple[str, int]:
    """The text, and how many bytes it stands for: a character cut short at the end is left for the
    next piece unless this is the last. What is no UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, final)
    return text, len(data) - len(decoder.getstate()[0])
