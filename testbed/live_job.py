"""An elastic job for the live load: it sleeps, says how far it is, and goes on where it was.

    python -m intentd.testbed.live_job WORK_S

Twice as fast on two GPUs, as it tells the scheduler it is.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Final

from intentd.daemons.gpu.client.checkpoint import load, save
from intentd.daemons.gpu.client.progress import gpus, report

STEP_S: Final = 0.5


def main() -> int:
    work_s = float(sys.argv[1])
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    done_s = float(load() or b"0")
    while done_s < work_s and not ended:
        time.sleep(STEP_S)
        done_s = min(work_s, done_s + STEP_S * max(1, len(gpus())))
        report(done_s, work_s)
    save(str(done_s).encode())
    return 0 if done_s >= work_s else 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
