"""A restart that no application notices: connections and flows go from one agent to the next.

At an orderly stop the agent, where the service manager holds descriptors, does not drain: it reads
no more, tells applications PAUSE, and leaves the listening socket, the connections and a memory
file with their flows to the manager. The next agent takes the sending flows' places, queues the
waiting ones in their old order, and goes on. What applications say meanwhile waits in the kernel.

What does not come along: turns of classes ordered across hosts (waiting flows take new ones), and
the records of flows that have ended. An agent that is killed hands nothing over: its applications
see the end of their connection and go on without it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
from typing import Any, Final

from intentd.agent import app_protocol as wire
from intentd.agent.app_socket import Application, AppSocket, Detached
from intentd.agent.domain import SENDING, WAITING, Domain, FlowRecord
from intentd.agent.shell import GateShell
from intentd.daemons.kit.held import Held

log = logging.getLogger(__name__)

LISTENER: Final = "app"
CONNECTION: Final = "app-connection"
STATE: Final = "app-state"
VERSION: Final = 1
PAUSE_MS: Final = 20_000  # how long applications wait for the next agent's answers
MAX_STATE_BYTES: Final = 64 << 20
_KEPT: Final = (
    "ahead", "arrived", "class_index", "degraded", "flow", "hint", "outcome", "peer",
    "previous_end_ns", "queues", "released", "request", "sent_bytes", "size", "started_ns",
)  # fmt: skip


async def hand_over(held: Held, app_socket: AppSocket, shell: GateShell) -> int:
    """Leave listener, connections and flows to the manager; how many connections it has.

    Nothing may be called on the socket but ``close`` then.
    """
    listeners, left = app_socket.detach()
    pause = wire.encode_pause(PAUSE_MS)
    rows = [_row(one, _told(one, pause)) for one in left]
    document = {"version": VERSION, "next_flow": shell.next_flow, "connections": rows}
    data = json.dumps(document).encode()
    connections = [one.fd for one in left]
    kept = await asyncio.to_thread(_give, held, data, connections, listeners)
    flows = sum(len(row["flows"]) for row in rows)
    log.info("handed over", extra={"connections": len(left), "flows": flows, "kept": kept})
    return len(left) if kept else 0


def _give(held: Held, data: bytes, connections: list[int], listeners: list[int]) -> bool:
    """May block while the manager is busy."""
    state = os.memfd_create("intentd-flows", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(state), "wb") as file:
            file.write(data)
        return (
            held.keep(STATE, [state])
            and held.keep(CONNECTION, connections)
            and held.keep(LISTENER, listeners)
            and held.settle()
        )
    finally:
        os.close(state)


def listener(held: Held) -> socket.socket | None:
    """The application socket of the agent before."""
    found = [socket.socket(fileno=fd) for fd in held.take(LISTENER)]
    for more in found[1:]:
        more.close()
    return found[0] if found else None


def take_over(held: Held, app_socket: AppSocket, shell: GateShell) -> int:
    """Go on with what the agent before has left; how many flows that is.

    The manager then forgets it: the end of a connection has to be seen by its application.
    """
    states, fds = held.take(STATE), held.take(CONNECTION)
    if not states and not fds:
        held.drop(LISTENER)
        return 0
    document = _read(states)
    known = {row["inode"]: row for row in document.get("connections", [])}
    flows: list[FlowRecord] = []
    for fd in fds:
        row = known.get(os.fstat(fd).st_ino)
        if row is None:
            os.close(fd)  # of a version whose state is not understood: they go on without us
            continue
        backlog = [base64.b64decode(packet) for packet in row["backlog"]]
        application = app_socket.adopt(socket.socket(fileno=fd), row["name"], backlog)
        if application is not None:
            if application.name:
                shell.welcome(application)
            flows += [_record(plain, application, shell.domains) for plain in row["flows"]]
    shell.restore(flows, int(document.get("next_flow", 1)))
    for name in (STATE, CONNECTION, LISTENER):
        held.drop(name)
    log.info("taken over", extra={"connections": len(fds), "flows": len(flows)})
    return len(flows)


def _told(one: Detached, pause: bytes) -> tuple[bytes, ...]:
    """What the application has still to be sent. One that introduced itself is told to wait."""
    if not one.application.name:
        return one.backlog
    if not one.backlog:
        try:
            with socket.socket(fileno=os.dup(one.fd)) as sock:
                sock.send(pause)
        except BlockingIOError:
            return (pause,)
        except OSError:  # it has gone: the next agent will see
            return ()
        return ()
    return (*one.backlog, pause)


def _row(one: Detached, backlog: tuple[bytes, ...]) -> dict[str, Any]:
    return {
        "inode": os.fstat(one.fd).st_ino,
        "name": one.application.name,
        "backlog": [base64.b64encode(packet).decode() for packet in backlog],
        "flows": [_plain(record) for record in one.application.flows.values()],
    }


def _plain(record: FlowRecord) -> dict[str, Any]:
    plain = {name: getattr(record, name) for name in _KEPT}
    plain["domain"] = record.domain.name if record.domain is not None else ""
    return plain


def _record(
    plain: dict[str, Any], application: Application, domains: dict[str, Domain]
) -> FlowRecord:
    message = wire.Open(
        plain["request"], plain["size"], peer=plain["peer"], class_hint=plain["hint"]
    )
    domain = domains.get(plain["domain"])
    record = FlowRecord(plain["flow"], application, message, domain)
    for name in _KEPT:
        setattr(record, name, plain[name])
    record.queues = tuple(plain["queues"])
    assert record.outcome in (WAITING, SENDING), record.outcome
    return record


def _read(states: list[int]) -> dict[str, Any]:
    """The document of the agent before; empty if it is not understood."""
    document: dict[str, Any] = {}
    for fd in states:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            data = file.read(MAX_STATE_BYTES)
        try:
            found = json.loads(data)
            if found["version"] == VERSION:
                document = found
            else:
                log.error("flows of another version", extra={"version": found["version"]})
        except (ValueError, KeyError, TypeError):
            log.error("flows that were left cannot be read")
    return document
