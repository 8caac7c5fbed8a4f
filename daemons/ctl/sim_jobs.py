"""intentctl sim jobs: a job trace or a synthetic workload under one allocation policy."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.daemons.ctl.output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from intentd.core.jobs.allocator import JobTable
    from intentd.core.jobs.policy import Costs, JobsPolicy
    from intentd.core.jobs.traces import Scaling
    from intentd.core.sim.jobs import Failure

MAX_FILE_BYTES = 512 * 2**20
LATE = 4.0  # times the whole work after the last arrival: when failures that are drawn end
REVIEWS = 200  # times in a run that all active jobs are predicted anew, as a daemon would

TraceOption = Annotated[
    Path | None,
    typer.Option(help="Job trace: our CSV, Philly's cluster_job_log JSON, Alibaba or Pollux CSV."),
]
WorkloadOption = Annotated[str | None, typer.Option(help="workload-1 or workload-3.")]
JOBS, LOAD = 1000, 0.8
JobsOption = Annotated[
    int | None, typer.Option(min=1, help="Jobs of the synthetic workload.", show_default=str(JOBS))
]
LoadOption = Annotated[
    float | None,
    typer.Option(help="Offered load of the synthetic workload.", show_default=str(LOAD)),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")]
GpusOption = Annotated[int, typer.Option(help="GPUs of the cluster.")]
FirstOption = Annotated[int | None, typer.Option(min=1, help="Only the first N jobs.")]
ScalingOption = Annotated[
    Path | None,
    typer.Option(help="model,gpus,speedup CSV (default: scaling.csv beside the trace, if there)."),
]


FailuresOption = Annotated[
    Path | None, typer.Option(help="GPUs that fail: CSV at_s,gpus,repair_s.")
]
MtbfOption = Annotated[
    str, typer.Option(help="Instead: mean time between failures of a GPU, such as 30d.")
]
RepairOption = Annotated[
    str, typer.Option(help="How long a failed GPU is away, with --mtbf.", show_default="1h")
]
StartOption = Annotated[float, typer.Option(help="Cost of a start.")]
ResizeOption = Annotated[float, typer.Option(help="Cost of a resize.")]
PreemptOption = Annotated[float, typer.Option(help="Cost of a preemption.")]
MinRuntimeOption = Annotated[float, typer.Option(help="No preemption before.")]


def chosen_failures(
    file: Path | None, mtbf: str, repair: str, *, gpus: int, tables: Sequence[JobTable], seed: int
) -> tuple[Failure, ...]:
    """The failures that --failures or --mtbf name, until the jobs could long be done."""
    from intentd.core.sim.failures import draw_failures, read_failures
    from intentd.core.units import parse_duration_s

    if file is not None and (mtbf or repair):
        raise InputError("--failures", f"{file} and --mtbf or --repair", "the one or the other")
    if file is not None:
        return read_failures(read_text(file, "--failures"), gpus)
    if not mtbf:
        if repair:
            raise InputError("--repair", repair, "--mtbf with it")
        return ()
    until_s = max(
        float(table.submit_s[-1]) + LATE * float(table.work_gpu_s.sum()) / gpus for table in tables
    )
    return draw_failures(
        mtbf_s=parse_duration_s(mtbf, "--mtbf"),
        repair_s=parse_duration_s(repair or "1h", "--repair"),
        gpus=gpus,
        until_s=until_s,
        seed=seed,
    )


def read_text(path: Path, option: str) -> str:
    """A text file of bounded size. Raises InputError."""
    from intentd.daemons.kit.files import read_text as read

    return read(path, option, MAX_FILE_BYTES)


def chosen_scaling(scaling: Path | None, trace: Path) -> Scaling:
    """The scaling table of a trace; its repairs are said on stderr."""
    from intentd.core.jobs.traces import Scaling, read_scaling

    beside = trace.parent / "scaling.csv"
    if scaling is None and not beside.exists():
        return Scaling()
    table = read_scaling(read_text(scaling or beside, "--scaling"))
    for warning in table.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return table


def read_trace(path: Path, scaling: Path | None, first: int | None) -> JobTable:
    """Any of the formats, told apart by their columns. Raises InputError."""
    from intentd.core.jobs import traces

    text = read_text(path, "--trace")
    head = text[:4096].lstrip()
    if head.startswith(("[", "{")):
        return traces.read_philly(text, first)
    columns = [name.strip() for name in head.split("\n", 1)[0].split(",")]
    if "gpu_milli" in columns:
        return traces.read_alibaba(text, first)
    if "num_replicas" in columns and "application" in columns:
        measured = {
            name: read_text(table, "--trace")
            for name in ("bert", "cifar10", "deepspeech2", "imagenet")
            if (table := path.parent / f"pollux_scaling_{name}.csv").exists()
        }
        return traces.read_pollux(text, measured, first)
    return traces.read_csv(text, chosen_scaling(scaling, path), first)


def chosen_jobs(
    trace: Path | None,
    workload: str | None,
    *,
    jobs: int | None,
    load: float | None,
    gpus: int,
    seed: int,
    first: int | None,
    scaling: Path | None,
) -> JobTable:
    """The jobs that --trace or --workload name. Raises InputError."""
    from intentd.core.jobs.workloads import synthetic

    one_source(trace, workload)
    if trace is not None:
        unused({"--jobs": jobs, "--load": load}, "--trace")
        return read_trace(trace, scaling, first)
    assert workload is not None
    unused({"--scaling": scaling}, "--workload")
    table = synthetic(
        workload,
        jobs=JOBS if jobs is None else jobs,
        load=LOAD if load is None else load,
        gpus=gpus,
        seed=seed,
    )
    return table.take(slice(0, first))


def one_source(trace: Path | None, workload: str | None) -> None:
    if (trace is None) == (workload is None):
        given = "neither" if trace is None else "both"
        raise InputError("--trace, --workload", given, "exactly one of them")


def unused(options: Mapping[str, object], beside: str) -> None:
    """Raises InputError for the first that was given though it says nothing here."""
    for option, value in options.items():
        if value is not None:
            raise InputError(option, str(value), f"nothing beside {beside}")


def read_config(path: Path, option: str = "--config") -> JobsPolicy:
    """A policy from a JSON file, as the search writes them (a bare policy, or under "config")."""
    from intentd.core.jobs.policy import from_plain
    from intentd.daemons.kit.files import parse_json

    plain = parse_json(read_text(path, option), option, str(path))
    if isinstance(plain, dict) and "config" in plain:
        plain = plain["config"]
    return from_plain(plain, option)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(option, text, "numbers separated by commas") from None


def chosen_policy(
    jobs: JobTable,
    name: str | None,
    *,
    config: Path | None,
    parameters: dict[str, float | None],
    thresholds: str | None,
    weights: str | None,
    integral: bool,
    artifact: bool,
) -> JobsPolicy:
    """The policy the options describe: a file says all of it, or none. Raises InputError."""
    from intentd.core.jobs import policy as policies

    given = {key: value for key, value in parameters.items() if value is not None}
    if config is not None:
        lists = {"thresholds": thresholds, "weights": weights}
        beside = [*given, *(key for key, text in lists.items() if text is not None)]
        if beside:
            text = " ".join(f"--{key}" for key in beside)
            raise InputError("--config", f"{config} and {text}", "the one or the other")
        read = read_config(config)
        if name not in (None, read.name):
            raise InputError("--policy", name, f"{read.name}, as --config {config} says, or none")
        return read if integral else replace(read, integral=False)
    name = name or "wfq"
    if name != "wfq":
        if given or thresholds is not None or weights is not None:
            raise InputError("--policy", name, "wfq with --T ... or --thresholds ...")
        return policies.make(name, integral=integral)
    zeta, delta = given.get("zeta", 0.5), given.get("delta", 0.1)
    if thresholds is not None or weights is not None:
        if thresholds is None or weights is None or "T" in given or "W" in given:
            raise InputError("--thresholds, --weights", thresholds, "both, and neither --T nor --W")
        limits = _numbers(thresholds, "--thresholds") if thresholds.strip() else ()
        limits = limits if limits and limits[-1] == math.inf else (*limits, math.inf)
        shares = _numbers(weights, "--weights")
        return policies.JobsPolicy("wfq", limits, shares, zeta=zeta, delta=delta, integral=integral)
    return policies.wfq(
        jobs.sizes_gpu_s,
        T=given.get("T", 1.0),
        W=given.get("W", 1.0),
        zeta=zeta,
        delta=delta,
        integral=integral,
        artifact=artifact,
    )


def per_job_csv(result: Any, bounds: Any) -> str:
    """One line a job: times in seconds, NaN empty."""
    out = result.outcome
    columns = {
        "submit_s": result.jobs.submit_s,
        "start_s": out.start_s,
        "finish_s": out.finish_s,
        "predicted_s": out.predicted_s,
        "p90_s": bounds,
        "fair_s": out.fair_s,
        "service_gpu_s": result.jobs.work_gpu_s,
        "preemptions": out.preemptions,
        "resizes": out.resizes,
    }
    lines = ["job_id," + ",".join(columns)]
    for j in range(len(result.jobs)):
        values = (float(column[j]) for column in columns.values())
        lines.append(f"{j}," + ",".join("" if v != v else f"{v:.9g}" for v in values))
    return "\n".join(lines) + "\n"


def jobs_command(
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    jobs: JobsOption = None,
    load: LoadOption = None,
    seed: SeedOption = 1,
    gpus: GpusOption = 64,
    policy: Annotated[
        str | None,
        typer.Option(help="fifo, srsf, themis, afs, maxmin or wfq.", show_default="wfq"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Policy as JSON, instead.")] = None,
    t: Annotated[float | None, typer.Option("--T", help="C^2 limit of a class.")] = None,
    w: Annotated[float | None, typer.Option("--W", help="Weights are exp(-i W).")] = None,
    zeta: Annotated[float | None, typer.Option(help="Least efficiency of a grant.")] = None,
    delta: Annotated[float | None, typer.Option(help="Step of its relaxation.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Class limits in GPU seconds, the last (inf) implied.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One weight a class.")] = None,
    scaling: ScalingOption = None,
    first: FirstOption = None,
    artifact: Annotated[
        bool, typer.Option("--artifact", help="Compute as the authors' simulator does.")
    ] = False,
    fractional: Annotated[
        bool, typer.Option("--fractional", help="Fractions of GPUs (implied by --artifact).")
    ] = False,
    predictions: Annotated[
        float, typer.Option(help="Share of the jobs to predict (1: all).")
    ] = 1.0,
    no_predict: Annotated[bool, typer.Option("--no-predict", help="No predictions.")] = False,
    size_error: Annotated[
        float, typer.Option(help="Sizes are known within +- this, in percent.")
    ] = 0.0,
    start_s: StartOption = 0.0,
    resize_s: ResizeOption = 0.0,
    preempt_s: PreemptOption = 0.0,
    min_runtime_s: MinRuntimeOption = 0.0,
    failures: FailuresOption = None,
    mtbf: MtbfOption = "",
    repair: RepairOption = "",
    per_job: Annotated[Path | None, typer.Option(help="Write one CSV line a job.")] = None,
    as_json: JsonOption = False,
) -> None:
    """JCT, prediction error and unfairness of one policy; errors and unfairness in percent."""
    from intentd.core.jobs.policy import Costs
    from intentd.core.jobs.predictor import replay
    from intentd.core.sim.jobs import Options, simulate

    table = chosen_jobs(
        trace, workload, jobs=jobs, load=load, gpus=gpus, seed=seed, first=first, scaling=scaling
    )
    chosen = chosen_policy(
        table,
        policy,
        config=config,
        parameters={"T": t, "W": w, "zeta": zeta, "delta": delta},
        thresholds=thresholds,
        weights=weights,
        integral=not (artifact or fractional),
        artifact=artifact,
    )
    costs: Costs = Costs(start_s, resize_s, preempt_s, min_runtime_s)
    options = Options(
        predictions=0.0 if no_predict else predictions,
        error_percent=size_error,
        seed=seed,
        artifact=artifact,
        costs=costs,
        failures=chosen_failures(failures, mtbf, repair, gpus=gpus, tables=[table], seed=seed),
        review_every=0 if no_predict else max(1, len(table) // REVIEWS),
    )
    begin = time.perf_counter()
    result = simulate(table, chosen, gpus, options)
    wall_s = time.perf_counter() - begin
    bounds = replay(table, result.outcome)
    document = result.summary() | {
        "coverage_p90": bounds.coverage_percent,
        "p90_width": bounds.median_width,
        "wall_s": wall_s,
        "failures": len(options.failures),
    }
    if per_job is not None:
        try:
            per_job.write_text(per_job_csv(result, bounds.upper_s), encoding="utf-8")
        except OSError as error:
            raise InputError("--per-job", str(per_job), f"a writable file ({error})") from None
    if as_json:
        print_json(document)
        return
    print_table(
        ("figure", "value"),
        [(name, f"{v:.6g}" if isinstance(v, float) else v) for name, v in document.items()],
        f"{chosen.name}, {len(table)} jobs on {gpus} GPUs",
    )
