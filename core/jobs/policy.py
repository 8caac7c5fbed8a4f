"""What a job policy says: the whole instruction of the GPU scheduler, immutable and validated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import PolicyError

Array = NDArray[np.float64]
NAMES: Final = ("fifo", "srsf", "themis", "afs", "maxmin", "wfq")
MAX_CLASSES: Final = 4096
LEASE_S: Final = {"themis": 600.0}  # section 3.5.1: the Themis authors' recommendation


def _is_number(value: object) -> bool:
    """A number that a float holds; infinity is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Costs:
    """What changing an allocation takes; all 0 as in the chapter's simulator.

    start_s, resize_s: no progress for so long after a start or a change of size, GPUs held.
    preempt_s: added to the start that follows a preemption (saving and loading).
    min_runtime_s: a started job keeps its smallest allocation at least so long.
    checkpoint_s: progress since the last multiple is lost when a GPU fails (0: since the last
        change of allocation).
    """

    start_s: float = 0.0
    resize_s: float = 0.0
    preempt_s: float = 0.0
    min_runtime_s: float = 0.0
    checkpoint_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise PolicyError(f"costs.{name}", value, "a finite number of seconds >= 0")


FREE: Final = Costs()


@dataclass(frozen=True, slots=True)
class JobsPolicy:
    """One allocation policy. Validated on construction; raises PolicyError.

    name: fifo, srsf (Tiresias-G), themis, afs (AFS-L), maxmin or wfq.
    thresholds_gpu_s: class k takes jobs of size <= thresholds[k]; the last is infinite (wfq).
    weights: share of the GPUs each busy class is guaranteed; normalised here to sum 1.
    zeta: least efficiency of a grant while others of the class wait, 0..1; delta: step of its
        relaxation while GPUs are left.
    integral: whole GPUs (what enforcement needs); else fractions, as in the chapter's simulator.
    lease_s: also decide this long after the last decision (0: at arrivals and ends only).
    weights_by_type: other weights on some GPU types (one W per type, section 3.3.3).
    origin: where it comes from, such as {"T": 1.2, "W": 0.4}; kept, not interpreted.
    """

    name: str
    thresholds_gpu_s: tuple[float, ...] = (math.inf,)
    weights: tuple[float, ...] = (1.0,)
    zeta: float = 0.0
    delta: float = 0.1
    integral: bool = True
    lease_s: float = 0.0
    weights_by_type: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "weights", _normalised(self.weights))
        by_type = {name: _normalised(row) for name, row in self.weights_by_type.items()}
        object.__setattr__(self, "weights_by_type", by_type)

    def class_of(self, size_gpu_s: float) -> int:
        """First class with size <= threshold."""
        if self.name != "wfq":
            return 0
        return int(np.searchsorted(np.asarray(self.thresholds_gpu_s), size_gpu_s, side="left"))

    def for_type(self, gpu_type: str) -> JobsPolicy:
        """The policy of one pool of equal GPUs."""
        if gpu_type not in self.weights_by_type:
            return self
        return replace(self, weights=self.weights_by_type[gpu_type], weights_by_type={})


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    if abs(total - 1.0) < 1e-12:  # as they were, so that a policy survives the way through JSON
        return tuple(float(weight) for weight in weights)
    return tuple(float(weight / total) for weight in weights)


def _check(policy: JobsPolicy) -> None:
    if policy.name not in NAMES:
        raise PolicyError("policy", policy.name, f"one of {', '.join(NAMES)}")
    count = len(policy.thresholds_gpu_s)
    if not 1 <= count <= MAX_CLASSES:
        raise PolicyError("thresholds", count, f"1 to {MAX_CLASSES} classes")
    last = 0.0
    for index, value in enumerate(policy.thresholds_gpu_s):
        if not (_is_number(value) and value > last):
            raise PolicyError(f"thresholds[{index}]", value, f"a number > {last:g}, rising")
        last = value
    if last != math.inf:
        raise PolicyError(f"thresholds[{count - 1}]", last, "infinity (the last class)")
    for where, row in (
        ("weights", policy.weights),
        *((f"weights_by_type[{name}]", row) for name, row in policy.weights_by_type.items()),
    ):
        if len(row) != count:
            raise PolicyError(where, len(row), f"{count} weights, one a class")
        for index, value in enumerate(row):
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise PolicyError(f"{where}[{index}]", value, "a finite number > 0")
    for name, low, high in (("zeta", 0.0, 1.0), ("delta", 1e-4, 1.0)):
        value = getattr(policy, name)
        if not (_is_number(value) and low <= value <= high):
            raise PolicyError(name, value, f"a number from {low:g} to {high:g}")
    if not (_is_number(policy.lease_s) and math.isfinite(policy.lease_s) and policy.lease_s >= 0):
        raise PolicyError("lease_s", policy.lease_s, "a finite number of seconds >= 0")


def make(name: str, *, integral: bool = True) -> JobsPolicy:
    """A policy without settings of its own: fifo, srsf, themis, afs, maxmin, or wfq as FIFO."""
    return JobsPolicy(name, integral=integral, lease_s=LEASE_S.get(name, 0.0))


def squared_variation(sizes: Array) -> float:
    """C^2 of a sample: variance over the squared mean."""
    mean = float(np.mean(sizes))
    return float(np.mean((sizes / mean - 1) ** 2)) if mean > 0 else 0.0


def cuts(sizes: Array, limit: float) -> list[float]:
    """Thresholds that keep C^2 in every class at most limit (section 3.3.3); the last infinite.

    Walks the sorted sizes and closes the class *before* the size that pushed the open class over
    the limit; as published, that size belongs to neither sum, the next class starts after it.
    """
    ordered = np.sort(np.asarray(sizes, dtype=np.float64))
    squares = ordered * ordered
    thresholds: list[float] = []
    start, reach = 0, 64  # the open class, and how far it is looked ahead
    while start < len(ordered):
        stop = min(start + reach, len(ordered))
        count = np.arange(1, stop - start + 1)
        mean = np.cumsum(ordered[start:stop]) / count
        over = np.cumsum(squares[start:stop]) / count / (mean * mean) - 1 > limit
        at = int(np.argmax(over))
        if not over[at]:
            if stop == len(ordered):
                break
            reach *= 2
            continue
        previous = float(ordered[start + at - 1]) if start + at else 0.0
        if not thresholds or previous > thresholds[-1]:
            thresholds.append(previous)
        start, reach = start + at + 1, max(64, 2 * at)
    return [*thresholds, math.inf]


def wfq(
    sizes: Sequence[float] | Array,
    *,
    T: float,  # noqa: N803  # the chapter's symbol
    W: float | Mapping[str, float],  # noqa: N803  # the chapter's symbol
    zeta: float,
    delta: float = 0.1,
    integral: bool = True,
    artifact: bool = False,
) -> JobsPolicy:
    """WFQ(T, W, zeta, delta) for a sample of sizes (section 3.3.3).

    W: weights are exp(-i W) normalised; a mapping gives one W a GPU type. artifact: thresholds
    cut to whole seconds and weights rounded to thousandths, as the authors' tuner does.
    """
    sample = np.asarray(sizes, dtype=np.float64)
    if sample.size == 0:
        raise PolicyError("sizes", [], "at least one job size")
    if not (_is_number(T) and T > 0 and math.isfinite(T)):
        raise PolicyError("T", T, "a finite number > 0")
    thresholds = cuts(sample, float(T))
    if len(thresholds) > MAX_CLASSES:
        raise PolicyError("T", T, f"a value that makes at most {MAX_CLASSES} classes")
    if artifact:
        whole = dict.fromkeys(float(int(value)) for value in thresholds[:-1])
        thresholds = [*(value for value in whole if value > 0), math.inf]
    steep = dict(W) if isinstance(W, Mapping) else {"": W}
    if not steep:
        raise PolicyError("W", W, "a number, or one a GPU type")
    rows = {name: weights_of(value, len(thresholds), artifact) for name, value in steep.items()}
    return JobsPolicy(
        "wfq",
        tuple(thresholds),
        rows.get("") or next(iter(rows.values())),
        zeta=zeta,
        delta=delta,
        integral=integral,
        weights_by_type={name: row for name, row in rows.items() if name},
        origin={"T": float(T), "W": W if not isinstance(W, Mapping) else dict(W)},
    )


def weights_of(W: float, classes: int, artifact: bool = False) -> tuple[float, ...]:  # noqa: N803
    """exp(-i W) for i = 0..classes-1, normalised; no weight below 1e-9 of the largest."""
    if not (_is_number(W) and math.isfinite(W)):
        raise PolicyError("W", W, "a finite number")
    power = -float(W) * np.arange(classes)
    row = np.maximum(np.exp(power - power.max()), 1e-9)
    row /= row.sum()
    if artifact:
        row = np.round(row, 3)
        if np.any(row <= 0):
            raise PolicyError("W", W, "weights of at least .001 each (as the artifact rounds them)")
    return _normalised(row.tolist())


def to_plain(policy: JobsPolicy) -> dict[str, Any]:
    """As JSON-ready types; an infinite threshold is None."""
    plain: dict[str, Any] = {name: getattr(policy, name) for name in policy.__slots__}
    plain["thresholds_gpu_s"] = [
        None if value == math.inf else value for value in policy.thresholds_gpu_s
    ]
    plain["weights"] = list(policy.weights)
    plain["weights_by_type"] = {name: list(row) for name, row in policy.weights_by_type.items()}
    plain["origin"] = dict(policy.origin)
    return plain


def from_plain(plain: object, where: str = "policy") -> JobsPolicy:
    """Inverse of to_plain for untrusted input. Raises PolicyError naming the path."""
    if not isinstance(plain, Mapping):
        raise PolicyError(where, plain, "a table")
    fields = dict(plain)
    for name in fields:
        if name not in JobsPolicy.__slots__:
            known = ", ".join(JobsPolicy.__slots__)
            raise PolicyError(f"{where}.{name}", fields[name], f"one of {known}")
    if not isinstance(fields.get("name"), str):
        raise PolicyError(f"{where}.name", fields.get("name"), f"one of {', '.join(NAMES)}")
    if "thresholds_gpu_s" in fields:
        rows = _list(fields["thresholds_gpu_s"], f"{where}.thresholds_gpu_s")
        fields["thresholds_gpu_s"] = tuple(math.inf if value is None else value for value in rows)
    if "weights" in fields:
        fields["weights"] = _list(fields["weights"], f"{where}.weights")
    if "integral" in fields and not isinstance(fields["integral"], bool):
        raise PolicyError(f"{where}.integral", fields["integral"], "true or false")
    for name in ("weights_by_type", "origin"):
        if name in fields and not isinstance(fields[name], Mapping):
            raise PolicyError(f"{where}.{name}", fields[name], "a table")
    if "weights_by_type" in fields:
        fields["weights_by_type"] = {
            str(name): _list(row, f"{where}.weights_by_type[{name}]")
            for name, row in fields["weights_by_type"].items()
        }
    try:
        return JobsPolicy(**fields)
    except PolicyError as error:
        raise PolicyError(f"{where}.{error.field}", error.value, error.expected) from None


def _list(value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise PolicyError(where, value, "a list of numbers")
    return tuple(value)
