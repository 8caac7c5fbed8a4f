"""intentctl pareto: Pareto-optimal scheduler configurations, searched and shown."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.ctl import pareto_live
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.sim_jobs import (
    JOBS,
    LOAD,
    FailuresOption,
    FirstOption,
    GpusOption,
    JobsOption,
    LoadOption,
    MinRuntimeOption,
    MtbfOption,
    PreemptOption,
    RepairOption,
    ResizeOption,
    ScalingOption,
    SeedOption,
    StartOption,
    TraceOption,
    WorkloadOption,
    chosen_failures,
    one_source,
    read_text,
    read_trace,
    unused,
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

    one_source(trace, workload)
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
    jobs: JobsOption = None,
    load: LoadOption = None,
    seed: SeedOption = 1,
    whole: Annotated[
        bool, typer.Option("--whole", help="Train on the whole trace and test on nothing.")
    ] = False,
    predictions: Annotated[
        float, typer.Option(help="Share of the jobs that are predicted in an evaluation.")
    ] = 1.0,
    fractional: Annotated[bool, typer.Option("--fractional", help="Fractions of GPUs.")] = False,
    start_s: StartOption = 0.0,
    resize_s: ResizeOption = 0.0,
    preempt_s: PreemptOption = 0.0,
    min_runtime_s: MinRuntimeOption = 0.0,
    failures: FailuresOption = None,
    mtbf: MtbfOption = "",
    repair: RepairOption = "",
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
    from intentd.core.jobs.policy import Costs

    _writable(out, "--out")
    _writable(chart, "--chart", (".html", ".png"))
    wanted = parse_objectives(objectives)
    one_source(trace, workload)
    if trace is not None:
        unused({"--load": load}, "--trace")
    else:
        whole_ = True if whole else None
        unused({"--scaling": scaling, "--first": first, "--whole": whole_}, "--workload")
    options = {
        "jobs": JOBS if jobs is None else jobs,
        "load": LOAD if load is None else load, "gpus": gpus, "seed": seed, "samples": samples,
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
        costs=Costs(start_s, resize_s, preempt_s, min_runtime_s),
        integral=not fractional,
        predictions=predictions,
        failures=chosen_failures(
            failures, mtbf, repair, gpus=gpus, tables=[*found.train, *found.test], seed=seed
        ),
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
    try:
        if out is not None:
            _write(out, json.dumps(_finite(document), indent=1) + "\n", "--out")
        if chart is not None:
            _chart(chart, result.front, f"{workload or trace} on {gpus} GPUs")
    finally:  # what took minutes is said, whatever becomes of the files
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


def _writable(path: Path | None, option: str, endings: tuple[str, ...] = ()) -> None:
    """Before a search that takes minutes. Raises InputError."""
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise InputError(option, str(path), f"a file that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise InputError(option, str(path), "a file, not a directory")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise InputError(option, str(path), "a file that ends in .html: matplotlib is missing")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(option, str(path), f"a writable file ({error})") from None


def _write(path: Path, text: str, option: str) -> None:
    """The whole file or the old one."""
    from intentd.daemons.kit.files import write_atomically

    try:
        if path.exists() and not path.is_file():  # a terminal, a pipe
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path, text.encode(), 0o644)
    except OSError as error:
        raise InputError(option, str(path), f"a writable file ({error})") from None


def read_result(path: Path) -> list[FrontPoint]:
    """The front of a result written by ``search``. Raises InputError."""
    from intentd.daemons.kit.files import parse_json

    plain = parse_json(read_text(path, "file"), "file", str(path))
    points: list[FrontPoint] = _solver().read_front(plain)
    return points


def _chart(path: Path, front: list[FrontPoint], title: str) -> None:
    from intentd.controller.search.chart import describe, write_chart

    if not front:
        raise InputError("--chart", "an empty front", "at least one configuration")
    side = "test" if front[0].test else "train"
    rows = [point.test or point.train for point in front]
    try:
        labels = [describe(point.policy) for point in front]
        beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        try:
            write_chart(beside, rows, labels, title=f"{title} ({side})")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
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
    _writable(chart, "--chart", (".html", ".png"))
    try:
        _show(live, front, as_json)
    finally:
        if chart is not None:
            _chart(chart, front, file.name if file is not None else "the controller's front")


def _show(live: dict[str, Any] | None, front: list[FrontPoint], as_json: bool) -> None:
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
