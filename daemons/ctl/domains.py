"""intentctl domains: the link domains, what is learned about them, who shapes them."""

from __future__ import annotations

import typer

from intentd.core.units import format_duration, format_rate
from intentd.daemons.ctl.output import JsonOption, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(help="Link domains and what the controller learned about them.")


@app.callback(invoke_without_command=True)
def domains(as_json: JsonOption = False) -> None:
    """Every link domain the controller knows."""
    page = admin_client("controller").call("domains")
    if as_json:
        print_json(page)
        return
    print_table(
        (
            "domain", "rate", "policy", "classes", "load", "learning", "flows", "last change",
            "agents",
        ),
        [
            (
                row["domain"],
                format_rate(row["rate_bps"]),
                row["policy"] + (" (pinned)" if row["pinned"] else ""),
                row["classes"],
                "?" if row["load"] is None else f"{100 * row['load']:.0f} %",
                row["learning"],
                f"{row['window_flows']} of {row['observed_flows']}",
                "-"
                if row["last_change"] is None
                else format_duration(row["last_change"]["ago_s"]) + " ago",
                ", ".join(
                    f"{name}: {agent['shaping'] or '?'}" for name, agent in row["agents"].items()
                ),
            )
            for row in page["domains"]
        ],
    )  # fmt: skip
