"""Runs experiments by name, each into a directory of its own, and draws their reports."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.testbed.experiments.options import (
    EXPERIMENTS,
    Options,
    check_place,
    check_values,
    not_taken,
)
from intentd.testbed.metrics import METRICS
from intentd.testbed.playing import Progress
from intentd.testbed.report import write_report
from intentd.testbed.results import Results, over_seeds, save
from intentd.testbed.results import load as load_results

RESULTS_DIR: Final = Path("results")
LATE_S: Final = 0.5e-3


def names(wanted: str) -> list[str]:
    """The experiments a name stands for: one, or all. Raises InputError."""
    if wanted == "all":
        return list(EXPERIMENTS)
    name = wanted.replace("-", "_")
    if name not in EXPERIMENTS:
        raise InputError("experiment", wanted, f"all or one of {', '.join(EXPERIMENTS)}")
    return [name]


def new_directory(name: str, parent: Path = RESULTS_DIR) -> Path:
    """results/<name>-<time>, not used before."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        directory = parent / f"{name}-{stamp}{suffix}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise InputError("directory", str(parent), "room for one more run")


def check(name: str, options: Options) -> list[str]:
    """Before anything starts: what the experiments leave out. Raises InputError.

    For all, what one of them does not take is left out of that one and said; for one it is refused.
    """
    check_values(options)
    refused = {one: not_taken(one, options) for one in names(name)}
    if name != "all":
        for error in refused[names(name)[0]].values():
            raise error
        check_place(names(name)[0], options)
    return [str(error) for errors in refused.values() for error in errors.values()]


def heeded(name: str, options: Options) -> Options:
    """Without what the experiment does not take."""
    own = Options()
    return replace(options, **{field: getattr(own, field) for field in not_taken(name, options)})


async def run_experiment(
    name: str, options: Options, directory: Path, progress: Progress
) -> Results:
    """Run, save, draw the report. Runs are saved one by one, so a failure loses only its own: the
    report then shows those that were measured, and says what ended them."""
    check_place(name, options)
    module = importlib.import_module(f"intentd.testbed.experiments.{name}")
    try:
        results: Results = await module.run(options, directory, progress)
    except Exception as error:
        with contextlib.suppress(InputError):  # nothing was measured
            results = await asyncio.to_thread(load_results, directory)
            why = f"{type(error).__name__}: {error}"
            results.notes.append(f"Ended early, with {len(results.runs)} runs: {why:.500}")
            await asyncio.to_thread(_save_and_draw, results, directory)
        raise
    late = [run for run in results.runs if run.arrival_lag_s > LATE_S]
    if late:
        results.notes.append(
            f"In {len(late)} of {len(results.runs)} runs arrivals were played more than "
            f"{LATE_S * 1e3:g} ms late on average: the machine was busy with something else, and "
            "their figures are worth little."
        )
    progress("drawing the report")
    await asyncio.to_thread(_save_and_draw, results, directory)
    return results


def _save_and_draw(results: Results, directory: Path) -> None:
    save(results, directory)
    write_report(directory)


def summary(results: Results, directory: Path) -> dict[str, Any]:
    """The JSON document of a command: means over seeds in seconds, checks, where things are."""
    return {
        "experiment": results.experiment,
        "directory": str(directory),
        "report": str(directory / "report.html"),
        "options": results.options,
        "machine": results.machine,
        "notes": results.notes,
        "runs": [
            {
                "workload": workload,
                "load": load,
                "policy": label,
                "seeds": len(runs),
                "flows": sum(run.flows for run in runs),
                "stalled": sum(run.stalled for run in runs),
                "kernel": _means(over_seeds(runs)),
                "simulator": _means(over_seeds(runs, "simulator")),
                "busy_share": runs[0].busy_share,
                "floor_s": runs[0].floor_s,
                "handover": _means(over_seeds(runs, "handover")),
                "degraded": dict(sum((Counter(run.degraded) for run in runs), Counter())),
                "steal_share": max(run.steal_share for run in runs),
            }
            for workload, load in results.groups()
            for label in results.labels(workload, load)
            for runs in [results.select(workload, load, label)]
        ],
        "checks": [
            {
                "figure": check.figure,
                "value": check.value,
                "sense": check.sense,
                "bar": check.bar,
                "holds": check.holds,
            }
            for check in results.checks
        ],
    }


def _means(row: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {f"{name}_s": mean for name, (mean, _) in row.items()}


def completion_rows(results: Results) -> Iterable[list[object]]:
    """For a terminal: workload, policy, milliseconds per metric."""
    for workload, load in results.groups():
        for label in results.labels(workload, load):
            row = over_seeds(results.select(workload, load, label))
            cells = [f"{1e3 * row[name][0]:.4g}" if name in row else "-" for name in METRICS]
            yield [workload, f"{load:.0%}", label, *cells]
