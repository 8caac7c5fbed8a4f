"""intentctl flows: size classes, live state of the domains, why a flow waited."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intentd.core.errors import InputError

if TYPE_CHECKING:
    from intentd.core.flows.workloads import Workload

app = typer.Typer(help="Network flows: classes, queues, completion times.")

MAX_FILE_BYTES = 64 * 2**20
_FCT = ("mean_s", "p50_s", "p90_s", "p99_s", "p995_s")

WorkloadOption = Annotated[
    str | None,
    typer.Option(help="data-mining, web-search, cache, hadoop, uniform or uniform-chapter."),
]
CdfOption = Annotated[
    Path | None, typer.Option(help="File of size_bytes,cdf lines, linear between the points.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")]
ThresholdsOption = Annotated[
    str, typer.Option(help="algorithm1, or published (the prototype's own table).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


DomainOption = Annotated[str | None, typer.Option(help="Only this domain.")]


@app.callback(invoke_without_command=True)
def _group(context: typer.Context, as_json: JsonOption = False) -> None:
    """Without a command: `show` of every domain."""
    if context.invoked_subcommand is None:
        show(None, as_json)


@app.command("show")
def show(domain: DomainOption = None, as_json: JsonOption = False) -> None:
    """Classes, weights, queues and completion times over all agents (from the controller)."""
    from intentd.daemons.ctl.output import print_json, print_table
    from intentd.daemons.ctl.reach import admin_client

    page = admin_client("controller").call("flows", **({"domain": domain} if domain else {}))
    if as_json:
        print_json(page)
        return
    from intentd.core.units import format_rate, format_size

    for row in page["domains"]:
        load = "unknown" if row["load"] is None else f"{100 * row['load']:.0f} %"
        degraded = ", ".join(f"{why} {n}" for why, n in row["degraded"].items()) or "none"
        print(
            f"{row['domain']}: {row['policy'] or 'no policy yet'}, {format_rate(row['rate_bps'])}, "
            f"load {load}, {row['finished']} of {row['arrivals']} flows finished, "
            f"degraded starts: {degraded}"
        )
        print_table(
            ("class", "up to", "weight", "load", "waiting", "active", "flows",
             "FCT mean", "p50", "p90", "p99", "p99.5"),
            [
                (
                    cls["index"],
                    "inf"
                    if cls["threshold_bytes"] is None
                    else format_size(cls["threshold_bytes"]),
                    f"{cls['weight']:.4f}",
                    "" if cls["load"] is None else f"{100 * cls['load']:.1f} %",
                    cls["waiting"],
                    cls["active"],
                    cls["fct_s"]["count"],
                    *(_seconds(cls["fct_s"].get(name)) for name in _FCT),
                )
                for cls in row["classes"]
            ],
        )  # fmt: skip


@app.command("explain")
def explain(
    flow: Annotated[str, typer.Argument(help="Number of a flow of this host's agent.")],
    as_json: JsonOption = False,
) -> None:
    """What was decided for a flow, from which inputs, and what else was possible."""
    from intentd.daemons.ctl.daemon import explain as explain_any

    explain_any(flow, "agent", as_json)


def _seconds(value: float | None) -> str:
    from intentd.core.units import format_duration

    return "-" if value is None else format_duration(value)


def chosen_workload(name: str | None, cdf: Path | None) -> Workload:
    """The size distribution that --workload or --cdf names. Raises InputError."""
    from intentd.core.flows.workloads import Workload, parse_cdf, workload
    from intentd.daemons.kit.files import read_text

    if (name is None) == (cdf is None):
        given = "neither" if name is None else "both"
        raise InputError("--workload, --cdf", given, "exactly one of them")
    if name is not None:
        return workload(name)
    assert cdf is not None
    text = read_text(cdf, "--cdf", MAX_FILE_BYTES)
    return Workload(cdf.name, parse_cdf(text, str(cdf)), f"file {cdf}")


def chosen_thresholds(item: Workload, thresholds: str) -> tuple[float, ...] | None:
    """None for Algorithm 1, else the published preset. Raises InputError."""
    if thresholds == "algorithm1":
        return None
    if thresholds != "published":
        raise InputError("--thresholds", thresholds, "algorithm1 or published")
    from intentd.core.flows.workloads import WORKLOADS

    if item.name not in WORKLOADS:
        raise InputError("--thresholds", thresholds, "algorithm1 (a file has no published table)")
    return item.published_thresholds_bytes


@app.command("classes")
def classes(
    workload: WorkloadOption = None,
    cdf: CdfOption = None,
    samples: Annotated[
        int, typer.Option(min=1, max=50_000_000, help="Flow sizes to draw.")
    ] = 10_000,
    seed: SeedOption = 1,
    thresholds: ThresholdsOption = "algorithm1",
    as_json: JsonOption = False,
) -> None:
    """Size classes of a workload: thresholds (Algorithm 1), weights (job shares), C^2 in each."""
    item = chosen_workload(workload, cdf)
    preset = chosen_thresholds(item, thresholds)
    import numpy as np

    from intentd.core.flows.classes import fit_classes
    from intentd.core.flows.sampling import sample_sizes

    fit = fit_classes(sample_sizes(item.cdf, samples, np.random.default_rng(seed)), preset)
    limits = [None if limit == math.inf else limit for limit in fit.thresholds_bytes]
    if as_json:
        document = {
            "thresholds": limits,
            "weights": list(fit.weights),
            "c2": list(fit.c2),
            "samples": fit.samples,
        }
        typer.echo(json.dumps(document))
        return
    from intentd.core.units import format_size

    typer.echo(f"{item.name}: {len(limits)} classes from {fit.samples} flow sizes")
    typer.echo(f"{'class':>5} {'up to':>10} {'weight':>8} {'C^2':>6}")
    for index, (limit, weight, c2) in enumerate(
        zip(fit.thresholds_bytes, fit.weights, fit.c2, strict=True)
    ):
        typer.echo(f"{index:>5} {format_size(limit):>10} {weight:>8.4f} {c2:>6.3f}")
