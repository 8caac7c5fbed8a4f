"""What a user asks for: one job, validated, with every error naming its field."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.jobs.demand import MAX_GPUS, DemandFunction, from_table, from_tables, linear
from intentd.core.units import is_finite

MAX_COMMAND: Final = 1024
MAX_ENVIRONMENT: Final = 512
MAX_TEXT: Final = 16384
MAX_LABELS: Final = 32
MAX_TRIALS: Final = 10_000
MAX_ARRAY: Final = 1000
MAX_GRACE_S: Final = 3600.0
MAX_SIZE_GPU_S: Final = 1e12  # 30,000 years of a GPU; sums of many still are times
MAX_TIME_S: Final = 1e12
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}\Z")
_PLACE: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}(/[1-9][0-9]{0,3})?\Z")
_COUNT: Final = re.compile(r"[0-9]{1,9}\Z")
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")  # no program can be given these
RESERVED: Final = "INTENTD_"
SIGNALS: Final = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job as submitted. Build with ``spec_from_plain``.

    demand: GPUs -> seconds, as measured; empty: linear on size_gpu_s; both absent: the size is
    learned from finished jobs of the same owner and name. demand_by: the same by "type" or
    "type/nodes" (from so many nodes on), instead of demand. gpu_types: those it may use, empty for
    all it has a demand for. speeds: a named profile, filled in by
    whoever knows it. trials: independent runs inside, told to the job. checkpoint_signal asks
    the job to save and end within grace_s, then it is killed. time_limit_s: of running, over
    all its runs; 0: none. retries: restarts after a lost node or process.
    """

    command: tuple[str, ...]
    name: str = "job"
    owner: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    min_gpus: int = 1
    max_gpus: int = 1
    demand: Mapping[int, float] = field(default_factory=dict)
    demand_by: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    gpu_types: tuple[str, ...] = ()
    size_gpu_s: float = 0.0
    profile: str = ""
    speeds: tuple[float, ...] = ()
    trials: int = 1
    checkpoint_signal: str = "SIGTERM"
    grace_s: float = 30.0
    time_limit_s: float = 0.0
    retries: int = 3
    labels: Mapping[str, str] = field(default_factory=dict)
    array_index: int = -1

    def function(self, learned_size_gpu_s: float) -> DemandFunction:
        """Its demand function. Raises InputError (empty, negative, NaN, minimum missing)."""
        if self.demand_by:
            most = max(max(table) for table in self.demand_by.values())
            tables = {_key(name): dict(table) for name, table in self.demand_by.items()}
            return from_tables(
                tables,  # type: ignore[arg-type]  # keys narrower than untrusted ones
                smallest=self.min_gpus,
                largest=min(self.max_gpus, most),
            )
        if self.demand:
            table: dict[object, object] = {gpus: s for gpus, s in self.demand.items()}  # noqa: C416  widens the key type
            return from_table(table, smallest=self.min_gpus, largest=self._largest())
        size = self.size_gpu_s or learned_size_gpu_s
        if not self.speeds:
            return linear(size, self.max_gpus, self.min_gpus)
        rows: dict[object, object] = {
            gpus: size * self.speeds[self.min_gpus] / (self.min_gpus * speed)
            for gpus, speed in enumerate(self.speeds)
            if gpus >= self.min_gpus and speed > 0
        }
        return from_table(rows, smallest=self.min_gpus, largest=min(self.max_gpus, max_of(rows)))

    def _largest(self) -> int:
        return min(self.max_gpus, max(self.demand))


def max_of(rows: Mapping[object, object]) -> int:
    return max(int(str(gpus)) for gpus in rows)


def spec_to_plain(spec: JobSpec) -> dict[str, Any]:
    """As JSON-ready types."""
    plain: dict[str, Any] = {item.name: getattr(spec, item.name) for item in fields(spec)}
    plain["command"] = list(spec.command)
    plain["speeds"] = list(spec.speeds)
    plain["env"] = dict(spec.env)
    plain["labels"] = dict(spec.labels)
    table = {str(gpus): seconds for gpus, seconds in spec.demand.items()}
    by = {
        name: {str(gpus): seconds for gpus, seconds in rows.items()}
        for name, rows in spec.demand_by.items()
    }
    plain["demand"] = by or table or None
    del plain["demand_by"]
    plain["gpu_types"] = list(spec.gpu_types)
    return plain


def spec_from_plain(
    plain: object, profiles: Mapping[str, tuple[float, ...]] | None = None
) -> JobSpec:
    """For untrusted input. profiles: name -> speed at 0..n GPUs. Raises InputError."""
    if not isinstance(plain, Mapping):
        raise InputError("job", plain, "a table of fields")
    known = {item.name for item in fields(JobSpec)} - {"demand_by"}
    for name in plain:
        if name not in known:
            raise InputError(str(name)[:80], plain[name], f"one of {', '.join(sorted(known))}")
    given = dict(plain)
    min_gpus = _whole(given, "min_gpus", 1, 1, MAX_GPUS)
    table, by = _demands(given.get("demand"))
    known_most = [max(rows) for rows in (table, *by.values()) if rows]
    default_most = max(known_most, default=min_gpus)
    max_gpus = _whole(given, "max_gpus", default_most, 1, MAX_GPUS)
    if max_gpus < min_gpus:
        raise InputError("max_gpus", max_gpus, f"at least min_gpus ({min_gpus})")
    size = _seconds(given, "size_gpu_s", 0.0, MAX_SIZE_GPU_S)
    if (table or by) and size:
        raise InputError("size_gpu_s", size, "demand or size_gpu_s, not both")
    profile, speeds = _profile(given, profiles or {})
    chosen = str(given.get("checkpoint_signal", "SIGTERM")).upper()
    chosen = chosen if chosen.startswith("SIG") else f"SIG{chosen}"
    if chosen not in SIGNALS:
        raise InputError("checkpoint_signal", chosen, f"one of {', '.join(SIGNALS)}")
    spec = JobSpec(
        command=_command(given.get("command")),
        name=_name(given, "name", "job"),
        owner=_name(given, "owner", "") if given.get("owner") else "",
        env=_environment(given.get("env") or {}),
        workdir=_workdir(given.get("workdir", "")),
        min_gpus=min_gpus,
        max_gpus=max_gpus,
        demand=table,
        demand_by=by,
        gpu_types=_types(given.get("gpu_types") or ()),
        size_gpu_s=size,
        profile=profile,
        speeds=speeds,
        trials=_whole(given, "trials", 1, 1, MAX_TRIALS),
        checkpoint_signal=chosen,
        grace_s=_seconds(given, "grace_s", 30.0, MAX_GRACE_S),
        time_limit_s=_seconds(given, "time_limit_s", 0.0, MAX_TIME_S),
        retries=_whole(given, "retries", 3, 0, 100),
        labels=_labels(given.get("labels") or {}),
        array_index=_whole(given, "array_index", -1, -1, MAX_ARRAY),
    )
    spec.function(1.0)
    return spec


def within_bounds(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A stored job as a version without bounds on times took it: what is longer is cut to them."""
    kept = dict(plain)
    for name, most in (("size_gpu_s", MAX_SIZE_GPU_S), ("time_limit_s", MAX_TIME_S)):
        if name in kept:
            kept[name] = min(kept[name], most)
    if kept.get("demand"):
        kept["demand"] = {
            name: {at: _cut(at, s) for at, s in seconds.items()}
            if isinstance(seconds, Mapping)
            else _cut(name, seconds)
            for name, seconds in kept["demand"].items()
        }
    return kept


def _cut(gpus: str, seconds: float) -> float:
    return min(seconds, MAX_SIZE_GPU_S / int(gpus))


def signal_number(spec: JobSpec) -> int:
    return int(signal.Signals[spec.checkpoint_signal])


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, value, f"a whole number from {low} to {high}")
    return value


def _seconds(given: Mapping[str, Any], name: str, default: float, high: float) -> float:
    value = given.get(name, default)
    if not (is_finite(value) and 0 <= value <= high):
        raise InputError(name, value, f"a number from 0 to {high:g}")
    return float(value)


def _name(given: Mapping[str, Any], field_name: str, default: str) -> str:
    value = given.get(field_name, default)
    if not isinstance(value, str) or not _NAME.match(value):
        raise InputError(field_name, value, "1 to 128 letters, digits, dots, dashes, underscores")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or _NO_TEXT.search(value):
        raise InputError(where, str(value)[:80], f"text of at most {MAX_TEXT} characters")
    return value


def _command(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError("command", value, "a list of a program and its arguments")
    if len(value) > MAX_COMMAND:
        raise InputError("command", len(value), f"at most {MAX_COMMAND} arguments")
    words = tuple(_text(word, f"command[{at}]") for at, word in enumerate(value))
    if not words[0]:
        raise InputError("command[0]", "", "a program")
    return words


def _environment(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MAX_ENVIRONMENT:
        raise InputError("env", "(hidden)", f"a table of at most {MAX_ENVIRONMENT} variables")
    for name in value:
        if not isinstance(name, str) or not _VARIABLE.match(name) or name.startswith(RESERVED):
            raise InputError(f"env.{name!s:.80}", "(hidden)", f"a name, not of {RESERVED}*")
        text = value[name]
        if not isinstance(text, str) or len(text) > MAX_TEXT or _NO_TEXT.search(text):
            raise InputError(f"env.{name}", "(hidden)", f"text of at most {MAX_TEXT} characters")
    return dict(value)


def _workdir(value: object) -> str:
    path = _text(value, "workdir")
    if path and not path.startswith("/"):
        raise InputError("workdir", path, "an absolute path")
    return path


def _labels(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MAX_LABELS:
        raise InputError("labels", value, f"a table of at most {MAX_LABELS} labels")
    for name, text in value.items():
        if not isinstance(name, str) or not _NAME.match(name):
            raise InputError(f"labels.{name!s:.80}", name, "letters, digits, dots, dashes")
        if not isinstance(text, str) or len(text) > 256:
            raise InputError(f"labels.{name}", text, "text of at most 256 characters")
    return dict(value)


def _key(name: str) -> tuple[str, int]:
    """("v100", 2) of "v100/2"."""
    gpu_type, _, nodes = name.partition("/")
    return gpu_type, int(nodes or 1)


def _types(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_LABELS:
        raise InputError("gpu_types", value, "a list of GPU types")
    return tuple(_name({"gpu_types": name}, "gpu_types", "") for name in value)


def _demands(value: object) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """One table, or one by "type" or "type/nodes"."""
    if not isinstance(value, Mapping) or not any(isinstance(v, Mapping) for v in value.values()):
        return _demand(value), {}
    by: dict[str, dict[int, float]] = {}
    for name, table in value.items():
        if not isinstance(name, str) or not _PLACE.match(name) or len(by) >= MAX_LABELS:
            raise InputError("demand", f"{name!s:.80}", "a GPU type, or type/nodes")
        try:
            by[name] = _demand(table if table is not None else {})
        except InputError as error:
            where = error.field.removeprefix("demand")
            raise InputError(f"demand.{name}{where}", error.value, error.expected) from None
    for name in by:
        gpu_type, nodes = _key(name)
        if nodes > 1 and gpu_type not in by and f"{gpu_type}/1" not in by:
            raise InputError("demand", name, f"an entry for {gpu_type} on one node too")
    return {}, by


def _demand(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not value:
        raise InputError("demand", value, "a table {GPUs: seconds} with at least one entry")
    table: dict[int, float] = {}
    for gpus, seconds in value.items():
        at = gpus if isinstance(gpus, int) and not isinstance(gpus, bool) else 0
        if isinstance(gpus, str) and _COUNT.match(gpus):
            at = int(gpus)
        if not 1 <= at <= MAX_GPUS:
            raise InputError("demand", gpus, f"a number of GPUs from 1 to {MAX_GPUS}")
        if not (is_finite(seconds) and 0 < seconds <= MAX_SIZE_GPU_S / at):
            most = f"{MAX_SIZE_GPU_S:g} GPU seconds"
            raise InputError(f"demand[{at}]", seconds, f"a number > 0, at most {most}")
        table[at] = float(seconds)
    return table


def _profile(
    given: Mapping[str, Any], profiles: Mapping[str, tuple[float, ...]]
) -> tuple[str, tuple[float, ...]]:
    name, table = given.get("profile", ""), given.get("speeds")
    if not isinstance(name, str):
        raise InputError("profile", name, "the name of a profile")
    if table is not None and (not isinstance(table, (list, tuple)) or len(table) > MAX_GPUS + 1):
        raise InputError("speeds", table, f"a list of speeds at 0, 1, ... GPUs, to {MAX_GPUS}")
    if not name and table:
        raise InputError("speeds", table, "profile, its name, beside it; or demand")
    if not name:
        return "", ()
    if given.get("demand") is not None:
        raise InputError("profile", name, "demand or profile, not both")
    speeds = tuple(table or profiles.get(name) or ())
    if not speeds:
        raise InputError("profile", name, f"one of {', '.join(sorted(profiles)) or 'none known'}")
    for at, speed in enumerate(speeds):
        if not (is_finite(speed) and 0 <= speed < 1e6):
            raise InputError(f"speeds[{at}]", speed, "a finite number >= 0")
    if len(speeds) <= int(given.get("min_gpus", 1)):
        raise InputError("min_gpus", given.get("min_gpus", 1), f"at most {len(speeds) - 1}")
    return name, speeds
