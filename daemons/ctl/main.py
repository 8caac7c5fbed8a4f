"""intentctl: the one tool for operators.

Groups (``flows``, ``tc``, ...) live in modules of their own that are imported when used, so one
whose extra is not installed says so in one line and takes nothing else with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

import intentd
from intentd.core.errors import InputError, IntentdError
from intentd.daemons.ctl.output import ExitCode, exit_code_of, message

PROGRAM: Final = "intentctl"
# group: the extra that brings what it needs
GROUPS: Final = {
    "flows": "ctl",
    "sim": "ctl",
    "tc": "agent",
    "policy": "ctl",
    "domains": "ctl",
    "testbed": "testbed",
    "jobs": "ctl",
    "prompts": "ctl",
    "pareto": "ctl",
    "keys": "ctl",
    "tokens": "ctl",
}
# module: the commands it puts at the top level (its ``app`` holds them by name)
TOP_LEVEL: Final = {
    "up": ("up", "down", "restart"),
    "status": ("status",),
    "daemon": ("check-config", "config", "reload", "dump", "explain"),
    "drain": ("drain",),
    "doctor": ("doctor",),
    "top": ("top",),
    "completion": ("completion",),
}
_FIELD: Final = re.compile(r"[a-z][a-z0-9_]*(?=[:.\[])")
_MODULE_OF: Final = {name: module for module, names in TOP_LEVEL.items() for name in names}


def _module_name(name: str) -> str:
    return f"intentd.daemons.ctl.{name}"


def _exists(name: str) -> bool:
    return importlib.util.find_spec(_module_name(name)) is not None


class LazyGroup(TyperGroup):
    """Finds commands by name in modules that are imported only then."""

    def list_commands(self, ctx: Any) -> list[str]:
        found = [name for name in GROUPS if _exists(name)]
        found += [name for name, module in _MODULE_OF.items() if _exists(module)]
        return sorted(found)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        module = _MODULE_OF.get(cmd_name, cmd_name if cmd_name in GROUPS else "")
        if not module or not _exists(module):
            return None
        try:
            app: typer.Typer = importlib.import_module(_module_name(module)).app
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "intentd":
                raise
            return _unavailable(cmd_name, error.name or "", GROUPS.get(cmd_name, "ctl"))
        if cmd_name in GROUPS:
            group = typer.main.get_group(app)
            group.name = cmd_name
            return group
        return typer.main.get_group(app).commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        """Says of a value that does not fit its option what it was; the library says only why."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            errors = getattr(error.__cause__, "errors", None)
            if errors is None or error.param is None:
                raise
            first = errors()[0]
            name = error.param.get_error_hint().strip("'")
            expected = first["msg"].removeprefix("Input should be ")
            raise InputError(name, first["input"], expected) from None


def _unavailable(name: str, missing: str, extra: str) -> Any:
    """A command that says what to install."""
    app = typer.Typer(add_completion=False)
    text = f"not available: {missing} is not installed (pip install 'intentd[{extra}]')"

    @app.command(
        name=name,
        help=f"({text})",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )
    def unavailable(ctx: typer.Context) -> None:
        message(f"{PROGRAM} {name}: {text}")
        raise typer.Exit(int(ExitCode.FAILED))

    return typer.main.get_command(app)


app = typer.Typer(
    name=PROGRAM,
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Operate the intentd suite. Exit status: 0 ok, 1 failed or refused, 2 usage or bad "
    "input, 3 daemon unreachable, 4 degraded.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"intentd {intentd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def named_as_typed(text: str, words: Sequence[str]) -> str:
    """An error about a field whose option the user typed names the option."""
    field = _FIELD.match(text)
    option = f"--{field.group().replace('_', '-')}" if field else ""
    typed = any(word.partition("=")[0] == option for word in words)
    return f"{option}{text[len(field.group()) :]}" if field and typed else text


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    from typer._completion_classes import completion_init  # so that completion scripts work

    completion_init()
    if argv is None:  # as the program: what a command started or made goes with it
        signal.signal(signal.SIGTERM, _terminated)
    try:
        outcome = app(
            args=None if argv is None else list(argv), prog_name=PROGRAM, standalone_mode=True
        )
    except SystemExit as error:
        code = error.code
        return code if isinstance(code, int) else int(ExitCode.OK if code is None else 1)
    except IntentdError as error:
        typed = sys.argv[1:] if argv is None else argv
        for line in named_as_typed(str(error), typed).splitlines():
            message(f"{PROGRAM}: {line}")
        return int(exit_code_of(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    return outcome if isinstance(outcome, int) else int(ExitCode.OK)
