"""``intentctl status``: every member, live, from the controller and the local admin sockets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.units import format_duration
from intentd.daemons.ctl.output import ExitCode, JsonOption, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_sockets
from intentd.daemons.ctl.reach import run_dir as usual_run_dir
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None:
    """Makes the one command below a subcommand."""


def gather(run_dir: Path | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
    """``{"daemons": {role: status}, "unreachable": {role: why}, "members": [...]}``."""
    daemons: dict[str, Any] = {}
    unreachable: dict[str, str] = {}
    for role, path in admin_sockets(run_dir or usual_run_dir()).items():
        try:
            daemons[role] = AdminClient(path, timeout_s).call("status")
        except (AdminUnreachableError, AdminRefusedError) as error:
            unreachable[role] = str(error)
    members = daemons.get("controller", {}).get("detail", {}).get("members", [])
    return {"daemons": daemons, "unreachable": unreachable, "members": members}


def code_of(document: dict[str, Any]) -> ExitCode:
    """3 when nothing answers, 4 when something is down, not ready or cut off, else 0."""
    if not document["daemons"]:
        return ExitCode.UNREACHABLE
    unready = any(not status["ready"] for status in document["daemons"].values())
    apart = any(
        status["controller"] is not None
        and not status["controller"]["connected"]
        and _leads(status) is not False
        for status in document["daemons"].values()
    )
    gone = any(not member["connected"] for member in document["members"])
    refused = any(member["refused"] for member in document["members"])
    if unready or apart or gone or refused or document["unreachable"]:
        return ExitCode.DEGRADED
    return ExitCode.OK


def _leads(status: dict[str, Any]) -> bool | None:
    """Whether a controller leads, or stands by; None for other daemons."""
    leadership = status.get("detail", {}).get("leadership")
    return None if leadership is None else leadership["state"] == "leading"


def render(document: dict[str, Any]) -> None:
    """Two tables: the daemons of this machine, and the members the controller knows."""
    rows = [
        (
            role,
            status["name"],
            "ready" if status["ready"] else "; ".join(status["reasons"]),
            format_duration(status["uptime_s"]),
            _numbers(status["policies"]),
            _link(status["controller"]),
            format_duration(status["loop_lag_s"]["p99"]),
            status["status_address"],
        )
        for role, status in document["daemons"].items()
    ]
    rows += [
        (role, "", f"unreachable: {why}", *[""] * 5)
        for role, why in document["unreachable"].items()
    ]
    print_table(
        ("daemon", "name", "state", "up", "policies", "controller", "lag p99", "status at"), rows
    )
    controller = document["daemons"].get("controller", {"detail": {}})
    leadership = controller["detail"].get("leadership", {})
    if leadership.get("others") or leadership.get("state") not in (None, "leading"):
        print()
        print_table(
            ("controller", "host", "state", "since", "seen", "reason"),
            _pair(leadership, controller),
        )
    if document["members"]:
        print()
        print_table(
            ("member", "name", "host", "state", "heard", "policies", "refused"),
            [
                (
                    member["role"],
                    member["name"],
                    member["host"],
                    "connected" if member["connected"] else "gone",
                    format_duration(member["heard_s_ago"]) + " ago",
                    _numbers(member["policies"]),
                    "; ".join(item["reason"] for item in member["refused"].values()),
                )
                for member in document["members"]
            ],
        )


def _numbers(policies: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {era}.{number}" for name, (era, number) in policies.items()) or "-"


def _pair(leadership: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each controller of one database, as the one here tells it."""
    own = (
        mine["name"],
        mine["host"],
        leadership["state"],
        format_duration(leadership["since_s"]),
        "now",
        leadership["reason"],
    )
    return [own] + [
        (
            row["name"],
            row["host"],
            row["state"],
            format_duration(row["since_s"]),
            format_duration(row["seen_s_ago"]) + " ago",
            "",
        )
        for row in leadership["others"]
    ]


def _link(controller: dict[str, Any] | None) -> str:
    if controller is None:
        return "-"
    since = format_duration(controller["since_s"])
    if controller["connected"]:
        return f"connected {since}"
    return f"away {since}" + (f": {why}" if (why := controller["last_error"]) else "")


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show again until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds.")] = 1.0,
    run_dir: Annotated[Path | None, typer.Option(help="Directory of the admin sockets.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show all daemons and members; exits 4 if anything is degraded, 3 if none runs."""
    show = print_json if as_json else _show
    if watch:
        _watch(lambda: gather(run_dir), show, interval_s, redraw=not as_json)
    document = gather(run_dir)
    show(document)
    if as_json and not document["daemons"]:
        message(f"intentctl: no daemon answers in {run_dir or usual_run_dir()}")
    raise typer.Exit(int(code_of(document)))


def _show(document: dict[str, Any]) -> None:
    if document["daemons"] or document["unreachable"]:
        render(document)
    else:
        where = usual_run_dir()
        message(f"intentctl: no daemon runs here, none in {where} (intentctl up starts the suite)")


def _watch(
    read: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    interval_s: float,
    *,
    redraw: bool,
) -> None:
    """Show again until interrupted; with --json one document a line."""
    try:
        while True:
            document = read()
            if redraw:
                print("\x1b[H\x1b[2J", end="")
            show(document)
            sys.stdout.flush()
            time.sleep(interval_s)
    except KeyboardInterrupt:
        raise typer.Exit(int(ExitCode.OK)) from None
