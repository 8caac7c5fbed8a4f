"""What a job calls to say how far it is: ``report(done, total)``. Standard library only.

Outside of the scheduler (no ``INTENTD_PROGRESS`` in the environment) every call does nothing. The
scheduler learns the time per step from the reports and predicts the end by it. A report is one
small file, replaced at most every half second, so it may be called after every step; it never
raises because of the disk.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

_EVERY_S = 0.5
_last_s = 0.0


def report(done: float, total: float) -> None:
    """done of total steps are behind us. Raises ValueError unless 0 <= done <= total."""
    global _last_s  # noqa: PLW0603  one job, one process, one file
    if not 0 <= done <= total or total <= 0:
        raise ValueError(f"report: got {done!r} of {total!r}, expected 0 <= done <= total")
    path = os.environ.get("INTENTD_PROGRESS")
    now = time.monotonic()
    if not path or (done < total and now - _last_s < _EVERY_S):
        return
    _last_s = now
    body = {"epoch": epoch(), "done": done, "total": total, "wall_s": time.time()}
    temporary = f"{path}.{os.getpid()}"
    with suppress(OSError):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(body, file)
        os.replace(temporary, path)


def epoch() -> int:
    """The number of this run; name it in checkpoints, so that a run taken for dead cannot
    overwrite those of its successor. 0 outside of the scheduler."""
    return int(os.environ.get("INTENTD_EPOCH", "0"))


def gpus() -> list[int]:
    """Indices of the GPUs this run was given."""
    text = os.environ.get("INTENTD_GPU_INDICES", "")
    return [int(part) for part in text.split(",") if part]
