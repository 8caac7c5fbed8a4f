"""How intentctl speaks: one JSON document or a table on stdout, everything else on stderr.

Commands raise the suite's errors; ``main`` turns them into one line and an exit status.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError


class ExitCode(enum.IntEnum):
    """What the exit status of every command means."""

    OK = 0
    FAILED = 1  # failed or refused
    USAGE = 2  # usage or bad input
    UNREACHABLE = 3  # the daemon does not answer
    DEGRADED = 4  # something is degraded or not ready


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def print_json(value: Any) -> None:
    """Exactly one document, then a line break. Infinity and NaN do not exist in JSON: null."""
    print(json.dumps(_finite(value), default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def message(text: str) -> None:
    """One line for the human, on stderr."""
    print(text, file=sys.stderr, flush=True)


def fail(text: str, code: ExitCode = ExitCode.FAILED) -> NoReturn:
    """Say why and exit."""
    message(f"intentctl: {text}")
    raise typer.Exit(int(code))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table for the human, on stdout; plain text when it goes into a pipe."""
    from rich.console import Console  # slow to import, and --json never needs it
    from rich.table import Table

    table = Table(title=title or None, box=None, header_style="bold", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console()
    width = console.width if console.is_terminal else 10_000
    Console(width=width, highlight=False).print(table)


@contextlib.contextmanager
def named_options(options: Mapping[str, str], typed: Collection[str]) -> Iterator[None]:
    """A daemon's errors about a field name the option that says it too, where the user typed that.

    options: field -> option.
    """

    def named(text: str) -> str:
        field = re.match(r"[a-z_]+(?=[:.\[])", text)
        option = options.get(field.group()) if field else None
        return f"{option}: {text}" if option is not None and option in typed else text

    try:
        yield
    except AdminRefusedError as error:
        raise AdminRefusedError(named(str(error)), error.code) from None


def exit_code_of(error: IntentdError) -> ExitCode:
    if isinstance(error, AdminUnreachableError):
        return ExitCode.UNREACHABLE
    if isinstance(error, AdminRefusedError):
        return ExitCode.USAGE if error.code == "bad_request" else ExitCode.FAILED
    return ExitCode.USAGE if isinstance(error, InputError) else ExitCode.FAILED
