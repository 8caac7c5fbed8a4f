"""``intentctl tc``: what shaping would do, what the kernel holds, and how to undo it."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.core.flows.policy import DomainPolicy, domain_from_plain, flows_from_plain
from intentd.core.units import format_rate, format_size, parse_rate_bps
from intentd.daemons.ctl.output import ExitCode, JsonOption, fail, message, print_json, print_table

if TYPE_CHECKING:
    from intentd.agent.tc.netlink import Reading
    from intentd.agent.tc.plan import HtbTree, SeenTree

app = typer.Typer(
    help="Traffic control: plan, show, restore.", no_args_is_help=True, add_completion=False
)

MAX_POLICY_BYTES = 10_000_000
MAX_DEVICE_BYTES = 15  # IFNAMSIZ


class Direction(StrEnum):
    EGRESS = "egress"
    INGRESS = "ingress"


@app.command()
def plan(
    policy: Annotated[
        Path, typer.Option(help="JSON: a flows policy, or one domain of it. '-' reads stdin.")
    ],
    device: Annotated[str, typer.Option(help="The device the domain is shaped on.")],
    domain: Annotated[
        str, typer.Option(help="Which domain, where the file has more than one.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Link rate such as 1Gbit; default: the policy's.")] = "",
    direction: Annotated[
        Direction, typer.Option(help="ingress: a receiver's downlink, told apart by DSCP.")
    ] = Direction.EGRESS,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not look at the kernel: plan for an empty device.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what would change, as tc commands, without changing anything.

    Compared with what the device holds if it exists here, else (or with --offline) with a device
    that holds nothing. Exit 1 where the device has a foreign qdisc, which is never touched.
    """
    from intentd.agent.tc import plan as plans
    from intentd.agent.tc.shaper import INGRESS_SHARE

    if not 0 < len(device.encode()) <= MAX_DEVICE_BYTES or "/" in device:
        raise InputError("--device", device, f"a device name of 1 to {MAX_DEVICE_BYTES} bytes")
    chosen = _read_policy(policy, domain)
    ingress = direction is Direction.INGRESS
    link_bps = parse_rate_bps(rate) if rate else chosen.rate_bps
    tree = plans.tree_for(
        chosen, rate_bps=link_bps * (INGRESS_SHARE if ingress else 1.0), by_dscp=ingress
    )
    against, seen = "empty", plans.SeenTree("", plans.KERNEL_HANDLE)
    if not offline and not ingress:
        against, seen = _seen(device)
    foreign = f"{seen.kind} {seen.handle >> 16:x}:" if seen.foreign else ""
    steps = [] if foreign else plans.changes(tree, seen)
    commands = [plans.as_command(step, device) for step in steps]
    if as_json:
        print_json(
            {
                "domain": chosen.domain,
                "device": device,
                "direction": direction.value,
                "rate_bps": link_bps,
                "against": against,
                "foreign": foreign or None,
                "changes": commands,
                "tree": plans.tree_to_plain(tree),
            }
        )
    else:
        _print_tree(tree)
        for command in commands:
            print(command)
        if not commands and not foreign:
            message("nothing to change")
    if foreign:
        fail(f"{device} has the root qdisc {foreign}, which is not ours and stays")


@app.command()
def show(
    device: Annotated[str, typer.Option(help="The device to look at.")],
    as_json: JsonOption = False,
) -> None:
    """Read a device's qdisc, classes, filters and counters from the kernel."""
    from intentd.agent.tc.netlink import NoDeviceError, TrafficControl

    control = TrafficControl()
    try:
        reading = control.read(device)
    except NoDeviceError:
        raise InputError("--device", device, "a network device of this host") from None
    finally:
        control.close()
    document = _reading_to_plain(reading)
    if as_json:
        print_json(document)
        return
    state = "up" if document["up"] else "down"
    print(f"{device}: {state}, root qdisc {document['kind']} {document['handle']}")
    if not document["ours"]:
        message("not shaped by intentd")
        return
    print_table(
        ("class", "role", "rate", "ceil", "quantum", "prio", "sent", "packets", "drops", "backlog"),
        [
            (
                row["classid"],
                row["role"],
                format_rate(row["rate_bps"]),
                format_rate(row["ceil_bps"]),
                format_size(row["quantum_bytes"]),
                row["prio"],
                format_size(row["sent_bytes"]),
                row["sent_packets"],
                row["dropped_packets"],
                format_size(row["backlog_bytes"]),
            )
            for row in document["classes"]
        ],
    )
    for row in document["filters"]:
        print(f"{row['protocol']} dscp {row['dscp']} -> {row['classid']}")


@app.command()
def restore(
    state: Annotated[
        Path | None, typer.Option(help="The agent's record; default: tc.json in its state folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even while the agent runs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give recorded devices back as they were found. Only what carries our handles is touched."""
    from intentd.agent.tc.netlink import TrafficControl
    from intentd.agent.tc.restore import restore_all
    from intentd.agent.tc.state import StateFile
    from intentd.daemons.kit.config import default_state_dir

    path = state or default_state_dir() / "tc.json"
    if state is not None and not state.is_file():
        raise InputError("state", str(state), "a file the agent wrote")
    outcomes = []
    if path.is_file():
        control = TrafficControl()
        try:
            outcomes = restore_all(StateFile(path), control, force=force)
        except OSError as error:
            fail(f"{path}: {error.strerror}")
        finally:
            control.close()
    if as_json:
        print_json({"state": str(path), "devices": [asdict(outcome) for outcome in outcomes]})
    else:
        for outcome in outcomes:
            said = f"{outcome.device} {outcome.direction}: {outcome.outcome} {outcome.detail}"
            print(said.rstrip())
        if not outcomes:
            message(f"nothing recorded in {path}")
    if any(outcome.outcome == "failed" for outcome in outcomes):
        raise typer.Exit(int(ExitCode.FAILED))


def _read_policy(path: Path, domain: str) -> DomainPolicy:
    try:
        if str(path) == "-":
            text = typer.get_text_stream("stdin").read(MAX_POLICY_BYTES + 1)
        else:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_POLICY_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("policy", str(path), f"a readable JSON file ({error})") from None
    if len(text) > MAX_POLICY_BYTES:
        raise InputError("policy", str(path), f"at most {MAX_POLICY_BYTES} characters")
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("policy", str(path), f"JSON ({error})") from None
    if isinstance(plain, dict) and "domains" in plain:
        domains = flows_from_plain(plain).domains
    else:
        domains = (domain_from_plain(plain),)
    names = ", ".join(found.domain for found in domains) or "none"
    if domain:
        matching = [found for found in domains if found.domain == domain]
        if not matching:
            raise InputError("domain", domain, f"one of the file's domains ({names})")
        return matching[0]
    if len(domains) != 1:
        raise InputError("domain", domain, f"a name, the file has {len(domains)}: {names}")
    return domains[0]


def _seen(device: str) -> tuple[str, SeenTree]:
    from intentd.agent.tc import plan as plans
    from intentd.agent.tc.netlink import NoDeviceError, TrafficControl

    control = TrafficControl()
    try:
        return "kernel", control.read(device).tree
    except NoDeviceError:
        message(f"{device} does not exist here: planned for an empty device")
        return "empty", plans.SeenTree("", plans.KERNEL_HANDLE)
    finally:
        control.close()


def _print_tree(tree: HtbTree) -> None:
    from intentd.agent.tc import plan as plans

    print_table(
        ("class", "role", "rate", "ceil", "quantum", "prio", "burst", "SO_PRIORITY"),
        [
            (
                f"{plans.MAJOR:x}:{cls.minor:x}",
                plans.role_of(cls.minor),
                format_rate(cls.rate_bps),
                format_rate(cls.ceil_bps),
                format_size(cls.quantum_bytes),
                cls.prio,
                format_size(cls.burst_bytes),
                f"{plans.HANDLE | cls.minor:#x}",
            )
            for cls in tree.classes
        ],
    )


def _reading_to_plain(reading: Reading) -> dict[str, Any]:
    from intentd.agent.tc import plan as plans

    tree = reading.tree
    counters = {counted.minor: asdict(counted) for counted in reading.counters}
    return {
        "device": reading.device.name,
        "up": reading.device.up,
        "kind": tree.kind,
        "handle": f"{tree.handle >> 16:x}:",
        "ours": tree.ours,
        "classes": [
            {
                "classid": f"{plans.MAJOR:x}:{minor:x}",
                "role": plans.role_of(minor),
                **asdict(seen.shape),
                **counters[minor],
                "queue_packets": seen.queue_packets,
            }
            for minor, seen in tree.classes.items()
        ],
        "filters": [
            {
                "protocol": seen.shape.protocol,
                "dscp": seen.shape.dscp,
                "classid": f"{plans.MAJOR:x}:{seen.shape.minor:x}",
            }
            for seen in tree.filters
            if seen.shape is not None
        ],
    }
