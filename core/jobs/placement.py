"""Which node's GPUs a job gets, given how many: packed, and moved as little as possible.

The speed of a job falls with its spread over nodes (section 3.4), so a grant is packed onto as few
nodes as there are room for, taking the node it fits most tightly, and a job that keeps its size
keeps its place.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from intentd.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Node:
    """GPUs of one host, all of one type. drained: keeps what runs, takes nothing new."""

    name: str
    gpus: int
    drained: bool = False
    gpu_type: str = ""


Placement = dict[str, int]  # node -> GPUs


def spread(placement: Mapping[str, int]) -> int:
    """Over how many nodes; what a demand function takes."""
    return sum(1 for gpus in placement.values() if gpus > 0)


def place(
    grants: Mapping[Hashable, int],
    nodes: Mapping[str, Node],
    present: Mapping[Hashable, Placement] | None = None,
) -> dict[Hashable, Placement]:
    """Places every grant. grants: whole GPUs, in the order of the policy. Raises InputError if
    they exceed the GPUs there are.

    A job of unchanged size stays. One that shrinks gives up its smallest pieces first. One that
    grows stays and takes more on its own nodes first; if that would spread it over more nodes than
    it needs and one node has room for all of it, it moves there (it restarts anyway). New jobs
    come last, largest first (best fit decreasing).
    """
    present = present or {}
    free = {name: 0 if node.drained else node.gpus for name, node in nodes.items()}
    used: dict[str, int] = dict.fromkeys(nodes, 0)
    placed: dict[Hashable, Placement] = {}
    for job, gpus in grants.items():
        if gpus < 0:
            raise InputError(f"grants[{job}]", gpus, "a number of GPUs >= 0")
        before = {name: held for name, held in present.get(job, {}).items() if name in nodes}
        kept = _shrunk(before, gpus)
        if kept:
            placed[job] = kept
            for name, held in kept.items():
                used[name] += held
    for name, node in nodes.items():
        if used[name] > node.gpus:
            raise InputError(f"nodes[{name}]", used[name], f"at most its {node.gpus} GPUs in use")
        free[name] = max(0, free[name] - used[name])
    for job in sorted(grants, key=lambda job: -grants[job]):
        missing = grants[job] - sum(placed.get(job, {}).values())
        if missing > 0:
            placed[job] = _grown(placed.get(job, {}), missing, free)
    return placed


def _shrunk(before: Placement, gpus: int) -> Placement:
    """What stays of a placement that may be too large: its largest pieces."""
    kept: Placement = {}
    left = gpus
    for name, held in sorted(before.items(), key=lambda item: (-item[1], item[0])):
        amount = min(held, left)
        if amount > 0:
            kept[name] = amount
            left -= amount
    return kept


def _grown(here: Placement, missing: int, free: dict[str, int]) -> Placement:
    """Adds GPUs on the nodes it is on, else moves to one node that has room, else spreads."""
    own = sum(min(free[name], missing) for name in here)
    whole = missing + sum(here.values())
    if own < missing:
        for name in here:  # would its own nodes have room if it let go of them?
            free[name] += here[name]
        roomy = [name for name, room in free.items() if room >= whole]
        if roomy:
            best = min(roomy, key=lambda name: (free[name], name))
            free[best] -= whole
            return {best: whole}
        for name in here:
            free[name] -= here[name]
    result = dict(here)
    left = missing
    others = sorted(free, key=lambda name: (name not in here, -free[name], name))
    for name in others:
        amount = min(free[name], left)
        if amount > 0:
            result[name] = result.get(name, 0) + amount
            free[name] -= amount
            left -= amount
    if left > 0:
        raise InputError("grants", whole, f"at most the free GPUs: {left} too many")
    return result
