"""intentctl sim: the decisions of the daemons on a virtual clock."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from intentd.core.errors import InputError
from intentd.daemons.ctl.flows import (
    CdfOption,
    JsonOption,
    SeedOption,
    ThresholdsOption,
    WorkloadOption,
    chosen_thresholds,
    chosen_workload,
)
from intentd.daemons.ctl.sim_jobs import jobs_command

if TYPE_CHECKING:
    from intentd.core.sim.fault_runs import FaultRun, Faults

app = typer.Typer(help="Simulations that drive the daemons' own code.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps the commands of the group named, even while there is only one."""


app.command("jobs")(jobs_command)

ALL_POLICIES = "2d,2d-boost,htb,ps,fifo,srpt,np-sjf,baraat,aalo,pias,lps"
CLASS_SAMPLES = 100_000
MAX_SEEDS = 10_000_000
SEED_DIGITS = 18
SEEDS_AT_ONCE = 5_000
MAX_PROCESSES = 1024


@app.command("flows")
def flows(
    workload: WorkloadOption = None,
    cdf: CdfOption = None,
    load: Annotated[float, typer.Option(help="Offered share of the link.")] = 0.8,
    flows: Annotated[int, typer.Option(help="Flows in the trace.")] = 100_000,
    seed: SeedOption = 1,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ALL_POLICIES,
    rate: Annotated[str, typer.Option(help="Capacity of the link.")] = "10Gbit",
    thresholds: ThresholdsOption = "algorithm1",
    weights: Annotated[
        str, typer.Option(help="job-shares, or virtual-ps (equation 2.1 at every event).")
    ] = "job-shares",
    as_json: JsonOption = False,
) -> None:
    """Completion times of one trace under each policy, on one fluid link."""
    item = chosen_workload(workload, cdf)
    preset = chosen_thresholds(item, thresholds)
    if weights not in ("job-shares", "virtual-ps"):
        raise InputError("--weights", weights, "job-shares or virtual-ps")
    import numpy as np

    from intentd.core.flows.classes import policy_from_sample
    from intentd.core.flows.sampling import poisson_trace, sample_sizes
    from intentd.core.sim.flows import NO_MAX_WAIT_S, fct_metrics, simulate, simulate_srpt
    from intentd.core.units import format_rate, parse_rate_bps

    link_bps = parse_rate_bps(rate, "--rate")
    names = _policy_names(policies)
    trace = poisson_trace(item.cdf, load=load, rate_bps=link_bps, flows=flows, seed=seed)

    # The classes come from flows that are not in the trace: a generator of its own.
    sample = sample_sizes(item.cdf, CLASS_SAMPLES, np.random.default_rng([seed, 1]))
    results: dict[str, dict[str, float]] = {}
    for position, name in enumerate(names):

        def show(done: int, name: str = name, position: int = position) -> None:
            text = f"\r{position + 1}/{len(names)} {name}: {done}/{flows} flows "
            print(text, end="", file=sys.stderr, flush=True)

        progress = show if sys.stderr.isatty() else None
        if name == "srpt":
            outcome = simulate_srpt(trace, link_bps, progress=progress)
        else:
            policy = policy_from_sample(
                name,
                sample,
                domain="sim",
                rate_bps=link_bps,
                load=load,
                thresholds_bytes=preset,
                workload=item.name,
                max_wait_s=NO_MAX_WAIT_S,
            )
            emulate = weights == "virtual-ps" and name in ("2d", "2d-boost", "htb")
            outcome = simulate(trace, policy, virtual_ps_weights=emulate, progress=progress)
        results[name] = fct_metrics(outcome.fct_s)
        if progress is not None:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if as_json:
        typer.echo(json.dumps({"policies": results, "link_bps": link_bps}))
        return
    typer.echo(f"{item.name}, {flows} flows at {load:.0%} of {format_rate(link_bps)}, seed {seed}")
    _show_metrics(results)


def _show_metrics(results: dict[str, dict[str, float]]) -> None:
    from intentd.core.units import format_duration

    heads = next(iter(results.values()))
    typer.echo("policy    " + "".join(f"{head.removesuffix('_s'):>10}" for head in heads))
    for name, metrics in results.items():
        cells = "".join(f"{format_duration(value):>10}" for value in metrics.values())
        typer.echo(f"{name:<10}{cells}")


def _policy_names(text: str) -> list[str]:
    from intentd.core.flows.policies import POLICIES

    known = (*POLICIES, "srpt")
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise InputError("--policies", text, f"some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise InputError("--policies", name, f"some of {', '.join(known)}")
    return names


@app.command("faults")
def faults(
    seeds: Annotated[str, typer.Option(help="A:B, the seeds A to B - 1.")] = "0:100",
    loss: Annotated[float, typer.Option(help="Share of messages lost, 0 to 0.9.")] = 0.0,
    kill: Annotated[
        bool, typer.Option("--kill", help="Kill, restart and pause agents and the sequencer.")
    ] = False,
    partition: Annotated[
        bool, typer.Option("--partition", help="Cut nodes off from each other for a time.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Restart the sequencer as planned.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    trace: Annotated[
        bool, typer.Option("--trace", help="Tell the story of each seed on standard error.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The turn protocol on a network that fails: order, progress and recovery, seed by seed.

    A seed that violates anything is printed and replays alone: --seeds S:S+1 --trace. Exit status
    1 if any did.
    """
    from intentd.core.sim.fault_runs import Faults, add_up

    first, last = _seed_range(seeds)
    if not 0 <= loss <= 0.9:
        raise InputError("--loss", loss, "a share in 0 to 0.9")
    if jobs < 0:
        raise InputError("--jobs", jobs, "0 or a number of processes")
    wrong = Faults(loss, kill, partition, restart)
    switches = f"{f' --loss {loss}' if loss else ''}{' --kill' if kill else ''}"
    switches += f"{' --partition' if partition else ''}{' --restart' if restart else ''}"
    runs = _told(first, last, wrong) if trace else _run_seeds(range(first, last), wrong, jobs)
    total = add_up(_with_failures(runs, switches))
    if as_json:
        typer.echo(json.dumps(total))
    else:
        for name, value in total.items():
            typer.echo(f"{name:<18} {value}")
    if total["failed_seeds"]:
        raise typer.Exit(1)


def _told(first: int, last: int, wrong: Faults) -> Iterator[FaultRun]:
    """One after the other, each with its story."""
    from intentd.core.sim.faults import run_seed

    for seed in range(first, last):
        run = run_seed(seed, wrong, trace=True)
        for line in run.story:
            print(f"{seed}: {line}", file=sys.stderr)
        yield run


def _with_failures(runs: Iterator[FaultRun], switches: str) -> Iterator[FaultRun]:
    """Says of each seed that failed how to replay it, as it comes."""
    for run in runs:
        if run.violations:
            again = f"intentctl sim faults --seeds {run.seed}:{run.seed + 1}{switches} --trace"
            print(
                f"seed {run.seed} failed: {run.violations[0]}\n  replay: {again}", file=sys.stderr
            )
        yield run


def _seed_range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    good = colon and all(t.isdecimal() and len(t) <= SEED_DIGITS for t in (first, last))
    if not good or int(first) >= int(last):
        raise InputError("--seeds", text, "A:B with 0 <= A < B")
    if int(last) - int(first) > MAX_SEEDS:
        raise InputError("--seeds", text, f"at most {MAX_SEEDS} seeds")
    return int(first), int(last)


def _run_seeds(seeds: range, wrong: Faults, jobs: int) -> Iterator[FaultRun]:
    """All seeds over processes, a batch at a time; progress on a terminal's standard error."""
    import os
    from concurrent.futures import ProcessPoolExecutor
    from functools import partial
    from multiprocessing import get_context

    from intentd.core.sim.faults import run_seed

    workers = min(jobs or os.cpu_count() or 1, len(seeds), MAX_PROCESSES)
    if workers == 1:
        yield from (run_seed(seed, wrong) for seed in seeds)
        return
    done = 0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for at in range(0, len(seeds), SEEDS_AT_ONCE):
            batch = seeds[at : at + SEEDS_AT_ONCE]
            for run in pool.map(partial(run_seed, faults=wrong), batch, chunksize=10):
                done += 1
                if sys.stderr.isatty() and done % 100 == 0:
                    print(f"\r{done}/{len(seeds)} seeds ", end="", file=sys.stderr, flush=True)
                yield run
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
