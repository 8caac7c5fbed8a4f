"""What an idle suite costs: memory (PSS) and processor of each daemon of ``intentctl up``.

    python -m benchmarks.idle [--seconds 20] [--json]

PSS is the process's fair share of shared pages, /proc/PID/smaps_rollup; processor time comes from
/proc/PID/schedstat in nanoseconds, so that a short run says something.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from intentd.daemons.ctl.daemon import DAEMONS
from intentd.daemons.ctl.supervisor import Layout, Supervisor
from intentd.daemons.ctl.up import ROLES

SETTLE_S = 10.0  # imports, first policies and the first reports are over
BARS = {"controller": 120e6, "sequencer": 60e6, "agent": 60e6}


def pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no Pss line")


def busy_s(pid: int) -> float:
    """Processor seconds of all threads so far."""
    paths = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in paths) / 1e9


async def measure(seconds: float, layout: Layout, log: IO[str]) -> dict[str, Any]:
    supervisor = Supervisor(layout, ROLES, DAEMONS, log)
    running = asyncio.ensure_future(supervisor.run())
    try:
        await supervisor.ready(60.0)
        print(f"settling for {SETTLE_S:.0f} s", file=sys.stderr)
        await asyncio.sleep(SETTLE_S)
        pids = supervisor.processes()
        before = {role: busy_s(pid) for role, pid in pids.items()}
        print(f"measuring for {seconds:.0f} s", file=sys.stderr)
        await asyncio.sleep(seconds)
        return {
            role: {
                "pss_bytes": pss_bytes(pid),
                "bar_bytes": BARS[role],
                "cpu_share": (busy_s(pid) - before[role]) / seconds,
            }
            for role, pid in pids.items()
        }
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await supervisor.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--port-base", type=int, default=20400)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="intentd-idle-") as directory:
        layout = Layout(Path(directory, "run"), Path(directory, "state"), None, arguments.port_base)
        with Path(directory, "log").open("w") as log:
            result = asyncio.run(measure(arguments.seconds, layout, log))
    if arguments.json:
        print(json.dumps({"seconds": arguments.seconds, "daemons": result}))
        return
    for role, row in result.items():
        print(f"{role:<11} {row['pss_bytes'] / 1e6:6.1f} MB PSS  {100 * row['cpu_share']:6.3f} %")


if __name__ == "__main__":
    main()
