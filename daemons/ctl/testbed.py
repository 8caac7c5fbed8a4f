"""``intentctl testbed``: the evaluation a user can run."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.errors import InputError, IntentdError
from intentd.core.units import parse_duration_s, parse_rate_bps, parse_size_bytes
from intentd.daemons.ctl.output import ExitCode, JsonOption, message, print_json, print_table

app = typer.Typer(help="Run experiments on the real kernel and draw their reports.")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


@app.command("list")
def list_experiments(as_json: JsonOption = False) -> None:
    """What can be run."""
    from intentd.testbed.experiments.options import EXPERIMENTS

    if as_json:
        print_json({"experiments": [{"name": n, "shows": t} for n, t in EXPERIMENTS.items()]})
        return
    print_table(["experiment", "shows"], list(EXPERIMENTS.items()))


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="Experiment, see `testbed list`, or all.")],
    workload: Annotated[
        str, typer.Option(help="Workloads or CDF files, comma-separated.", show_default="its own")
    ] = "",
    policies: Annotated[
        str, typer.Option(help="Policies, comma-separated.", show_default="its own")
    ] = "",
    load: Annotated[
        str, typer.Option(help="Loads in (0, 1), comma-separated.", show_default="its own")
    ] = "",
    duration: Annotated[
        str, typer.Option(help="Of one run, such as 30s.", show_default="its own")
    ] = "0",
    seeds: Annotated[
        int, typer.Option(help="Runs of each kind.", min=0, show_default="its own")
    ] = 0,
    first_seed: Annotated[int, typer.Option(help="Seed of the first run.", min=0)] = 1,
    rate: Annotated[str, typer.Option(help="Capacity of the bottleneck.")] = "1Gbit",
    scale: Annotated[
        float, typer.Option(help="Factor on flow sizes.", show_default="the workload's")
    ] = 0.0,
    gate: Annotated[str, typer.Option(help="agent, or local: in the client's process.")] = "agent",
    rounds: Annotated[
        int, typer.Option(help="Kills, for faults.", min=0, show_default="its own")
    ] = 0,
    early_fin: Annotated[
        str,
        typer.Option(
            "--early-fin",
            help="Bytes left when a turn is announced, in overall.",
            show_default="a millisecond of the link",
        ),
    ] = "",
    repeats: Annotated[
        int, typer.Option(min=0, max=100, help="Play disturbed runs again, at most so often.")
    ] = 3,
    ipv6: Annotated[bool, typer.Option("--ipv6", help="Flows over IPv6.")] = False,
    loopback: Annotated[
        bool, typer.Option("--loopback", help="Without namespaces, unshaped.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Parent of the result directories.", show_default="results")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment; results, CSV and an HTML report go to results/NAME-TIME.

    Exit status 4 if a figure missed its bar, 1 if a daemon or a process of the testbed failed.
    With all, the others still run.
    """
    from intentd.testbed import netns
    from intentd.testbed.experiments.options import Options

    unshaped = loopback
    if not loopback and (reason := netns.unavailable()):
        message(f"{reason}: on the loopback, gated and marked but not shaped")
        unshaped = True
    options = Options(
        workloads=_words(workload),
        policies=_words(policies),
        loads=tuple(_share(word) for word in _words(load)),
        duration_s=parse_duration_s(duration, "duration"),
        seeds=seeds,
        first_seed=first_seed,
        rate_bps=parse_rate_bps(rate),
        scale=scale or None,
        gate=gate,
        namespaces=not unshaped,
        ipv6=ipv6,
        rounds=rounds,
        early_fin_bytes=parse_size_bytes(early_fin, "early_fin") if early_fin else None,
        repeats=repeats,
    )
    documents = _run_each(name, options, out, as_json)
    if as_json:
        print_json(documents[0] if name != "all" else {"experiments": documents})
    if any("error" in document for document in documents):
        raise typer.Exit(int(ExitCode.FAILED))
    if any(not check["holds"] for document in documents for check in document["checks"]):
        raise typer.Exit(int(ExitCode.DEGRADED))


def _run_each(name: str, options: Any, out: Path | None, as_json: bool) -> list[dict[str, Any]]:
    """One document an experiment; with all, one that fails leaves the others theirs."""
    from intentd.testbed import runner
    from intentd.testbed.experiments.options import check_place

    documents: list[dict[str, Any]] = []
    for left_out in runner.check(name, options):
        message(f"left out: {left_out}")
    for experiment in runner.names(name):
        own = runner.heeded(experiment, options)
        try:
            check_place(experiment, own)
            directory = runner.new_directory(experiment, out or runner.RESULTS_DIR)
            results = asyncio.run(
                runner.run_experiment(experiment, own, directory, _progress(experiment))
            )
        except IntentdError as error:
            if name != "all":
                raise
            message(f"{experiment}: {error}")
            documents.append({"experiment": experiment, "error": str(error), "checks": []})
            continue
        documents.append(runner.summary(results, directory))
        if not as_json:
            _show(results, directory)
    return documents


@app.command("report")
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of an experiment.")],
    as_json: JsonOption = False,
) -> None:
    """Draw the HTML report of an experiment again."""
    from intentd.testbed import runner
    from intentd.testbed.report import write_report
    from intentd.testbed.results import load as load_results

    path = write_report(directory)
    if as_json:
        print_json(runner.summary(load_results(directory), directory))
    else:
        print(path)


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError("load", word, "a share of the link in (0, 1)") from None


def _progress(name: str) -> Any:
    """One line that is rewritten on a terminal, one line a change elsewhere."""
    terminal = os.isatty(2)

    def say(text: str) -> None:
        if terminal:
            os.write(2, f"\r\x1b[K{name}: {text}".encode())
        else:
            message(f"{name}: {text}")

    return say


def _show(results: Any, directory: Path) -> None:
    from intentd.testbed import runner
    from intentd.testbed.metrics import METRICS
    from intentd.testbed.plots import metric_name

    if os.isatty(2):
        message("")
    columns = ["workload", "load", "policy", *(f"{metric_name(m)}, ms" for m in METRICS)]
    print_table(columns, list(runner.completion_rows(results)), results.title)
    for check in results.checks:
        verdict = "holds " if check.holds else "MISSED"
        print(f"{verdict} {check.figure}: {check.value:.4g} ({check.sense} {check.bar:g})")
    for note in results.notes:
        print(f"note: {note}")
    print(f"report: {directory / 'report.html'}")
