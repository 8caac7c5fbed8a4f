"""The pieces of a reproduction report: tables with notes and pictures, as markdown and HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Section:
    """One figure of the report: rows under a heading, and why they differ from the published."""

    figure: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_markdown(sections: Sequence[Section]) -> str:
    """The report as markdown."""
    parts = ["# Chapter 3 (PCS) rerun\n"]
    for section in sections:
        parts.append(f"## Figure {section.figure}. {section.title}\n")
        parts.append("| " + " | ".join(section.columns) + " |")
        parts.append("|" + "---|" * len(section.columns))
        parts += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in section.rows]
        parts.append("")
        parts += [f"![Figure {section.figure}]({path.name})" for path in section.pictures]
        parts += [f"- {note}" for note in section.notes]
        parts.append("")
    return "\n".join(parts)


def to_html(sections: Sequence[Section]) -> str:
    """The report as one page."""
    parts = [
        '<!doctype html><meta charset="utf-8"><title>Chapter 3 (PCS) rerun</title>',
        "<style>body{font:15px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;"
        "border-bottom:1px solid #ccc;text-align:left}</style>",
        "<h1>Chapter 3 (PCS) rerun in simulation</h1>",
    ]
    for section in sections:
        heads = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>"
            for row in section.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in section.notes)
        pictures = "".join(
            f'<img alt="Figure {section.figure}" width="640" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}">'
            for path in section.pictures
        )
        parts.append(
            f"<h2>Figure {section.figure}. {html.escape(section.title)}</h2>"
            f"<table><tr>{heads}</tr>{rows}</table>{pictures}<ul>{notes}</ul>"
        )
    return "\n".join(parts) + "\n"
