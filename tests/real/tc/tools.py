"""What the tests of traffic control look at a namespace with."""

from __future__ import annotations

import math
import os
import re
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

from intentd.agent.tc.shaper import ShapingHost
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.testbed import netns

SRC: Final = Path(__file__).parents[3] / "src"
Opener = Callable[..., ShapingHost]


def policy(
    *weights: float,
    rate_bps: float = 1e9,
    dscps: tuple[int, ...] = (),
    priorities: tuple[int, ...] = (),
) -> DomainPolicy:
    last = len(weights) - 1
    return DomainPolicy(
        "link",
        rate_bps,
        tuple(
            ClassPolicy(
                math.inf if index == last else 1e4 * 10**index,
                weight,
                dscp=dscps[index] if dscps else 0,
                priority=priorities[index] if priorities else 0,
            )
            for index, weight in enumerate(weights)
        ),
    )


def root_qdisc(namespace: netns.Namespace, device: str = "eth0") -> str:
    shown = namespace.tc("qdisc", "show", "dev", device, "root").stdout
    return " ".join(shown.split()[1:3])


def classes(namespace: netns.Namespace, device: str = "eth0") -> dict[str, str]:
    text = namespace.tc("class", "show", "dev", device).stdout
    return {line.split()[2]: line for line in text.splitlines()}


def devices(namespace: netns.Namespace) -> list[str]:
    return [line.split()[0] for line in namespace.ip("-br", "link").stdout.splitlines()]


def without_counters(namespace: netns.Namespace) -> str:
    text = namespace.tc("-d", "qdisc", "show", "dev", "eth0").stdout
    return re.sub(r"direct_packets_stat \d+", "", text)


def gone(pid: int) -> bool:
    """Wait for the end of a process that is no child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 60)[0])
    finally:
        os.close(fd)
