"""The report of a campaign: ``report.json`` whole, ``report.md`` to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(report: dict[str, Any], where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    (where / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (where / "report.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    load, violations = report["load"], report["violations"]
    flows, jobs = load["flows"], load["jobs"]
    kinds = [
        (
            name, row["faults"], row["beside_another"], _number(row["recovered_p50_s"]),
            _number(row["recovered_max_s"]), row["never"],
        )
        for name, row in report["kinds"].items()
    ]  # fmt: skip
    parts = [
        f"# Fault campaign, seed {report['seed']}\n",
        f"{report['faults']} faults in {report['seconds'] / 60:.1f} minutes, "
        f"{len(violations)} violations.\n",
        _table(("fault", "times", "with another", "whole p50 s", "max s", "never"), kinds),
        "## Load\n",
        f"- flows: {flows['arrived']} arrived, {flows['finished']} finished, "
        f"{flows['died_with_their_application']} died with their application; longest wait "
        f"{flows['longest_wait_s']} s, longest flow {flows['longest_s']} s; starts "
        f"{flows['started']}",
        f"- jobs: {jobs['accepted']} accepted, {jobs['runs_beyond_the_first']} runs beyond the "
        f"first, {jobs['not_accepted']} not accepted",
        f"- prompts: {load['prompts']} in {load['conversations']} conversations and "
        f"{load['keys']} keys",
        f"- policies: {load['policies']}",
        f"- starts: {report['starts']}\n",
        "## Violations\n",
    ]
    if not violations:
        parts.append("None.")
    again = f" --kinds '{','.join(report['drawn_from'])}'" + (" --ray" if report["ray"] else "")
    for violation in violations:
        last = violation["after"]
        parts.append(
            f"- **{violation['what']}**, after fault {last}: {violation['text']}\n"
            f"  again: `python -m benchmarks.chaos{again} --seed {report['seed']} "
            f"--only {max(0, last - 1)}..{max(0, last)}`"
        )
    return "\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
