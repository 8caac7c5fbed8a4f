"""The main job of ``make up``: real workloads under 2D, PS and FIFO, in a few minutes.

As root: network namespaces with an HTB bottleneck and daemons of their own beside the suite that
runs; else the loopback, gated but not shaped, and it says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from intentd.testbed import netns
from intentd.testbed.experiments.options import Options
from intentd.testbed.metrics import METRICS
from intentd.testbed.playing import Progress
from intentd.testbed.report import REPORT_FILE, text_table
from intentd.testbed.results import Results, over_seeds
from intentd.testbed.runner import run_experiment, summary
from intentd.testbed.traffic.congestion import congestion_in_use

WORKLOADS: Final = ("data-mining", "web-search", "cache")
POLICIES: Final = ("2d", "ps", "fifo")
# Nine runs, with what starts, drains and is drawn around them, in under five minutes.
DURATION_S: Final = 20.0
ONESHOT_DURATION_S: Final = 8.0
POLICY_SOURCE: Final = (
    "Algorithm 1 on a sample of 10,000 flows of each workload, issued by a controller and enforced "
    "by agents (not learned during the run: see testbed run cluster_reuse)"
)
SHOWN: Final = ("p50", "mean", "p90", "p99", "p995")


async def run(*, root: bool, oneshot: bool, out_dir: Path, progress: Progress) -> dict[str, Any]:
    """Play, print the table on the way through progress, return the summary document.

    root: use namespaces (needs them; falls back to the loopback with a note if they cannot be
    made). oneshot: shorter, for CI. out_dir: made if need be; gets results.json, metrics.csv and
    the HTML report. The document adds to the experiment's summary: "mode" ("namespaces" or
    "loopback"), "shaped", "table" (text), "policy_source".
    """
    why_not = netns.unavailable() if root else "not root"
    options = Options(
        workloads=WORKLOADS,
        policies=POLICIES,
        duration_s=ONESHOT_DURATION_S if oneshot else DURATION_S,
        seeds=1,
        namespaces=not why_not,
    )
    if why_not:
        progress(f"no namespaces ({why_not}): on the loopback, gated and marked but not shaped")
        congestion = congestion_in_use()
        if congestion != "cubic":
            progress(f"cubic is not allowed to this user here: TCP uses {congestion}")
    results = await run_experiment("overall", options, out_dir, progress)
    table = completion_table(results)
    return summary(results, out_dir) | {
        "mode": "loopback" if why_not else "namespaces",
        "shaped": not why_not,
        "why_not_shaped": why_not,
        "policy_source": POLICY_SOURCE,
        "table": f"{table}\nclasses: {POLICY_SOURCE}",
        "report": str((out_dir / REPORT_FILE).resolve()),
    }


def completion_table(results: Results) -> str:
    """FCT of every policy in milliseconds, and how many times 2D's it is."""
    rows: list[list[object]] = []
    for workload, load in results.groups():
        base = over_seeds(results.select(workload, load, "2d"))
        for label in results.labels(workload, load):
            row = over_seeds(results.select(workload, load, label))
            cells: list[object] = []
            for name in SHOWN:
                if name not in row:
                    cells.append("-")
                    continue
                value = 1e3 * row[name][0]
                ratio = row[name][0] / base[name][0] if name in base else 1.0
                cells.append(f"{value:.4g}" if label == "2d" else f"{value:.4g} ({ratio:.3g}x)")
            rows.append([workload, label, *cells])
    names = [name.replace("p995", "p99.5") for name in SHOWN]
    assert set(SHOWN) <= set(METRICS)
    return text_table(["workload", "policy", *(f"{name}, ms" for name in names)], rows)
