"""intentctl sim jobs: a job trace or a synthetic workload under one allocation policy."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.daemons.ctl.output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from intentd.core.jobs.allocator import JobTable
    from intentd.core.jobs.policy import Costs, JobsPolicy
    from intentd.core.jobs.traces import Scaling

MAX_FILE_BYTES = 512 * 2**20
REVIEWS = 200  # times in a run that all active jobs are predicted anew, as a daemon would

TraceOption = Annotated[
    Path | None,
    typer.Option(help="Job trace: our CSV, Philly's cluster_job_log JSON, Alibaba or Pollux CSV."),
]
WorkloadOption = Annotated[str | None, typer.Option(help="workload-1 or workload-3.")]
JobsOption = Annotated[int, typer.Option(min=1, help="Jobs of the synthetic workload.")]
LoadOption = Annotated[float, typer.Option(help="Offered load of the synthetic workload.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")]
GpusOption = Annotated[int, typer.Option(help="GPUs of the cluster.")]
FirstOption = Annotated[int | None, typer.Option(min=1, help="Only the first N jobs.")]
ScalingOption = Annotated[
    Path | None,
    typer.Option(help="model,gpus,speedup CSV (default: scaling.csv beside the trace, if there)."),
]


def read_text(path: Path, option: str) -> str:
    """A text file of bounded size. Raises InputError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(option, str(path), f"a file of at most {MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(option, str(path), f"a readable text file ({error})") from None


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
    jobs: int,
    load: float,
    gpus: int,
    seed: int,
    first: int | None,
    scaling: Path | None,
) -> JobTable:
    """The jobs that --trace or --workload name. Raises InputError."""
    from intentd.core.jobs.workloads import synthetic

    if (trace is None) == (workload is None):
        given = "neither" if trace is None else "both"
        raise InputError("--trace, --workload", given, "exactly one of them")
    if trace is not None:
        return read_trace(trace, scaling, first)
    assert workload is not None
    table = synthetic(workload, jobs=jobs, load=load, gpus=gpus, seed=seed)
    return table.take(slice(0, first))


def read_config(path: Path, option: str = "--config") -> JobsPolicy:
    """A policy from a JSON file, as the search writes them (a bare policy, or under "config")."""
    from intentd.core.jobs.policy import from_plain

    try:
        plain = json.loads(read_text(path, option))
    except ValueError as error:
        raise InputError(option, str(path), f"a JSON document ({error})") from None
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
    name: str,
    *,
    config: Path | None,
    parameters: dict[str, float | None],
    thresholds: str | None,
    weights: str | None,
    integral: bool,
    artifact: bool,
) -> JobsPolicy:
    """The policy the options describe. Raises InputError."""
    from intentd.core.jobs import policy as policies

    given = {key: value for key, value in parameters.items() if value is not None}
    if name != "wfq":
        if given or thresholds or weights or config:
            raise InputError("--policy", name, "wfq with --config, --T ... or --thresholds ...")
        return policies.make(name, integral=integral)
    if config is not None:
        return read_config(config)
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
    jobs: JobsOption = 1000,
    load: LoadOption = 0.8,
    seed: SeedOption = 1,
    gpus: GpusOption = 64,
    policy: Annotated[str, typer.Option(help="fifo, srsf, themis, afs, maxmin or wfq.")] = "wfq",
    config: Annotated[Path | None, typer.Option(help="WFQ policy as JSON.")] = None,
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
    start_s: Annotated[float, typer.Option(help="Cost of a start.")] = 0.0,
    resize_s: Annotated[float, typer.Option(help="Cost of a resize.")] = 0.0,
    preempt_s: Annotated[float, typer.Option(help="Cost of a preemption.")] = 0.0,
    min_runtime_s: Annotated[float, typer.Option(help="No preemption before.")] = 0.0,
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
        f"{policy}, {len(table)} jobs on {gpus} GPUs",
    )
