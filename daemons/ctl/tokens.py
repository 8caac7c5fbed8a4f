"""``intentctl tokens``: API tokens of a daemon's HTTP endpoint and of the console."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from intentd.core.units import parse_duration_s
from intentd.daemons.ctl.output import JsonOption, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(
    help="API tokens: make, list, revoke.", no_args_is_help=True, add_completion=False
)

DaemonOption = Annotated[
    str, typer.Option("--daemon", help="Whose: controller, sequencer, agent, gpu or proxy.")
]
NameArgument = Annotated[str, typer.Argument(help="Name of the token.")]


@app.command()
def new(
    name: NameArgument,
    role: Annotated[str, typer.Option(help="read, operate or admin.")] = "read",
    expires: Annotated[str, typer.Option(help="After so long, such as 30d; empty: never.")] = "",
    daemon: DaemonOption = "controller",
    as_json: JsonOption = False,
) -> None:
    """Make a token; its secret is shown once and kept nowhere."""
    args: dict[str, Any] = {"name": name, "role": role}
    if expires:
        args["expires_wall_s"] = time.time() + parse_duration_s(expires, "--expires")
    answer = admin_client(daemon).call("tokens.new", **args)
    if as_json:
        print_json(answer)
        return
    print(answer["secret"])


@app.command("list")
def list_tokens(daemon: DaemonOption = "controller", as_json: JsonOption = False) -> None:
    """Tokens by name and role; those of the configuration too."""
    answer = admin_client(daemon).call("tokens")
    if as_json:
        print_json(answer)
        return
    print_table(
        ("name", "role", "made", "expires"),
        [
            (
                row["name"],
                row["role"],
                "configuration" if row["configured"] else _day(row["created_wall_s"]),
                "never" if row["expires_wall_s"] is None else _day(row["expires_wall_s"]),
            )
            for row in answer["tokens"]
        ],
    )


@app.command()
def revoke(
    name: NameArgument, daemon: DaemonOption = "controller", as_json: JsonOption = False
) -> None:
    """Refuse a token from now on, and end the console sessions it opened."""
    answer = admin_client(daemon).call("tokens.revoke", name=name)
    print_json(answer) if as_json else print(f"revoked {answer['token']['name']}")


def _day(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(wall_s))
