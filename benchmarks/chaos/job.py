"""A job of the campaign: elastic, checkpointing, nearly no CPU; it notices a second self.

python job.py WORK_GPU_S. Time is monotonic: wall clocks jump in a campaign. In its directory it
keeps ``runs`` (kind, epoch, work done at each start, save and end) and ``twice`` if another run of
it was alive. Of a gang over several nodes the first process saves; each minds its own second self.
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
    rank = os.environ.get("INTENTD_NODE_RANK", "0")
    first = rank == "0"
    lock = open(f"lock-{rank}", "w", encoding="ascii")  # noqa: SIM115  until the kernel closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with open("twice", "a", encoding="ascii") as twice:
            twice.write(f"{epoch()}\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    saved = load()
    done = float(saved) if saved else 0.0
    if first:
        note("start", done)
    last = time.monotonic()
    asked = None
    while done < work and asked is None:
        asked = signal.sigtimedwait([signal.SIGTERM], min(SAVE_S, (work - done) / gpus))
        now = time.monotonic()
        done = min(work, done + gpus * (now - last))
        last = now
        if first:
            note("saving", done)
            save(repr(done).encode())
            note("saved", done)
            report(done, work)
    if first and done >= work:
        note("end", done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
