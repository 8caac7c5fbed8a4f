"""The job of the Ray benchmarks: elastic, checkpointing, nearly no CPU; it notices a second self.

python ray_job.py WORK_GPU_S [--speeds 0,1,1.8,...] [--every SECONDS]

It does as many GPU seconds of work a second as it was given GPUs (or as the speeds say). In its
directory it keeps ``runs``, a line at each start, checkpoint and end (kind, epoch, wall clock, work
done, GPUs), and ``twice`` if another run of it was alive.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

from intentd.daemons.gpu.client.checkpoint import load, save
from intentd.daemons.gpu.client.progress import epoch, report

TICK_S = 0.5


def note(kind: str, done: float, gpus: int) -> None:
    with open("runs", "a", encoding="ascii") as file:
        file.write(f"{kind} {epoch()} {time.time():.6f} {done:.6f} {gpus}\n")


def option(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main() -> int:
    began = time.time()
    work, every_s = float(sys.argv[1]), float(option("--every", "2"))
    gpus, rank = int(os.environ["INTENTD_GPUS"]), os.environ.get("INTENTD_NODE_RANK", "0")
    speeds = [float(x) for x in option("--speeds", "").split(",") if x]
    speed = speeds[min(gpus, len(speeds) - 1)] if speeds else float(gpus)
    lock = open(f"lock-{rank}", "w", encoding="ascii")  # noqa: SIM115  until the kernel closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        note_twice = open("twice", "a", encoding="ascii")  # noqa: SIM115
        note_twice.write(f"{epoch()} {rank} {time.time()}\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    saved = load()
    done = float(saved) if saved else 0.0
    first = rank == "0"
    if first:
        note("start", done, gpus)
    last, saved_at = began, began
    while done < work:
        left_s = (work - done) / speed
        asked = signal.sigtimedwait([signal.SIGTERM], min(TICK_S, left_s))
        now = time.time()
        done = min(work, done + speed * (now - last))
        last = now
        if first and (asked is not None or now - saved_at >= every_s):
            note("saving", done, gpus)
            save(repr(done).encode())
            saved_at = now
            note("saved", done, gpus)
        if asked is not None:
            if first:
                note("stop", done, gpus)
            return 0
        if first:
            report(done, work)
    if first:
        note("saving", work, gpus)
        save(repr(work).encode())
        report(work, work)
        note("end", work, gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
