"""One HTML file from an experiment's directory: no script, no network, pictures inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from intentd.testbed import plots
from intentd.testbed.metrics import METRICS
from intentd.testbed.published import PUBLISHED
from intentd.testbed.replay import read_completions
from intentd.testbed.results import (
    Results,
    Run,
    Table,
    kernel_over_simulator,
    load,
    over_seeds,
    paired,
)
from intentd.testbed.traffic.records import read_records

REPORT_FILE: Final = "report.html"
_STYLE: Final = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #ccc}h3{margin-top:1.4em}
table{border-collapse:collapse;margin:.8em 0}caption{text-align:left;font-weight:600;padding:.3em 0}
td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:.4em .4em .4em 0}
.good{color:#1b6e34}.bad{color:#a11}.note{color:#555;font-size:.92em}
"""


def write_report(directory: Path) -> Path:
    """Draw the report of the experiment in directory. Raises InputError."""
    path = directory / REPORT_FILE
    path.write_text(render(load(directory), directory))
    return path


def render(results: Results, directory: Path) -> str:
    """The page; records are read from directory for the CDFs."""
    parts = [
        f"<h1>{_text(results.title)}</h1>",
        f"<p>{_text(results.about)}</p>",
        _facts(results),
        "".join(f'<p class="note">{_text(note)}</p>' for note in results.notes),
        _checks(results),
    ]
    for table in results.tables:
        parts.append(_table(table))
    for series in results.series:
        parts.append(f"<h3>{_text(series.title)}</h3>{_image(plots.series_plot(series))}")
        if series.note:
            parts.append(f'<p class="note">{_text(series.note)}</p>')
    for workload, load_share in results.groups():
        parts.append(_group(results, workload, load_share, directory))
    parts.append(_published(results))
    title = _text(results.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _facts(results: Results) -> str:
    rows = [
        [name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value]
        for source in (results.options, results.machine)
        for name, value in source.items()
    ]
    return _table(Table("Setting", ["what", "value"], rows))


def _checks(results: Results) -> str:
    if not results.checks:
        return ""
    rows = "".join(
        f"<tr><td>{_text(check.figure)}</td><td>{_number(check.value)}</td>"
        f"<td>{_text(check.sense)} {_number(check.bar)}</td>"
        f'<td class="{"good" if check.holds else "bad"}">{"holds" if check.holds else "missed"}'
        "</td></tr>"
        for check in results.checks
    )
    return (
        "<h2>Against the bars</h2><table><tr><th>figure</th><th>measured</th><th>bar</th>"
        f"<th></th></tr>{rows}</table>"
    )


def _group(results: Results, workload: str, load_share: float, directory: Path) -> str:
    """One workload at one load: CDFs, bars normalised to the first label, tables."""
    labels = results.labels(workload, load_share)
    base = "2d" if "2d" in labels else labels[0]
    heading = f"{workload}, {100 * load_share:.0f} % load"
    first = [results.select(workload, load_share, label)[0] for label in labels]
    kernel = {
        run.label: [record.fct_s for record in read_records(directory / run.records)]
        for run in first
        if run.records
    }
    simulated = {
        run.label: read_completions((directory / run.records).with_suffix(".sim.csv"))
        for run in first
        if run.records
    }
    parts = [f"<h2>{_text(heading)}</h2>"]
    if kernel:
        title = f"{heading}, seed {first[0].seed}"
        parts.append(_image(plots.cdf_plot(title, kernel, simulated)))
    bars = {label: paired(results, workload, load_share, label, base, "kernel") for label in labels}
    if len(labels) > 1:
        shown = {label: row for label, row in bars.items() if row and label != base}
        if shown:
            title = f"{heading}: normalised to {base}"
            parts.append(_image(plots.bar_plot(title, shown, f"FCT / FCT of {base}")))
    parts.append(_completion_table(results, workload, load_share, labels))
    parts.append(_ratio_table(results, workload, load_share, labels, base))
    parts.append(_conditions(results.select(workload, load_share)))
    return "".join(parts)


def _completion_table(
    results: Results, workload: str, load_share: float, labels: Sequence[str]
) -> str:
    rows: list[list[Any]] = []
    for label in labels:
        runs = results.select(workload, load_share, label)
        rows.append([f"{label}, kernel", *_cells(over_seeds(runs), 1e3)])
        if runs[0].simulator:
            rows.append([f"{label}, simulator", *_cells(over_seeds(runs, "simulator"), 1e3)])
            rows.append([f"{label}, kernel / simulator", *_cells(kernel_over_simulator(runs))])
    seeds = len(results.select(workload, load_share, labels[0]))
    return _table(
        Table(
            "Flow completion time, ms",
            ["", *map(plots.metric_name, METRICS)],
            rows,
            f"Mean over {seeds} seed(s), with half its 95 % interval where there are several. "
            "The simulator replays the arrivals each run recorded, under the same policy.",
        )
    )


def _ratio_table(
    results: Results, workload: str, load_share: float, labels: Sequence[str], base: str
) -> str:
    rows: list[list[Any]] = []
    for label in labels:
        for source in ("kernel", "simulator"):
            row = paired(results, workload, load_share, label, base, source)
            if row and label != base:
                rows.append([f"{label}, {source}", *_cells(row)])
    if not rows:
        return ""
    return _table(Table(f"Normalised to {base}", ["", *map(plots.metric_name, METRICS)], rows))


def _conditions(runs: Sequence[Run]) -> str:
    rows = [
        [
            run.label,
            run.seed,
            run.gate,
            f"{run.finished}/{run.flows}",
            round(run.offered_load, 3),
            "" if run.busy_share is None else f"{run.busy_share:.3f} ({run.busy_observed_s:.1f} s)",
            "" if run.floor_s is None else round(run.floor_s * 1e3, 3),
            f"{run.handover['p50'] * 1e3:.3g} / {run.handover['p99'] * 1e3:.3g}"
            if run.handover
            else "",
            ", ".join(f"{reason} {count}" for reason, count in run.degraded.items()) or "none",
            len(run.weights) or "",
            round(run.arrival_lag_s * 1e3, 3),
            f"{run.steal_share:.1%} ({run.repeats})",
        ]
        for run in runs
    ]
    columns = ["policy", "seed", "gate", "finished", "offered load", "busy while waiting"]
    columns += [
        "floor, ms",
        "hand-over p50 / p99, ms",
        "degraded starts",
        "classes",
        "arrival lag, ms",
        "taken by the host (tries thrown away)",
    ]
    return _table(
        Table(
            "Conditions of each run",
            columns,
            rows,
            "Busy: share of the link used while some flow waited, from HTB's byte counters. "
            "Floor: mean of flows up to 10 KB that met no other. Hand-over: last byte of a flow to "
            "the first of the next of its class that waited. Lag: how late arrivals were played.",
        )
    )


def _published(results: Results) -> str:
    rows = [
        [figure.claim, figure.value, figure.unit, figure.source]
        for key in results.published
        for figure in PUBLISHED[key]
    ]
    if not rows:
        return ""
    table = Table(
        "What the dissertation's text states",
        ["claim", "value", "", "source"],
        rows,
        "Its testbed: 18 clients, one server, 10 Gb/s, unscaled sizes, average of five runs.",
    )
    return f"<h2>The chapter's figures</h2>{_table(table)}"


def _cells(row: Mapping[str, tuple[float, float]], factor: float = 1.0) -> list[str]:
    cells = []
    for name in METRICS:
        mean, half = row.get(name, (math.nan, math.nan))
        text = _number(mean * factor)
        cells.append(text if math.isnan(half) else f"{text} ± {_number(half * factor)}")
    return cells


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return f"<table><caption>{_text(table.title)}</caption><tr>{head}</tr>{body}</table>{note}"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4g}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    return html.escape("" if value is None else str(value))


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same for a terminal: columns padded, numbers to four digits."""
    cells = [[_number(c) if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [
        max(len(str(column)), *(len(row[i]) for row in cells)) if cells else len(str(column))
        for i, column in enumerate(columns)
    ]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(map(str, row), widths, strict=True))
        )
        for row in (columns, *cells)
    ]
    return "\n".join(lines)
