"""Commands about one daemon: its configuration, reload, state, and ``explain``."""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from intentd.core.errors import ConfigError, InputError, IntentdError
from intentd.daemons.ctl.output import ExitCode, JsonOption, fail, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_client, running_roles
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError

app = typer.Typer(add_completion=False)

# role: the module whose ``config_model`` class is found by the name of its daemon class
DAEMONS: Final = {
    "controller": "intentd.controller.daemon",
    "sequencer": "intentd.daemons.sequencer.daemon",
    "agent": "intentd.agent.daemon",
    "gpu": "intentd.daemons.gpu.daemon",
    "proxy": "intentd.proxy.daemon",
}

RELOAD_TIMEOUT_S: Final = 660.0  # longer than the longest window

RoleArgument = Annotated[str, typer.Argument(help="controller, sequencer, agent, gpu or proxy")]


def daemon_class(role: str) -> Any:
    """The Daemon class of a role. Raises IntentdError when it is unknown or not installed."""
    from intentd.daemons.kit.lifecycle import Daemon

    if role not in DAEMONS:
        raise ConfigError("role", role, f"one of {', '.join(DAEMONS)}")
    try:
        module = importlib.import_module(DAEMONS[role])
    except ModuleNotFoundError as error:
        raise IntentdError(
            f"role {role} is not installed here: {error.name} is missing "
            f"(pip install 'intentd[{role}]')"
        ) from None
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Daemon) and value is not Daemon:
            return value
    raise IntentdError(f"{DAEMONS[role]}: no daemon in this module")


def config_model(role: str) -> Any:
    """The configuration model of a role, or of "common"."""
    from intentd.daemons.kit.config import DaemonConfig

    return DaemonConfig if role == "common" else daemon_class(role).config_model


def settings_table(role: str) -> str:
    """A role's own settings in Markdown; those that all daemons share are role "common"."""
    from intentd.daemons.kit.config import DaemonConfig
    from intentd.daemons.kit.settings import markdown_table

    return markdown_table(config_model(role), None if role == "common" else DaemonConfig)


@app.command("check-config")
def check_config(
    role: RoleArgument,
    path: Annotated[
        Path | None, typer.Argument(help="Default: /etc/intentd/ROLE.toml, if it exists.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a configuration file; list every error with its path."""
    from intentd.daemons.kit.config import InvalidConfigError, default_config_path, load_config

    if path is None and default_config_path(role).exists():
        path = default_config_path(role)
    model = daemon_class(role).config_model
    errors: list[str] = []
    try:
        load_config(model, path, os.environ)
    except InvalidConfigError as error:
        errors = [str(item) for item in error.errors]
    if as_json:
        print_json({"role": role, "path": str(path or ""), "ok": not errors, "errors": errors})
    for line in errors:
        message(f"{path or 'environment'}: {line}")
    if errors:
        raise typer.Exit(int(ExitCode.USAGE))
    if not as_json:
        print(f"{path or 'defaults'}: ok")


@app.command("config")
def config(
    role: RoleArgument,
    running: Annotated[
        bool, typer.Option("--running", help="What the running daemon uses, instead of defaults.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of docs/operations.md.")
    ] = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="A file that says every setting, all commented out.")
    ] = False,
    update: Annotated[
        Path | None, typer.Option(help="Replace the role's table in this Markdown document.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List a role's settings: path, type, default, description. Role common: what all share."""
    from intentd.daemons.kit.config_example import example
    from intentd.daemons.kit.settings import describe, with_settings

    if running:
        print_json(admin_client(role).call("config"))
        return
    if update is not None:
        update.write_text(with_settings(update.read_text(), role, settings_table(role)))
        return
    if markdown:
        print(settings_table(role), end="")
        return
    if toml:
        print(example(config_model(role), role), end="")
        return
    rows = list(describe(config_model(role)))
    if as_json:
        print_json(
            [
                {
                    "path": row.path,
                    "type": row.kind,
                    "default": row.default,
                    "description": row.description,
                }
                for row in rows
            ]
        )
        return
    print_table(
        ("setting", "type", "default", "what it does"),
        [(row.path, row.kind, row.default, row.description) for row in rows],
    )


@app.command("reload")
def reload(
    role: Annotated[str, typer.Argument(help="controller, sequencer, agent, gpu or proxy")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Every daemon that runs on this machine.")
    ] = False,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="Wait until the new configuration has kept the daemon ready for its window "
            "(reload.window_s); fail when it has not, and the last good one runs again.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Reload a daemon's configuration and wait for the outcome; a refusal says why."""
    if bool(role) == everything:
        raise InputError("role", role or None, "one role, or --all")
    if role and role not in DAEMONS:
        raise ConfigError("role", role, f"one of {', '.join(DAEMONS)}")
    roles = running_roles() if everything else [role]
    if not roles:
        fail("no daemon runs here", ExitCode.UNREACHABLE)
    with ThreadPoolExecutor(len(roles)) as pool:  # their windows pass side by side
        outcomes = dict(zip(roles, pool.map(lambda one: _reload(one, confirm), roles), strict=True))
    if as_json:
        documents = [{"role": name, **document} for name, (_, document) in outcomes.items()]
        print_json(documents if everything else documents[0])
    for name, (_, document) in outcomes.items():
        if not document["ok"]:
            message(f"intentctl: {name}: {document['error']}")
        elif not as_json:
            kept = ", confirmed" if confirm else ""
            print(f"{name}: reloaded, generation {document['generation']}{kept}")
    raise typer.Exit(max(int(code) for code, _ in outcomes.values()))


def _reload(role: str, confirm: bool) -> tuple[ExitCode, dict[str, Any]]:
    try:
        answer = admin_client(role, timeout_s=RELOAD_TIMEOUT_S).call("reload", confirm=confirm)
    except AdminUnreachableError as error:
        return ExitCode.UNREACHABLE, {"ok": False, "error": str(error)}
    except IntentdError as error:
        return ExitCode.FAILED, {"ok": False, "error": str(error)}
    return ExitCode.OK, {"ok": True, **answer}


@app.command("dump")
def dump(role: RoleArgument) -> None:
    """A daemon's internal state as JSON (also written to its log)."""
    print_json(admin_client(role).call("dump"))


@app.command("explain")
def explain(
    identifier: Annotated[str, typer.Argument(help="A flow, job or request id.")],
    role: Annotated[str, typer.Option(help="Ask only this role.")] = "",
    as_json: JsonOption = False,
) -> None:
    """What was decided about a flow, job or request, from which inputs, with what alternatives."""
    if role and role not in DAEMONS:
        raise InputError("--role", role, f"one of {', '.join(DAEMONS)}")
    answers: list[str] = []
    code = ExitCode.UNREACHABLE
    for name in [role] if role else running_roles():
        asked = _question(name, identifier)
        if asked is None:
            code = ExitCode.FAILED
            continue
        command, args = asked
        try:
            answer = admin_client(name).call(command, **args)
        except AdminUnreachableError as error:
            answers.append(str(error))
        except AdminRefusedError as error:
            code = ExitCode.FAILED
            if error.code != "unknown_command":  # a role that explains nothing
                answers.append(f"{name}: {error}")
        else:
            print_json(answer) if as_json else print_story(answer)
            return
    if not answers and code is ExitCode.UNREACHABLE:
        fail("no daemon runs here", code)
    fail(f"nobody knows {identifier!r}" + "".join(f"; {line}" for line in answers), code)


def _question(role: str, identifier: str) -> tuple[str, dict[str, Any]] | None:
    """How a role is asked about an id; None where it cannot be one of its own."""
    if role == "gpu":
        number = identifier.removeprefix("job-").removeprefix("job/")
        known = number.isdecimal() and len(number) < 19
        return ("jobs.explain", {"job": int(number)}) if known else None
    if role == "agent" and not identifier.isdecimal():
        return None
    return "explain", {"id": identifier}


def print_story(answer: dict[str, Any]) -> None:
    """What ``explain`` says, for people: a fact a line, tables and lists below their name."""
    for key, value in answer.items():
        if isinstance(value, list) and value:
            print(f"{key}:")
            for item in value:
                print(f"  - {_fact(item)}")
        elif value is not None and value != []:
            print(f"{key}: {_fact(value)}")


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return str(value)
