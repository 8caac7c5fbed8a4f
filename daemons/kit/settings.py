"""A role's settings for people: each one's path, type, default and meaning, as the tables of
docs/operations.md, manual pages and example files have them."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from intentd.core.errors import ConfigError
from intentd.daemons.kit.config import nested_model


@dataclass(frozen=True, slots=True)
class Described:
    """One setting: path in the file, type, default as TOML-like text, what it does."""

    path: str
    kind: str
    default: str
    description: str


def describe(model: type[BaseModel], prefix: str = "", *, role: str = "") -> Iterator[Described]:
    """Every setting of a model, depth first, in the order of the file."""
    for name, field in model.model_fields.items():
        nested = nested_model(field.annotation)
        path = f"{prefix}{name}"
        if nested is not None:
            is_list = get_origin(field.annotation) in (tuple, list)
            is_map = get_origin(field.annotation) is dict
            if is_list or is_map:
                yield Described(path, "tables", "[]" if is_list else "{}", field.description or "")
            inner = f"{path}[]." if is_list else f"{path}.NAME." if is_map else f"{path}."
            yield from describe(nested, inner, role=role)
            continue
        yield Described(
            path, _kind(field.annotation), _default_text(field), field.description or ""
        )


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(arg) for arg in get_args(annotation) if arg is not type(None))
    if origin in (tuple, list):
        return f"list of {_kind(get_args(annotation)[0])}"
    if origin is not None and not isinstance(origin, type):
        return " | ".join(str(arg) for arg in get_args(annotation))
    names = {str: "text", bool: "true/false", int: "integer", float: "number", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default_text(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "(of this machine)"
    return toml_value(field.default)


def toml_value(value: Any) -> str:
    """A plain value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "(none)"
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(str(value))


def markdown_table(model: type[BaseModel], without: type[BaseModel] | None = None) -> str:
    """The settings of a model, less those of another, as a table of docs/operations.md."""
    known = {row.path for row in describe(without)} if without is not None else set()
    lines = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    for row in describe(model):
        if row.path not in known:
            text = row.description.replace("|", "\\|")
            lines.append(f"| `{row.path}` | {row.kind} | `{row.default}` | {text} |")
    return "\n".join(lines) + "\n"


def with_settings(document: str, role: str, table: str) -> str:
    """A Markdown document with the table between its two markers of a role replaced.

    Raises ConfigError when the markers are not there.
    """
    start, end = f"<!-- settings: {role} -->\n", f"<!-- end of settings: {role} -->"
    before, found, rest = document.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ConfigError("document", f"no {start.strip()}", f"the lines {start.strip()} and {end}")
    return before + start + "\n" + table + "\n" + end + after
