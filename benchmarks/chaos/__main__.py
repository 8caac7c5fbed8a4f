"""A campaign of faults against the whole suite, under load from all three systems.

    python -m benchmarks.chaos --faults 500 --seed 1 --out results/chaos --json

Real daemons in network namespaces (root only): controller, sequencer, two agents, the GPU
scheduler, two proxies on one PostgreSQL; flows, jobs and prompts all the while. Faults come in an
order that the seed gives. Exit status 1 when something did not hold; the report says after which
fault, ``--only`` plays it again alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.chaos.campaign import Campaign, Options
from benchmarks.chaos.faults import KINDS, kinds_here
from benchmarks.chaos.members import ended_in_order
from benchmarks.chaos.report import write
from benchmarks.local_postgres import why_not
from intentd.testbed import netns


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="N..M", help="these faults of the seed")
    parser.add_argument(
        "--kinds", default="", help=f"comma separated, of: {', '.join(KINDS)}; default: all"
    )
    parser.add_argument("--ray", action="store_true", help="a second scheduler, over a local Ray")
    parser.add_argument("--minutes", type=float, default=0.0, help="no fault begins after so long")
    parser.add_argument(
        "--recover-s", type=float, default=60.0, help="bound on a member's way back"
    )
    parser.add_argument("--out", type=Path, help="directory of the report and the logs")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def numbers(text: str, faults: int) -> list[int]:
    """Raises ValueError."""
    if not text:
        return list(range(faults))
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def main() -> int:
    given = arguments()
    kinds = [kind for kind in given.kinds.split(",") if kind] or kinds_here(ray=given.ray)
    if unknown := sorted(set(kinds) - set(KINDS)):
        print(f"--kinds: got {unknown[0]!r}, expected of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    if reason := netns.unavailable() or why_not():
        print(reason, file=sys.stderr)
        return 2
    out = given.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    played = numbers(given.only, given.faults)
    options = Options(
        given.seed,
        played,
        kinds,
        out / "logs",
        minutes=given.minutes,
        recover_s=given.recover_s,
        ray=given.ray,
    )
    campaign = Campaign(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(ended_in_order(campaign.run(), campaign.enough))
    write(report, out)
    print(json.dumps(report) if given.json else (out / "report.md").read_text())
    print(f"report and logs: {out}", file=sys.stderr)
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
