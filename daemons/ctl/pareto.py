"""intentctl pareto: Pareto-optimal scheduler configurations, searched and shown."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.ctl import pareto_live
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.sim_jobs import (
    FirstOption,
    GpusOption,
    JobsOption,
    LoadOption,
    ScalingOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
    read_text,
    read_trace,
)

if TYPE_CHECKING:
    from intentd.controller.search.histories import Histories
    from intentd.controller.search.solver import FrontPoint

app = typer.Typer(help="Trade-offs of the GPU scheduler.", no_args_is_help=True)
app.command("set")(pareto_live.set_preference)
app.command("update")(pareto_live.update)
app.command("cancel")(pareto_live.cancel)
app.command("status")(pareto_live.status)
app.command("apply")(pareto_live.apply)
SHOWN = 15


def _solver() -> Any:
    try:
        from intentd.controller.search import solver
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("intentd"):
            raise
        text = f"{error.name} is not installed (pip install 'intentd[controller]')"
        raise IntentdError(f"pareto search: {text}") from None
    return solver


def _histories(
    trace: Path | None, workload: str | None, whole: bool, options: dict[str, Any]
) -> Histories:
    from intentd.controller.search import histories

    if (trace is None) == (workload is None):
        given = "neither" if trace is None else "both"
        raise InputError("--trace, --workload", given, "exactly one of them")
    common = {name: options[name] for name in ("jobs", "seed", "samples")}
    if workload is not None:
        return histories.of_workload(workload, load=options["load"], gpus=options["gpus"], **common)
    assert trace is not None
    table = read_trace(trace, options["scaling"], options["first"])
    return histories.of_trace(table, whole=whole, **common)


@app.command("search")
def search(
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    gpus: GpusOption = 64,
    objectives: Annotated[
        str, typer.Option(help="metric:measure, comma-separated; jct, prederr, unfairness.")
    ] = "jct:avg,prederr:avg",
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations of a search.")] = 1000,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    algorithm: Annotated[str, typer.Option(help="spea2 or nsga2.")] = "spea2",
    space: Annotated[
        str, typer.Option(help="direct (thresholds, weights), wfq (T, W, zeta, delta), both.")
    ] = "direct",
    samples: Annotated[int, typer.Option(help="Training histories a point is tried on.")] = 3,
    jobs: JobsOption = 1000,
    load: LoadOption = 0.8,
    seed: SeedOption = 1,
    whole: Annotated[
        bool, typer.Option("--whole", help="Train on the whole trace and test on nothing.")
    ] = False,
    predictions: Annotated[
        float, typer.Option(help="Share of the jobs that are predicted in an evaluation.")
    ] = 1.0,
    fractional: Annotated[bool, typer.Option("--fractional", help="Fractions of GPUs.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes (default: cores).")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster.")] = None,
    warm: Annotated[Path | None, typer.Option(help="Start from this earlier result.")] = None,
    scaling: ScalingOption = None,
    first: FirstOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a chart, .html or .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Search the trade-offs; progress on stderr, Ctrl-C keeps what was found so far."""
    from intentd.core.jobs.metrics import parse_objectives

    wanted = parse_objectives(objectives)
    options = {
        "jobs": jobs, "load": load, "gpus": gpus, "seed": seed, "samples": samples,
        "scaling": scaling, "first": first,
    }  # fmt: skip
    found = _histories(trace, workload, whole, options)
    solver = _solver()
    budget = solver.Budget(evaluations, seconds)
    start = [point.policy for point in read_result(warm)] if warm is not None else []
    search_ = solver.PreferenceSolver(
        gpus,
        found.train,
        found.test,
        integral=not fractional,
        predictions=predictions,
        judge=found.judge,
    )
    search_.set_preference(wanted)
    result = search_.update_pareto_front(
        algorithm=algorithm,
        space=space,
        budget=budget,
        seed=seed,
        workers=workers,
        ray=ray,
        warm=start,
        progress=_Bar(),
    )
    source = {
        "trace": str(trace) if trace else None, "workload": workload, "whole": whole,
        **{name: str(value) if isinstance(value, Path) else value
           for name, value in options.items()},
    }  # fmt: skip
    document = result.to_plain()
    document["settings"]["source"] = source
    document["settings"]["versions"] = _versions()
    if out is not None:
        _write(out, json.dumps(_finite(document), indent=1) + "\n", "--out")
    if chart is not None:
        _chart(chart, result.front, f"{workload or trace} on {gpus} GPUs")
    if as_json:
        print_json(document)
    else:
        _table(result.front)
        message(f"{result.evaluations} evaluations in {result.wall_s:.1f} s")


class _Bar:
    """One line on stderr, where it is a terminal; an interrupt asks for the result so far."""

    def __init__(self) -> None:
        self._interrupted = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one means it

    def __call__(self, done: int, total: int, values: Any) -> bool:
        if sys.stderr.isatty():
            filled = 30 * done // total
            bar = "#" * filled + "." * (30 - filled)
            end = "\n" if done >= total or self._interrupted else ""
            print(f"\r[{bar}] {done}/{total}", end=end, file=sys.stderr, flush=True)
        return not self._interrupted


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import intentd

    return {"intentd": intentd.__version__, "pymoo": version("pymoo"), "numpy": version("numpy")}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(option, str(path), f"a writable file ({error})") from None


def read_result(path: Path) -> list[FrontPoint]:
    """The front of a result written by ``search``. Raises InputError."""
    try:
        plain = json.loads(read_text(path, "file"))
    except ValueError as error:
        raise InputError("file", str(path), f"a JSON document ({error})") from None
    points: list[FrontPoint] = _solver().read_front(plain)
    return points


def _chart(path: Path, front: list[FrontPoint], title: str) -> None:
    from intentd.controller.search.chart import describe, write_chart

    side = "test" if front and front[0].test else "train"
    rows = [point.test or point.train for point in front]
    try:
        labels = [describe(point.policy) for point in front]
        write_chart(path, rows, labels, title=f"{title} ({side})")
    except OSError as error:
        raise InputError("--chart", str(path), f"a writable file ({error})") from None


def _table(front: list[FrontPoint]) -> None:
    from intentd.controller.search.chart import describe

    if not front:
        message("no configuration was found")
        return
    names = list(front[0].train)
    step = max(1, -(-len(front) // SHOWN))
    rows = [
        (
            index,
            *(f"{point.train[name]:.5g}" for name in names),
            *(f"{point.test[name]:.5g}" if point.test else "" for name in names),
            describe(point.policy),
        )
        for index, point in enumerate(front)
        if index % step == 0 or index == len(front) - 1
    ]
    heads = ("#", *names, *(f"test {name}" for name in names), "configuration")
    print_table(heads, rows, f"{len(front)} Pareto-optimal configurations")


@app.command("show")
def show(
    file: Annotated[
        Path | None, typer.Argument(help="A result of `pareto search --out`; else the live front.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a chart, .html or .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The front of an earlier search, or of the controller, as a table, JSON or chart."""
    live = pareto_live.live_front() if file is None else None
    front = read_result(file) if file is not None else _solver().read_front(live)
    if chart is not None:
        _chart(chart, front, file.name if file is not None else "the controller's front")
    if live is not None and not as_json:
        print(f"front {live['number']} ({live['reason']}); in force: {live['in_force']}")
        if live.get("present"):
            values = live["present"]["test"].items()
            print("present policy: " + ", ".join(f"{name} {value:.5g}" for name, value in values))
    if live is not None and as_json:
        print_json(live)
        return
    if as_json:
        print_json({"front": [point.to_plain() for point in front]})
    else:
        _table(front)
