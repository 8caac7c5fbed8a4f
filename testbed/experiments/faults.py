"""kill -9 of each daemon in turn under load, again and again.

What has to hold: every flow completes, qdiscs are as they were found, members rejoin by themselves.
The killed daemon is started again as systemd would.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from intentd.testbed.experiments.global_order import ordered_globally
from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.playing import PlayError, Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import Check, Results, Table, machine_facts
from intentd.testbed.suite import Member
from intentd.testbed.traffic.trace import poisson

WORKLOAD: Final = "cache"
LOAD: Final = 0.5
CLIENTS: Final = 2
KILLS: Final = 50
# Time a kill and its recovery take on average; the trace lasts a little longer than all of them.
SECONDS_A_KILL: Final = 4.0
RESTORE_WITHIN_S: Final = 10.0
REJOIN_WITHIN_S: Final = 15.0
PAUSE_S: Final = 0.3
_LOOK_S: Final = 0.05


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    """options.rounds: how many kills in all, each daemon in turn."""
    kills = options.rounds or KILLS
    name = options.workloads[0] if options.workloads else WORKLOAD
    load = options.loads[0] if options.loads else LOAD
    duration_s = options.duration_s or kills * SECONDS_A_KILL
    source = scaled_workload(name, options.scale)
    seed = options.first_seed
    results = Results(
        "faults",
        f"kill -9, {kills} times",
        "Two client hosts with global order and one server. Controller, sequencer and agents are "
        "killed in turn while flows go on, and started again as systemd would.",
        options=options.to_plain()
        | {"workload": name, "load": load, "kills": kills, "duration_s": duration_s},
        machine=machine_facts(),
    )
    setup = replace(options.setup(), clients=CLIENTS)
    trace = poisson(
        source,
        load=load,
        rate_bps=options.rate_bps,
        duration_s=duration_s,
        seed=seed,
        hosts=CLIENTS,
    )
    policy = ordered_globally(
        policy_for("2d", [source], domain=DOMAIN, rate_bps=options.rate_bps, load=load)
    )
    policy = replace(policy, max_wait_s=10.0)
    async with Lab(setup, directory, progress) as lab:
        found = await lab.qdiscs()
        playing = asyncio.create_task(
            lab.run(Scenario("2d, killed", source.name, load, seed, trace, policy, simulate=False)),
            name="play",
        )
        try:
            await lab.until_playing(playing)
            rows = await _kill_all(lab, kills, progress, playing)
            run = await playing
        finally:
            playing.cancel()
        assert lab.suite is not None
        await lab.suite.stop_all()
        left = await lab.qdiscs()
    results.runs.append(run)
    _conclude(results, rows, restored_at_end=left == lab.before and found != left)
    return results


async def _kill_all(
    lab: Lab, kills: int, progress: Progress, playing: asyncio.Task[Any]
) -> list[dict[str, Any]]:
    """One row a kill. Ends early when the flows are through."""
    suite = lab.suite
    assert suite is not None
    order = [*suite.agents(), suite.member("sequencer"), suite.member("controller")]
    rows: list[dict[str, Any]] = []
    for number in range(kills):
        member = order[number % len(order)]
        progress(f"kill {number + 1}/{kills}: {member.role} {member.name}")
        rows.append(await _kill_one(lab, member) | {"under_load": not playing.done()})
        await asyncio.sleep(PAUSE_S)
    return rows


async def _kill_one(lab: Lab, member: Member) -> dict[str, Any]:
    suite = lab.suite
    assert suite is not None
    row: dict[str, Any] = {"role": member.role, "name": member.name, "restored_s": math.nan}
    began = time.monotonic()
    await suite.kill(member)
    if member.role == "agent" and member.host in lab.servers:
        row["restored_s"] = await _as_found(lab, member)
    else:
        await asyncio.sleep(PAUSE_S)
    started = time.monotonic()
    try:
        await suite.restart(member)
        await suite.all_joined(REJOIN_WITHIN_S)
        row["rejoined_s"] = time.monotonic() - started
    except PlayError as error:
        row["rejoined_s"] = math.inf
        row["error"] = str(error)[:500]
    row["took_s"] = time.monotonic() - began
    return row


async def _as_found(lab: Lab, member: Member) -> float:
    """Seconds until the killed agent's device has the qdisc it was found with; inf if never."""
    began = time.monotonic()
    while time.monotonic() - began < RESTORE_WITHIN_S:
        if (await lab.qdiscs())[member.name] == lab.before[member.name]:
            return time.monotonic() - began
        await asyncio.sleep(_LOOK_S)
    return math.inf


def _conclude(results: Results, rows: list[dict[str, Any]], *, restored_at_end: bool) -> None:
    restored = [row["restored_s"] for row in rows if not math.isnan(row["restored_s"])]
    run = results.runs[0]
    failed = sum(math.isinf(row["rejoined_s"]) for row in rows)
    unrestored = sum(math.isinf(value) for value in restored) + (not restored_at_end)
    results.checks = [
        Check("kills under load", sum(row["under_load"] for row in rows), ">=", len(rows)),
        Check("flows that never finished", run.stalled, "<=", 0),
        Check("devices whose qdisc was not as found", unrestored, "<=", 0),
        Check("kills after which a member did not rejoin", failed, "<=", 0),
    ]
    by_role: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_role.setdefault(f"{row['role']} {row['name']}", []).append(row)
    results.tables = [
        Table(
            "Kills",
            ["daemon", "kills", "mean s to rejoin", "longest", "mean s to restore the qdisc"],
            [
                [
                    name,
                    len(group),
                    math.fsum(row["rejoined_s"] for row in group) / len(group),
                    max(row["rejoined_s"] for row in group),
                    math.fsum(row["restored_s"] for row in group) / len(group),
                ]
                for name, group in by_role.items()
            ],
        ),
        Table(
            "Starts outside the order, by reason",
            ["reason", "flows"],
            [[reason, count] for reason, count in run.degraded.items()],
        ),
    ]
    errors = [row["error"] for row in rows if "error" in row]
    results.notes += errors[:5]
