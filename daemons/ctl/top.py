"""``intentctl top``: every member and what it does now, again and again, on a plain terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.units import format_duration
from intentd.daemons.ctl.output import ExitCode, JsonOption, print_json, print_table
from intentd.daemons.ctl.status import code_of, gather

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None:
    """Makes the one command below a subcommand."""


def snapshot(run_dir: Path | None) -> dict[str, Any]:
    """One row a daemon of this machine and a member the controller knows."""
    document = gather(run_dir)
    rows = [
        {
            "role": role,
            "name": status["name"],
            "host": status["host"],
            "state": "ready" if status["ready"] else "; ".join(status["reasons"]),
            "doing": doing(role, status["detail"]),
            "policies": status["policies"],
            "lag_p99_s": status["loop_lag_s"]["p99"],
        }
        for role, status in document["daemons"].items()
    ]
    here = {(row["role"], row["name"]) for row in rows}
    rows += [
        {
            "role": member["role"],
            "name": member["name"],
            "host": member["host"],
            "state": "connected"
            if member["connected"]
            else f"gone {format_duration(member['heard_s_ago'])}",
            "doing": "",
            "policies": member["policies"],
            "lag_p99_s": None,
        }
        for member in document["members"]
        if (member["role"], member["name"]) not in here
    ]
    rows += [
        {
            "role": role, "name": "", "host": "", "state": f"unreachable: {why}", "doing": "",
            "policies": {}, "lag_p99_s": None,
        }
        for role, why in document["unreachable"].items()
    ]  # fmt: skip
    return {"wall_s": time.time(), "rows": rows, "code": int(code_of(document))}


def doing(role: str, detail: dict[str, Any]) -> str:
    """What a daemon does now, in a few words, from the role's part of its status."""
    match role:
        case "controller":
            leadership = detail.get("leadership", {}).get("state", "")
            connected = sum(member["connected"] for member in detail.get("members", ()))
            domains = len(detail.get("domains", ()))
            return f"{leadership}, {connected} members, {domains} domains"
        case "agent":
            domains = detail.get("domains", {}).values()
            classes = [row for domain in domains for row in domain["classes"]]
            active = sum(row["active"] for row in classes)
            waiting = sum(row["waiting"] for row in classes)
            return f"{active} flows send, {waiting} wait"
        case "gpu":
            counts = detail.get("jobs", {})
            words = [f"{n} {state}" for state, n in counts.items() if isinstance(n, int) and n]
            return ", ".join(words) or "no jobs"
        case "proxy":
            models = detail.get("models", {})
            calls = sum(model.get("calls", 0) for model in models.values())
            return f"{calls} calls under way, {len(models)} models"
    words = [f"{name} {value}" for name, value in detail.items() if isinstance(value, int)]
    return ", ".join(words[:4])


def _show(found: dict[str, Any], redraw: bool) -> None:
    if redraw:
        print("\x1b[H\x1b[2J", end="")
    print(time.strftime("%H:%M:%S", time.localtime(found["wall_s"])))
    print_table(
        ("daemon", "name", "host", "state", "now", "policies", "lag p99"),
        [
            (
                row["role"],
                row["name"],
                row["host"],
                row["state"],
                row["doing"],
                ", ".join(f"{name} {n}" for name, (_, n) in row["policies"].items()),
                "" if row["lag_p99_s"] is None else format_duration(row["lag_p99_s"]),
            )
            for row in found["rows"]
        ],
    )


@app.command()
def top(
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds.")] = 1.0,
    iterations: Annotated[
        int, typer.Option(min=0, help="Stop after so many; 0: go on until Ctrl-C.")
    ] = 0,
    run_dir: Annotated[Path | None, typer.Option(help="Directory of the admin sockets.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show all members and what they do now, live; --json prints one snapshot."""
    if as_json:
        found = snapshot(run_dir)
        print_json(found)
        raise typer.Exit(int(found["code"]))
    shown = 0
    try:
        while True:
            found = snapshot(run_dir)
            _show(found, redraw=sys.stdout.isatty())
            sys.stdout.flush()
            shown += 1
            if iterations and shown >= iterations:
                raise typer.Exit(int(found["code"]))
            time.sleep(interval_s)
    except KeyboardInterrupt:
        raise typer.Exit(int(ExitCode.OK)) from None
