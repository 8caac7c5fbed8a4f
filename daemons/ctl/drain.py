"""``intentctl drain``: a member takes no new work, and says what is left of the old."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer

from intentd.core.errors import InputError
from intentd.daemons.ctl.output import ExitCode, JsonOption, message, print_json
from intentd.daemons.ctl.reach import TIMEOUT_S, admin_client

app = typer.Typer(add_completion=False)

MEMBERS: Final = ("agent", "proxy")
NODE_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.2


@app.command()
def drain(
    member: Annotated[str, typer.Argument(help="agent, proxy, or gpu/NODE")],
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0,
            max=3600,
            help="Longest wait in seconds for what runs; it stays drained after that. "
            "Default: the daemon's drain_timeout_s; for a node 60.",
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take new work again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a member out of service, and wait until nothing of its work is left.

    Exit status 0: nothing is left (or it is in service again); 4: something still runs, and is
    named. The member stays out of service until --undo or its next start.
    """
    role, _, node = member.partition("/")
    if role == "gpu" and node:
        document = _drain_node(node, undo, NODE_TIMEOUT_S if timeout_s is None else timeout_s)
    elif member in MEMBERS:
        args: dict[str, Any] = {"undo": undo}
        if timeout_s is not None:
            args["timeout_s"] = timeout_s
        client = admin_client(member, timeout_s=_patience_s(member, timeout_s, undo))
        document = {"member": member, **client.call("drain", **args)}
    else:
        raise InputError("member", member, "agent, proxy, or gpu/NODE (intentctl jobs nodes)")
    if as_json:
        print_json(document)
    else:
        print(f"{member}: {document['state']}")
    if document["left"]:
        what = ", ".join(f"{count} {kind}" for kind, count in document["left"].items())
        message(f"intentctl: {member}: left: {what}")
        raise typer.Exit(int(ExitCode.DEGRADED))


def _patience_s(role: str, timeout_s: float | None, undo: bool) -> float:
    """How long the daemon's answer may take: its own bound, and a margin."""
    if undo:
        return TIMEOUT_S + 20.0
    if timeout_s is None:
        timeout_s = float(admin_client(role).call("config")["drain_timeout_s"])
    return timeout_s + TIMEOUT_S


def _drain_node(name: str, undo: bool, timeout_s: float) -> dict[str, Any]:
    client = admin_client("gpu")
    nodes = client.call("jobs.drain", node=name, undo=undo)["nodes"]
    deadline = time.monotonic() + timeout_s
    while True:
        used = next(row["used_gpus"] for row in nodes if row["name"] == name)
        if undo:
            return {"member": f"gpu/{name}", "state": "serving", "left": {}}
        if not used or time.monotonic() >= deadline:
            state = "draining" if used else "drained"
            left = {"GPUs in use": used} if used else {}
            return {"member": f"gpu/{name}", "state": state, "left": left}
        time.sleep(POLL_S)
        nodes = client.call("jobs.nodes")["nodes"]
