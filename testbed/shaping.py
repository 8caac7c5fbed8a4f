"""HTB on a host's device by the ``tc`` command: for runs without an agent.

The agent shapes by netlink and by its own code; runs with the gate in the client's process use
this instead, so that a difference between the two is the agent's doing.
"""

from __future__ import annotations

from typing import Final

from intentd.core.flows.policy import DomainPolicy
from intentd.testbed.netns import Namespace

MAJOR: Final = 1
ROOT_MINOR: Final = 1
UNMARKED_MINOR: Final = 2
FIRST_MINOR: Final = 10
# One GSO packet passes HTB whole; a larger burst lets small flows skip the queue of their class.
BURST_BYTES: Final = 16_384
SMALLEST_QUANTUM_BYTES: Final = 65_536
LARGEST_QUANTUM_BYTES: Final = 4_000_000


def priorities(policy: DomainPolicy) -> list[int]:
    """SO_PRIORITY of each class: (major << 16) | minor is taken as a class without a filter."""
    return [(MAJOR << 16) | (FIRST_MINOR + index) for index in range(len(policy.classes))]


def quantum_bytes(weight: float, smallest_weight: float) -> int:
    """Idle bandwidth is split by quantum, not by rate: it follows the weights too."""
    wanted = 100_000 * weight / smallest_weight
    return int(min(max(wanted, SMALLEST_QUANTUM_BYTES), LARGEST_QUANTUM_BYTES))


def shape(namespace: Namespace, device: str, policy: DomainPolicy) -> None:
    """Replace the device's qdisc by the policy's classes. Raises NamespaceError."""
    unshape(namespace, device)
    rate = round(policy.rate_bps)
    common = f"ceil {rate}bit burst {BURST_BYTES} cburst {BURST_BYTES}"
    namespace.tc(
        *f"qdisc add dev {device} root handle {MAJOR}: htb default {UNMARKED_MINOR}".split()
    )
    namespace.tc(
        *f"class add dev {device} parent {MAJOR}: classid {MAJOR}:{ROOT_MINOR} htb".split(),
        *f"rate {rate}bit {common} quantum {SMALLEST_QUANTUM_BYTES}".split(),
    )
    namespace.tc(
        *f"class add dev {device} parent {MAJOR}:{ROOT_MINOR}".split(),
        *f"classid {MAJOR}:{UNMARKED_MINOR} htb rate {max(8000, rate // 100)}bit".split(),
        *f"{common} prio 0 quantum {SMALLEST_QUANTUM_BYTES}".split(),
    )
    smallest = min(cls.weight for cls in policy.classes)
    for index, cls in enumerate(policy.classes):
        namespace.tc(
            *f"class add dev {device} parent {MAJOR}:{ROOT_MINOR}".split(),
            *f"classid {MAJOR}:{FIRST_MINOR + index:x} htb".split(),
            *f"rate {max(8000, round(rate * cls.weight))}bit {common}".split(),
            *f"prio {cls.priority} quantum {quantum_bytes(cls.weight, smallest)}".split(),
        )


def unshape(namespace: Namespace, device: str) -> None:
    """Back to the device's own qdisc; nothing to do is no error."""
    namespace.tc("qdisc", "del", "dev", device, "root", check=False)
