"""A Pareto front as a picture: HTML without any library, or PNG by matplotlib."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intentd.core.errors import InputError
from intentd.core.jobs.policy import JobsPolicy

WIDTH, HEIGHT, MARGIN = 860, 520, 70


def describe(policy: JobsPolicy) -> str:
    """A configuration in one line."""
    if len(policy.weights) == 1:
        shape = "1 class (FIFO)"
    else:
        weights = ", ".join(f"{weight:.3g}" for weight in policy.weights)
        shape = f"{len(policy.weights)} classes, weights {weights}"
    return f"{shape}, zeta {policy.zeta:.2f}, delta {policy.delta:.2f}"


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
    for factor in (0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= 8:
            step *= factor
            break
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step) + 1)]


def html_chart(
    front: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    *,
    title: str,
    others: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    marked: int | None = None,
) -> str:
    """A self-contained page: points with their settings on hover.

    front: rows of objective -> value; the first two objectives are the axes. others: more series
    by name. marked: index of the present setting.
    """
    if not front or len(front[0]) < 2:
        raise InputError("front", len(front), "at least one point with two objectives")
    x_name, y_name = list(front[0])[:2]
    series = {"front": front, **(others or {})}
    every = [row for rows in series.values() for row in rows]
    xs, ys = [row[x_name] for row in every], [row[y_name] for row in every]
    x_low, x_high = min(xs), max(xs) * 1.02 + 1e-9
    y_low, y_high = min(0.0, *ys), max(ys) * 1.05 + 1e-9

    def place(row: Mapping[str, float]) -> tuple[float, float]:
        across = (row[x_name] - x_low) / max(x_high - x_low, 1e-12)
        up = (row[y_name] - y_low) / max(y_high - y_low, 1e-12)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [_axes(x_name, y_name, (x_low, x_high), (y_low, y_high), place)]
    colours = ("#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a", "#ad1457", "#00838f")
    for number, (name, rows) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{MARGIN - 12 + 16 * number}" text-anchor="end" '
            f'fill="{colour}">{html.escape(name)}</text>'
        )
        for index, row in enumerate(rows):
            x, y = place(row)
            text = labels[index] if name == "front" and index < len(labels) else name
            values = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
            radius = 8 if name == "front" and index == marked else 4
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" '
                f'fill-opacity=".75"><title>{html.escape(f"{text}: {values}")}</title></circle>'
            )
    body = "\n".join(parts)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>body{{font:14px sans-serif;margin:2em}}circle:hover{{stroke:#000}}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">\n{body}\n</svg>\n'
    )


def _axes(
    x_name: str,
    y_name: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    place: Any,
) -> str:
    left, bottom = MARGIN, HEIGHT - MARGIN
    lines = [
        f'<path d="M{left} {MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#444"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 20}" text-anchor="middle">'
        f"{html.escape(x_name)}</text>",
        f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 18 {HEIGHT / 2})">{html.escape(y_name)}</text>',
    ]
    for value in _ticks(*x_range):
        x, _ = place({x_name: value, y_name: y_range[0]})
        lines.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:.6g}</text>')
    for value in _ticks(*y_range):
        _, y = place({x_name: x_range[0], y_name: value})
        lines.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    return "\n".join(lines)


def write_chart(
    path: Path,
    front: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    *,
    title: str,
    others: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    marked: int | None = None,
) -> None:
    """PNG or HTML, by the file's ending. Raises InputError for another ending."""
    if path.suffix == ".html":
        page = html_chart(front, labels, title=title, others=others, marked=marked)
        path.write_text(page, encoding="utf-8")
        return
    if path.suffix != ".png":
        raise InputError("chart", str(path), "a file that ends in .html or .png")
    from matplotlib.figure import Figure  # slow to import, and HTML needs none of it

    x_name, y_name = list(front[0])[:2]
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, rows in {"front": front, **(others or {})}.items():
        axes.scatter([row[x_name] for row in rows], [row[y_name] for row in rows], label=name, s=18)
    if marked is not None:
        row = front[marked]
        axes.scatter([row[x_name]], [row[y_name]], label="present", s=120, facecolors="none",
                     edgecolors="black")  # fmt: skip
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
