"""The pictures of a report, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np

from intentd.testbed.results import Series

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS: Final = (
    "#1f4e79",
    "#c0504d",
    "#7f7f7f",
    "#4f9153",
    "#8064a2",
    "#e08e0b",
    "#17a2a2",
    "#a0522d",
    "#d16ba5",
    "#333333",
)
_DPI: Final = 110
_NAMES: Final = {"mean": "mean", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99"} | {
    "p995": "p99.5"
}


def metric_name(metric: str) -> str:
    return _NAMES.get(metric, metric)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    plt.close(figure)
    return buffer.getvalue()


def cdf_plot(
    title: str, kernel: Mapping[str, Sequence[float]], simulated: Mapping[str, Sequence[float]]
) -> bytes:
    """Completion times as CDFs, log x: kernel solid, the simulator on the same trace dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for index, (label, values) in enumerate(kernel.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        for data, style, name in ((values, "-", label), (simulated.get(label, ()), ":", None)):
            if len(data):
                ordered = np.sort(np.asarray(data)) * 1e3
                share = np.arange(1, ordered.size + 1) / ordered.size
                axes.plot(ordered, share, style, color=colour, label=name, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("flow completion time (ms); dotted: simulator, same trace")
    axes.set_ylabel("share of flows")
    axes.set_ylim(0, 1.005)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def bar_plot(
    title: str, rows: Mapping[str, Mapping[str, tuple[float, float]]], y_label: str
) -> bytes:
    """Bars per metric and label with their intervals, log y, a line at one."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    metrics = list(next(iter(rows.values()))) if rows else []
    width = 0.8 / max(1, len(rows))
    for index, (label, values) in enumerate(rows.items()):
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(metrics))]
        heights = [values[name][0] if name in values else math.nan for name in metrics]
        halves = [values[name][1] if name in values else math.nan for name in metrics]
        halves = [0.0 if math.isnan(half) else half for half in halves]
        axes.bar(
            places,
            heights,
            width,
            yerr=halves,
            capsize=2,
            label=label,
            color=_COLOURS[index % len(_COLOURS)],
            error_kw={"linewidth": 0.8},
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(metrics)), [metric_name(name) for name in metrics])
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return _png(figure)


def series_plot(series: Series) -> bytes:
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for index, (label, points) in enumerate(series.lines.items()):
        x, y = [point[0] for point in points], [point[1] for point in points]
        colour = _COLOURS[index % len(_COLOURS)]
        if series.step:
            axes.step(x, y, where="post", label=label, color=colour, linewidth=1.6)
        else:
            axes.plot(x, y, "o-", label=label, color=colour, linewidth=1.4, markersize=3)
    axes.set_xlabel(series.x_label)
    axes.set_ylabel(series.y_label)
    axes.set_title(series.title, fontsize=10)
    axes.grid(alpha=0.3)
    if len(series.lines) > 1:
        axes.legend(fontsize=8)
    return _png(figure)
