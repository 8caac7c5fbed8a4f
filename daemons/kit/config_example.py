"""A configuration file that says every setting and sets none: what a package puts in /etc."""

from __future__ import annotations

import textwrap
from typing import Final

from pydantic import BaseModel

from intentd.daemons.kit.settings import Described, describe

_WIDTH: Final = 98
# What stands for a default that is not a value: the setting is commented out all the same.
_PLACEHOLDERS: Final = {"integer": "0", "number": "0", "true/false": "false"}


def example(model: type[BaseModel], role: str) -> str:
    """Every setting of a role's model with its default, commented out (TOML).

    ``# `` starts a sentence, ``#`` alone a setting: taking the latter away gives a file with all of
    the defaults. A list of tables shows one.
    """
    rows = list(describe(model))
    headings = {row.path: row for row in rows if row.kind == "tables"}
    tables: dict[str, list[Described]] = {"": []}
    for row in rows:
        if row.kind != "tables":
            tables.setdefault(_table_of(row.path), []).append(row)
    lines = [
        f"# intentd-{role}: every setting with its default, as this version has it.",
        f"# Checked by: intentctl check-config {role}. Taken by: systemctl reload intentd-{role}.",
    ]
    for table, inside in tables.items():
        if table:
            lines += ["", f"#{_header(table)}"]
            plain = table.removesuffix(".NAME").removesuffix("[]")
            if plain in headings:
                lines += _sentences(headings[plain].description)
        for row in inside:
            lines += ["", *_sentences(_description(row))]
            lines.append(f"#{row.path[len(table) :].lstrip('.')} = {_value(row)}")
    return "\n".join(lines) + "\n"


def _table_of(path: str) -> str:
    """The table a setting is written in: the innermost list or map around it, else the section."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].endswith("[]") or parts[end - 1] == "NAME":
            return ".".join(parts[:end])
    return parts[0] if len(parts) > 1 else ""


def _header(table: str) -> str:
    name = table.replace("[]", "")
    return f"[[{name}]]" if table.endswith("[]") else f"[{name}]"


def _description(row: Described) -> str:
    return f"Required. {row.description}" if row.default == "required" else row.description


def _value(row: Described) -> str:
    if row.default == "required" or row.default.startswith("("):
        return _PLACEHOLDERS.get(row.kind, "[]" if row.kind.startswith("list") else '""')
    return row.default


def _sentences(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
