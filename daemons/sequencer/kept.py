"""Turns that outlive the process: what a sequencer leaves at an orderly stop, taken up once.

One file beside the epoch's. It is written whole when nothing is answered any more, and before the
next process answers anything it is replaced by one without turns: after a crash there is none, and
a higher epoch begins. What stays in it is how long leases run that agents were promised for the
pause, so that a higher epoch waits for their end.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings
from intentd.daemons.kit.files import write_atomically

_log = logging.getLogger(__name__)

VERSION: Final = 1
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")  # the clock's: it starts with the machine


@dataclass(frozen=True, slots=True)
class Taken:
    """core: goes on where the process before ended, if it can. promised_until: on this clock."""

    core: SequencerCore | None
    promised_until: float


def leave(path: Path, core: SequencerCore, pause_s: float) -> bool:
    """Write down what the next process needs. False: it begins a new epoch, and nobody may be
    promised a pause."""
    kept = core.keep()
    if kept is None:
        return False
    until = core.promised_until()
    try:
        _write(path, kept, None if until == -math.inf else until, pause_s)
    except OSError as error:
        _log.warning("turns are not kept", extra={"reason": error.strerror})
        return False
    return True


def take(path: Path, settings: SequencerSettings, epoch: int, now: float) -> Taken:
    """What the process before left, once: the file no longer has it when this returns. epoch: the
    last one served, by the epoch's own file. Raises OSError when that cannot be made durable."""
    try:
        document = json.loads(path.read_bytes())
        same_clock = document["clock"] == _clock()
        until, pause_s, kept = document["until"], float(document["pause_s"]), document["turns"]
        version = document["version"]
    except FileNotFoundError:
        return Taken(None, -math.inf)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.error("turns that were left cannot be read", extra={"reason": str(error)})
        return Taken(None, -math.inf)
    if until is None:
        promised = -math.inf
    else:
        promised = until if same_clock else now + pause_s
    if kept is None:
        return Taken(None, promised)
    _write(path, None, until, pause_s)
    core, why = None, ""
    try:
        if version != VERSION:
            why = f"written by another version ({version})"
        elif not same_clock:
            why = "the machine was started anew"
        elif kept["epoch"] != epoch:
            why = f"of epoch {kept['epoch']}, and {epoch} was served last"
        else:
            core = SequencerCore.resume(settings, kept)
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)
    if core is None:
        _log.warning("turns that were left are not taken up", extra={"reason": why})
    return Taken(core, promised)


def _write(path: Path, turns: dict[str, Any] | None, until: float | None, pause_s: float) -> None:
    document = {
        "version": VERSION, "clock": _clock(), "until": until, "pause_s": pause_s, "turns": turns,
    }  # fmt: skip
    write_atomically(path, json.dumps(document).encode())


def _clock() -> str:
    return BOOT_ID.read_text().strip()
