"""A job of the campaign: elastic, checkpointing, nearly no CPU; it notices a second self.

python job.py WORK_GPU_S. Time is monotonic: wall clocks jump in a campaign. In its directory it
keeps ``runs`` (kind, epoch, work done at each start, save and end) and ``twice`` if another run of
it was alive.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

from intentd.daemons.gpu.client.checkpoint import load, save
from intentd.daemons.gpu.client.progress import epoch, report

SAVE_S = 1.0


def note(kind: str, done: float) -> None:
    with open("runs", "a", encoding="ascii") as file:
        file.write(f"{kind} {epoch()} {done:.6f}\n")


def main() -> int:
    work, gpus = float(sys.argv[1]), int(os.environ["INTENTD_GPUS"])
    lock = open("lock", "w", encoding="ascii")  # noqa: SIM115  until the kernel closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with open("twice", "a", encoding="ascii") as twice:
            twice.write(f"{epoch()}\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    saved = load()
    done = float(saved) if saved else 0.0
    note("start", done)
    last = time.monotonic()
    asked = None
    while done < work and asked is None:
        asked = signal.sigtimedwait([signal.SIGTERM], min(SAVE_S, (work - done) / gpus))
        now = time.monotonic()
        done = min(work, done + gpus * (now - last))
        last = now
        note("saving", done)
        save(repr(done).encode())
        note("saved", done)
        report(done, work)
    if done >= work:
        note("end", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
