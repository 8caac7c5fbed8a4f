"""The epoch of a sequencer: larger than any it served before, durable before it is used."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from intentd.core.errors import IntentdError
from intentd.daemons.kit.files import write_atomically

_log = logging.getLogger(__name__)

_MAX_EPOCH = 2**62


class EpochError(IntentdError):
    """The epoch cannot be kept, so that ids could repeat: the sequencer does not start."""


@dataclass(frozen=True, slots=True)
class Epochs:
    """previous: the epoch served before, 0 if unknown; current: the new one, already on disk."""

    previous: int
    current: int


def next_epoch(path: Path, wall_s: float) -> Epochs:
    """Write and return the next epoch. Raises EpochError if it cannot be made durable.

    It is at least the seconds of the wall clock, so that ids do not come back even after the file
    was lost; with the file, it grows whatever the clock says.
    """
    previous = read_epoch(path)
    current = max(previous + 1, int(wall_s), 1)
    try:
        write_atomically(path, f"{current}\n".encode())
    except OSError as error:
        raise EpochError(
            f"epoch file {path}: {error.strerror}; expected a state directory that can be written"
        ) from None
    return Epochs(previous, current)


def read_epoch(path: Path) -> int:
    """The last epoch served, 0 if unknown. Raises EpochError."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return 0
    except (OSError, UnicodeDecodeError) as error:
        raise EpochError(f"epoch file {path}: {error}; expected a readable file") from None
    if not text.isdecimal() or not 0 < int(text) < _MAX_EPOCH:
        _log.error("epoch file is damaged: start from the clock", extra={"path": str(path)})
        return 0
    return int(text)
