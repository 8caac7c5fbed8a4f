"""Job traces, ours and others': text in, a job table out, one clear error for what is wrong.

Our CSV: ``job_id, submit_s, service_gpu_s, gpus, model`` and optionally ``min_gpus``; speeds from a
scaling CSV ``model, gpus, speedup`` (other columns there are ignored); the model LinearModel is
always known. Philly's cluster_job_log JSON, Alibaba's 2023 GPU tasks and the Pollux job lists
(with their measured step times) are read as their authors publish them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.demand import MAX_GPUS, envelope

Array = NDArray[np.float64]
LINEAR: Final = "LinearModel"
MAX_JOBS: Final = 2_000_000
COLUMNS: Final = ("job_id", "submit_s", "service_gpu_s", "gpus", "model")
OPTIONAL: Final = ("min_gpus",)


class Scaling:
    """Named speed tables (speed at 0..n GPUs), with the warnings their repair gave."""

    def __init__(self, tables: Mapping[str, Sequence[float]] | None = None) -> None:
        self.warnings: list[str] = []
        self.tables: dict[str, Array] = {}
        for name, speeds in (tables or {}).items():
            fixed, best = envelope(speeds)
            if np.any(fixed > np.asarray(speeds)):
                self.warnings.append(
                    f"{name}: slower with more GPUs; best at {best}, envelope taken"
                )
            self.tables[name] = fixed

    def speeds(self, models: Sequence[str], largest: Sequence[int]) -> tuple[list[int], Array]:
        """Row of each model, and the rows padded to one width. Raises InputError if unknown."""
        width = max(largest, default=1) + 1
        rows: dict[str, int] = {}
        kept: list[Array] = []
        index: list[int] = []
        for at, name in enumerate(models):
            if name not in rows:
                rows[name] = len(kept)
                kept.append(self._row(name, width, at))
            index.append(rows[name])
        return index, np.stack(kept) if kept else np.zeros((1, width))

    def _row(self, name: str, width: int, at: int) -> Array:
        if name == LINEAR and name not in self.tables:
            return np.arange(width, dtype=np.float64)
        if name not in self.tables:
            known = ", ".join(sorted(self.tables)) or "none: give a scaling file"
            raise InputError(f"jobs[{at}].model", name, f"a model of the scaling table ({known})")
        table = self.tables[name][:width]
        if name == LINEAR and len(table) < width:
            return np.arange(width, dtype=np.float64)
        return np.concatenate([table, np.full(width - len(table), table[-1])])

    def useful(self, name: str, asked: int) -> int:
        """The largest useful grant: no more than asked, and not past the best point."""
        if name not in self.tables:
            return asked
        table = self.tables[name][: asked + 1]
        return max(1, int(np.argmax(table >= table[-1])))


def read_scaling(text: str) -> Scaling:
    """A scaling CSV. Raises InputError for gaps, unknown columns and speeds that are no numbers."""
    tables: dict[str, dict[int, float]] = {}
    needed = ("model", "gpus", "speedup")
    for at, row in _rows(text, "scaling", needed, ("iter_time_s",)):
        gpus = _integer(row["gpus"], f"scaling[{at}].gpus", 1)
        tables.setdefault(row["model"], {})[gpus] = _positive(
            row["speedup"], f"scaling[{at}].speedup"
        )
    lists: dict[str, list[float]] = {}
    for name, points in tables.items():
        if sorted(points) != list(range(1, max(points) + 1)):
            raise InputError(f"scaling[{name}]", sorted(points), "every number of GPUs from 1")
        lists[name] = [0.0, *(points[gpus] for gpus in sorted(points))]
    if not lists:
        raise InputError("scaling", "", "at least one row")
    return Scaling(lists)


def read_csv(text: str, scaling: Scaling | None = None, first: int | None = None) -> JobTable:
    """Our trace. first: only so many jobs."""
    scaling = scaling or Scaling()
    submit, work, largest, smallest, models = [], [], [], [], []
    last = -math.inf
    for at, row in _rows(text, "jobs", COLUMNS, OPTIONAL):
        if first is not None and at >= first:
            break
        where = f"jobs[{at}]"
        submit.append(_number(row["submit_s"], f"{where}.submit_s"))
        if submit[-1] < last:
            raise InputError(f"{where}.submit_s", submit[-1], f"at least {last:g}: time runs back")
        last = submit[-1]
        work.append(_positive(row["service_gpu_s"], f"{where}.service_gpu_s"))
        asked = _integer(row["gpus"], f"{where}.gpus", 1)
        models.append(row["model"])
        smallest.append(_number(row.get("min_gpus") or "0", f"{where}.min_gpus"))
        if not 0 <= smallest[-1] <= asked:
            raise InputError(f"{where}.min_gpus", smallest[-1], f"0 to gpus ({asked})")
        largest.append(max(scaling.useful(row["model"], asked), math.ceil(smallest[-1])))
    if not submit:
        raise InputError("jobs", "", "at least one row")
    index, speeds = scaling.speeds(models, largest)
    return job_table(submit, work, largest, index, speeds, smallest=np.array(smallest))


def write_csv(jobs: JobTable) -> str:
    """A table as our CSV, for jobs that scale linearly. Raises InputError for others."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*COLUMNS, *OPTIONAL))
    line = np.arange(jobs.speeds.shape[1], dtype=np.float64)
    for j in range(len(jobs)):
        top = int(jobs.largest[j])
        if not np.allclose(jobs.speeds[jobs.table[j], : top + 1], line[: top + 1]):
            raise InputError(f"jobs[{j}].model", "measured", "a job that scales linearly")
        submit, work = float(jobs.submit_s[j]), float(jobs.work_gpu_s[j])
        writer.writerow((j, repr(submit), repr(work), top, LINEAR, f"{jobs.smallest[j]:g}"))
    return out.getvalue()


def read_philly(text: str, first: int | None = None) -> JobTable:
    """Philly's ``cluster_job_log``: a JSON list of jobs with their attempts (Jeon et al. 2019).

    A job's GPUs are those of its largest attempt, its work the GPU seconds of all attempts; jobs
    that never ran are left out. Linear scaling: the log has no other.
    """
    try:
        log = json.loads(text)
    except RecursionError:
        raise InputError("cluster_job_log", "a deep nest", "a JSON list of jobs") from None
    except ValueError as error:
        raise InputError("cluster_job_log", str(error), "a JSON list of jobs") from None
    if not isinstance(log, list):
        raise InputError("cluster_job_log", type(log).__name__, "a JSON list of jobs")
    jobs: list[tuple[float, float, int]] = []
    for at, entry in enumerate(log):
        where = f"cluster_job_log[{at}]"
        if not isinstance(entry, dict) or "attempts" not in entry:
            raise InputError(where, entry, "a job with submitted_time and attempts")
        gpus, work = 0, 0.0
        for n, attempt in enumerate(_list(entry["attempts"], f"{where}.attempts")):
            held, spent = _attempt(attempt, f"{where}.attempts[{n}]")
            gpus, work = max(gpus, held), work + spent * held
        if work > 0:
            moment = _moment(entry.get("submitted_time"), f"{where}.submitted_time")
            jobs.append((moment, work, gpus))
    return _linear_jobs(jobs, first)


def _attempt(attempt: object, where: str) -> tuple[int, float]:
    """GPUs and seconds of one attempt; (0, 0.0) for one that held none or did not end."""
    if not isinstance(attempt, dict):
        raise InputError(where, attempt, "an object with start_time, end_time and detail")
    start, end = attempt.get("start_time"), attempt.get("end_time")
    held = 0
    for n, part in enumerate(_list(attempt.get("detail", []), f"{where}.detail")):
        if not isinstance(part, dict):
            raise InputError(f"{where}.detail[{n}]", part, "an object with gpus")
        held += len(_list(part.get("gpus", []), f"{where}.detail[{n}].gpus"))
    if start in (None, "None") or end in (None, "None") or held == 0:
        return 0, 0.0
    spent = _moment(end, f"{where}.end_time") - _moment(start, f"{where}.start_time")
    if spent < 0:
        raise InputError(f"{where}.end_time", end, f"a time after {start}")
    return held, spent


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(where, value, "a list")
    return value


def read_alibaba(text: str, first: int | None = None) -> JobTable:
    """Alibaba's ``cluster-trace-gpu-v2023`` tasks: (deletion - scheduled) x GPUs of linear work.

    Tasks without a GPU, never scheduled, or still there at the end are left out; shares of a GPU
    count as that share of the work on one GPU.
    """
    needed = ("num_gpu", "gpu_milli", "creation_time", "deletion_time", "scheduled_time")
    extra = ("name", "cpu_milli", "memory_mib", "gpu_spec", "qos", "pod_phase")
    jobs: list[tuple[float, float, int]] = []
    for at, row in _rows(text, "tasks", needed, extra):
        where = f"tasks[{at}]"
        gpus = _integer(row["num_gpu"], f"{where}.num_gpu", 0)
        if gpus == 0 or not row["scheduled_time"] or not row["deletion_time"]:
            continue
        begin = _number(row["scheduled_time"], f"{where}.scheduled_time")
        end = _number(row["deletion_time"], f"{where}.deletion_time")
        if end < begin:
            raise InputError(f"{where}.deletion_time", end, f"a time after {begin:g}")
        share = _number(row["gpu_milli"], f"{where}.gpu_milli") / 1000 if gpus == 1 else 1.0
        if end > begin and share > 0:
            created = _number(row["creation_time"], f"{where}.creation_time")
            jobs.append((created, (end - begin) * gpus * share, gpus))
    return _linear_jobs(jobs, first)


# The list names applications, not durations. The Pollux paper (Qiao et al., OSDI 2021) puts each
# in a category of GPU hours: small 0-1, medium 1-10, large 10-100, extra large 100-1000; we take
# the geometric middle of the category (small: 0.1-1).
_POLLUX_HOURS: Final = {
    "cifar10": 0.316,
    "ncf": 0.316,
    "deepspeech2": 3.16,
    "bert": 3.16,
    "yolov3": 31.6,
    "imagenet": 316.0,
}


def read_pollux(
    text: str, measured: Mapping[str, str] | None = None, first: int | None = None
) -> JobTable:
    """A Pollux job list ``name, time, application, num_replicas, batch_size``.

    measured: application -> text of its scalability CSV; the speed at n replicas is the best
    throughput measured there over the best on one. Work: the middle of the paper's category.
    """
    scaling = Scaling({name: pollux_speeds(table) for name, table in (measured or {}).items()})
    needed = ("name", "time", "application", "num_replicas")
    rows: list[tuple[float, float, int, str]] = []
    for at, row in _rows(text, "jobs", needed, ("batch_size",)):
        name, where = row["application"], f"jobs[{at}]"
        if name not in _POLLUX_HOURS:
            known = ", ".join(_POLLUX_HOURS)
            raise InputError(f"{where}.application", name, f"one of {known}")
        asked = _integer(row["num_replicas"], f"{where}.num_replicas", 1)
        model = name if name in scaling.tables else LINEAR
        work = _POLLUX_HOURS[name] * 3600
        when = _number(row["time"], f"{where}.time")
        rows.append((when, work, scaling.useful(model, asked), model))
    if not rows:
        raise InputError("jobs", "", "at least one row")
    rows.sort(key=lambda row: row[0])
    rows = rows[:first]
    submit, works, largest, models = (list(column) for column in zip(*rows, strict=True))
    index, speeds = scaling.speeds(models, largest)
    return job_table(submit, works, largest, index, speeds, smallest=1.0)


def pollux_speeds(text: str) -> list[float]:
    """Speeds at 0..n replicas from a Pollux scalability CSV: num_replicas x local_bsz / step_time.

    Only placements that are packed (fewest nodes measured for the number of replicas); numbers of
    replicas in between are interpolated. Against one replica: where none was measured, its step
    is a measured one without the time spent synchronising.
    """
    best: dict[int, tuple[int, float]] = {}
    alone = 0.0
    needed = ("num_nodes", "num_replicas", "local_bsz", "step_time", "sync_time")
    for at, row in _rows(text, "scalability", needed, ()):
        where = f"scalability[{at}]"
        replicas = _integer(row["num_replicas"], f"{where}.num_replicas", 1)
        nodes = _integer(row["num_nodes"], f"{where}.num_nodes", 1)
        batch = _positive(row["local_bsz"], f"{where}.local_bsz")
        step = _positive(row["step_time"], f"{where}.step_time")
        sync = _number(row["sync_time"], f"{where}.sync_time")
        if not 0 <= sync < step:
            raise InputError(f"{where}.sync_time", sync, f"0 to below step_time ({step:g})")
        alone = max(alone, batch / (step - sync))
        rate = replicas * batch / step
        known = best.get(replicas)
        if known is None or nodes < known[0] or (nodes == known[0] and rate > known[1]):
            best[replicas] = (nodes, rate)
    if not best:
        raise InputError("scalability", "", "at least one row")
    best.setdefault(1, (1, alone))
    at_gpus = np.array(sorted(best), dtype=np.float64)
    rates = np.array([best[int(gpus)][1] for gpus in at_gpus]) / best[1][1]
    filled = np.interp(np.arange(1, int(at_gpus[-1]) + 1), at_gpus, rates)
    return [0.0, *filled.tolist()]


def from_history(
    submit_s: Sequence[float], work_gpu_s: Sequence[float], gpus: Sequence[int]
) -> JobTable:
    """The live history as a trace: what ran, in arrival order, times from the first arrival."""
    return _linear_jobs(list(zip(submit_s, work_gpu_s, gpus, strict=True)), None)


def _linear_jobs(jobs: list[tuple[float, float, int]], first: int | None) -> JobTable:
    if not jobs:
        raise InputError("jobs", "", "at least one job that ran on a GPU")
    jobs = sorted(jobs, key=lambda job: job[0])[:first]
    submit, work, gpus = (list(column) for column in zip(*jobs, strict=True))
    begin = submit[0]
    top = max(gpus)
    if top > MAX_GPUS:
        raise InputError("jobs", top, f"at most {MAX_GPUS} GPUs a job")
    speeds = np.arange(top + 1, dtype=np.float64)[None, :]
    times = [when - begin for when in submit]
    return job_table(times, work, gpus, [0] * len(jobs), speeds, smallest=1.0)


def _rows(
    text: str, where: str, needed: Sequence[str], optional: Sequence[str]
) -> Iterable[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text))
    names = [name.strip() for name in reader.fieldnames or ()]
    for name in needed:
        if name not in names:
            raise InputError(f"{where}.columns", names, f"the column {name}")
    for name in names:
        if name not in needed and name not in optional:
            known = ", ".join((*needed, *optional))
            raise InputError(f"{where}.columns", name, f"one of {known}")
    reader.fieldnames = names
    for at, row in enumerate(reader):
        if at >= MAX_JOBS:
            raise InputError(where, at, f"at most {MAX_JOBS} rows")
        if None in row or any(value is None for value in row.values()):
            raise InputError(f"{where}[{at}]", list(row.values()), f"{len(names)} columns")
        yield at, {name: value.strip() for name, value in row.items()}


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(where, text, "a finite number")
    return value


def _positive(text: str, where: str) -> float:
    value = _number(text, where)
    if value <= 0:
        raise InputError(where, text, "a number > 0")
    return value


def _integer(text: str, where: str, least: int) -> int:
    value = _number(text, where)
    if value != int(value) or not least <= value <= MAX_GPUS:
        raise InputError(where, text, f"a whole number from {least} to {MAX_GPUS}")
    return int(value)


def _moment(text: object, where: str) -> float:
    """Seconds since 1970; without a zone as UTC."""
    try:
        if not isinstance(text, str):
            raise ValueError
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(where, text, "a date and time such as 2017-10-01 09:30:00") from None
    begin = datetime(1970, 1, 1, tzinfo=UTC)
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - begin).total_seconds()
