"""Give devices back as they were found: on stop, after ``kill -9``, and by hand.

``python -m intentd.agent.tc.restore --state FILE`` is what systemd runs in ExecStopPost and what
the agent's dead-man process runs when the agent dies. It touches only what carries our handles,
leaves a living agent's devices alone, and may be run any number of times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from intentd.agent.tc.netlink import NoDeviceError, TrafficControl
from intentd.agent.tc.plan import RemoveRoot
from intentd.agent.tc.state import Found, StateFile, boot_id, netns_inode
from intentd.core.errors import InputError, IntentdError


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one device.

    outcome: "restored"; "clean" (nothing of ours was there); "foreign" (somebody else's qdisc
    has taken its place and stays); "gone" (no such device); "elsewhere" (recorded in another
    network namespace, left in the record); "failed".
    """

    device: str
    direction: str
    outcome: str
    detail: str = ""


def undo(control: TrafficControl, found: Found) -> Restored:
    """Take our qdiscs (and IFB device) off one device. Raises TcError."""

    def done(outcome: str, detail: str = "") -> Restored:
        return Restored(found.device, found.direction, outcome, detail)

    if found.netns != netns_inode():
        return done("elsewhere", "recorded in another network namespace")
    try:
        device = control.device(found.device)
    except NoDeviceError:
        device = None
    if device is None or device.index != found.ifindex:
        if found.ifb:
            control.remove_device(found.ifb)
        return done("gone", "the device does not exist any more")
    if found.direction == "ingress":
        try:
            ifb = control.device(found.ifb)
        except NoDeviceError:
            return done("clean")
        if control.redirects(device, ifb):
            control.remove_ingress(device)
        control.remove_device(found.ifb)
        return done("restored")
    tree = control.read(found.device).tree
    if tree.foreign:
        return done("foreign", f"root qdisc is now {tree.kind} {tree.handle >> 16:x}:")
    if not tree.ours:
        return done("clean")
    control.apply(device, [RemoveRoot()])
    after = control.read(found.device).tree
    if found.kind and after.kind != found.kind:
        return done("restored", f"found {found.kind}, the kernel's default is now {after.kind}")
    return done("restored")


def restore_all(
    state: StateFile,
    control: TrafficControl,
    *,
    force: bool = False,
    select: Callable[[Found], bool] = lambda found: True,
) -> list[Restored]:
    """Undo what is recorded and selected, and drop it from the record.

    force: even while another process, the owner, lives.
    Raises AgentAliveError, InputError (a file that is not ours), OSError.
    """
    with state.locked():
        record = state.load()
        if record is None:
            return []
        if not force:
            record.owner.yield_or_raise()
        if record.boot != boot_id():  # the machine restarted, and with it every qdisc
            state.save(replace(record, devices=()))
            return [Restored(f.device, f.direction, "clean", "rebooted") for f in record.devices]
        outcomes, kept = [], []
        for found in record.devices:
            if not select(found):
                kept.append(found)
                continue
            try:
                outcome = undo(control, found)
            except IntentdError as error:
                outcome = Restored(found.device, found.direction, "failed", str(error))
            if outcome.outcome in {"failed", "elsewhere"}:
                kept.append(found)
            outcomes.append(outcome)
        state.save(replace(record, devices=tuple(kept)))
        return outcomes


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when done, 1 when refused or a device failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m intentd.agent.tc.restore", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="the agent's state file, tc.json")
    parser.add_argument("--force", action="store_true", help="even while the agent runs")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(argv)
    if not options.state.is_file():
        outcomes = []
    else:
        control = TrafficControl()
        try:
            outcomes = restore_all(StateFile(options.state), control, force=options.force)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        except (IntentdError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            control.close()
    if options.json:
        print(json.dumps({"devices": [asdict(outcome) for outcome in outcomes]}))
    for outcome in outcomes:
        said = f"{outcome.device} {outcome.direction}: {outcome.outcome} {outcome.detail}"
        print(said.rstrip(), file=sys.stderr)
    return 1 if any(outcome.outcome == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
