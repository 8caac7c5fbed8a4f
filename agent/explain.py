"""Why a flow started when it did: what was decided, from which inputs, what else was possible."""

from __future__ import annotations

from typing import Any

from intentd.agent import app_protocol as wire
from intentd.agent.domain import WAITING, FlowRecord, finite_threshold
from intentd.core.flows.policy import DomainPolicy


def explain(record: FlowRecord, now: float) -> dict[str, Any]:
    """A record as a story in plain types."""
    plain: dict[str, Any] = {
        "flow": record.flow,
        "application": {"name": record.name, "pid": record.pid, "uid": record.uid},
        "request": record.request,
        "peer": record.peer or None,
        "size_bytes": record.size,
        "domain": record.domain.name if record.domain is not None else None,
        "class": record.class_index,
        "state": record.outcome,
        "arrived_s_ago": max(0.0, now - record.arrived),
        "waited_s": (record.released if record.released >= 0 else now) - record.arrived,
        "start": _start(record),
        "bytes_sent": record.sent_bytes,
        "fct_s": record.ended - record.arrived if record.ended >= 0 else None,
        "mark": {"priority": record.mark[0], "dscp": record.mark[1]} if record.mark else None,
    }
    policy = record.policy
    if policy is None:
        plain["because"] = ["no domain of this host applies to the peer: not gated"]
        return plain
    plain["policy"] = {
        "name": policy.name,
        "era": record.number[0],
        "number": record.number[1],
        "max_wait_s": policy.max_wait_s,
    }
    plain["because"] = _because(record, policy)
    plain["alternatives"] = _alternatives(record, policy)
    return plain


def _start(record: FlowRecord) -> str:
    if record.released < 0:
        return "not yet" if record.outcome == WAITING else "never"
    return f"degraded: {record.degraded}" if record.degraded else "ordered"


def _because(record: FlowRecord, policy: DomainPolicy) -> list[str]:
    index = min(record.class_index, len(policy.classes) - 1)
    cls = policy.classes[index]
    lines = []
    if record.hint != wire.NO_CLASS:
        lines.append(f"class {index}: named by the application")
    else:
        lines.append(f"class {index}: size {record.size} <= threshold {cls.threshold_bytes:g}")
    if cls.mpl == 0:
        lines.append("no gate in this class: it starts at once")
    elif not record.queues:
        lines.append(f"fewer than {cls.mpl} of the class were sending and none waited: no wait")
    else:
        lines.append(
            f"{record.ahead} flows of the class were ahead and {cls.mpl} may send at a time, "
            f"order {cls.order}, sequenced {cls.sequencing}"
        )
    if record.degraded:
        lines.append(f"started outside the guaranteed order: {record.degraded}")
    lines.append(f"the class has {cls.weight:.3f} of the link while all classes are busy")
    return lines


def _alternatives(record: FlowRecord, policy: DomainPolicy) -> list[dict[str, Any]]:
    """The other classes: what decided against each, and how many waited there then."""
    rows = []
    for index, cls in enumerate(policy.classes):
        if index == record.class_index:
            continue
        fits = record.size <= cls.threshold_bytes
        why = "a class before it takes this size" if fits else "the flow is larger"
        if record.hint != wire.NO_CLASS:
            why = "the application named another class"
        waiting = record.queues[index] if index < len(record.queues) else 0
        rows.append(
            {
                "class": index,
                "threshold_bytes": finite_threshold(cls),
                "weight": cls.weight,
                "not_because": why,
                "waiting_then": waiting,
            }
        )
    return rows
