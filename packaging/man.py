"""Manual pages from the tool's own help and the daemons' settings: ``python packaging/man.py DIR``.

intentctl.1, one intentctl-GROUP.1 a group of commands, one intentd-ROLE.8 a daemon, and those of
intentd-gpu-launcher and intentd-extra.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import intentd
from intentd.daemons.ctl.daemon import DAEMONS, daemon_class
from intentd.daemons.ctl.main import GROUPS, app
from intentd.daemons.gpu.launcher import arguments
from intentd.daemons.kit.settings import describe

EXIT = (
    ("0", "everything is as it should be"),
    ("1", "failed or refused"),
    ("2", "usage or bad input"),
    ("3", "a daemon cannot be reached"),
    ("4", "something is degraded, not ready, or false"),
)


def roff(text: str) -> str:
    """Text that means itself: one line, nothing taken for a request or an escape."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    line = line.replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")
    return "\\&" + line if line.startswith(".") else line


def page(name: str, section: int, brief: str, body: Iterator[str]) -> str:
    """A whole page; dated by nothing, so that it is the same every time it is made."""
    title = f'.TH {roff(name.upper())} {section} "" "intentd {intentd.__version__}"'
    head = [title, ".SH NAME", f"{roff(name)} \\- {roff(brief)}"]
    return "\n".join([*head, *body]) + "\n"


def command_text(path: str, command: Any) -> Iterator[str]:
    """One command: how it is called, what it does, its arguments and options."""
    words = [_shown(param) for param in _arguments(command)]
    yield f".SS {roff(' '.join([path, '[OPTIONS]', *words]))}"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.strip():
            yield ".P"
            yield roff(paragraph)
    for param in command.params:
        text = getattr(param, "help", "") or ""
        if param.param_type_name == "option":
            names = ", ".join([*param.opts, *param.secondary_opts])
            value = "" if param.is_flag else " " + roff((param.metavar or "value").upper())
        else:
            names, value = _shown(param), ""
        yield ".TP"
        yield f"\\fB{roff(names)}\\fR{value}"
        yield roff(text or "-")


def _arguments(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "argument"]


def _shown(argument: Any) -> str:
    word = (argument.metavar or argument.name).upper() + ("..." if argument.nargs != 1 else "")
    return word if argument.required else f"[{word}]"


def group_page(name: str, group: Any) -> str:
    def body() -> Iterator[str]:
        yield ".SH COMMANDS"
        for path, command in leaves(f"intentctl {name}", group):
            yield from command_text(path, command)
        yield from exits()
        yield from see("intentctl(1)")

    brief = (group.help or f"{name}: commands of the intentd suite").strip().rstrip(".")
    return page(f"intentctl-{name}", 1, brief, body())


def leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, by name."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name in sorted(inner):
        yield from leaves(f"{path} {name}", inner[name])


def tool_page(tool: Any, commands: dict[str, Any]) -> str:
    def body() -> Iterator[str]:
        yield ".SH SYNOPSIS"
        yield roff("intentctl COMMAND [OPTIONS]")
        yield ".SH COMMANDS"
        for name, command in commands.items():
            if name not in GROUPS:
                yield from command_text(f"intentctl {name}", command)
        yield from exits()
        yield from see(*(f"intentctl-{name}(1)" for name in commands if name in GROUPS))

    return page("intentctl", 1, "operate the intentd suite", body())


def daemon_page(role: str) -> str:
    def body() -> Iterator[str]:
        name = f"intentd-{role}"
        yield ".SH SYNOPSIS"
        yield roff(f"{name} [--config FILE] [--check-config] [--version]")
        yield ".SH SIGNALS"
        for signal, text in (
            ("SIGTERM, SIGINT", "drain, give back what was taken of the host, exit 0"),
            ("SIGHUP", "reload: the whole configuration or none of it"),
            ("SIGUSR1", "write the state to the log"),
        ):
            yield from item(signal, text)
        yield ".SH FILES"
        yield from item(f"/etc/intentd/{role}.toml", "the configuration")
        yield ".SH SETTINGS"
        variable = f"INTENTD_{role.upper()}__SECTION__KEY"
        yield roff(f"Each may be overridden by the environment: {variable}.")
        for row in describe(daemon_class(role).config_model):
            yield from item(row.path, f"{row.description} ({row.kind}, default {row.default})")
        yield from see("intentctl(1)")

    return page(f"intentd-{role}", 8, f"the {role} daemon of the intentd suite", body())


def launcher_page() -> str:
    def body() -> Iterator[str]:
        parser = arguments()
        yield ".SH SYNOPSIS"
        yield roff(parser.format_usage().removeprefix("usage: "))
        yield ".SH DESCRIPTION"
        yield roff(
            "The one process of the suite that is root, for intentd-gpu.service with the drop-in "
            "intentd-gpu-multi-user.conf: it starts, stops and clears away jobs as the users who "
            "submitted them. It hears root and the user of --user alone."
        )
        yield ".SH OPTIONS"
        for action in parser._actions[1:]:  # --help apart; argparse has no public list of them
            default = f"(default {action.default})"
            yield from item(action.option_strings[0], f"{action.help} {default}")
        yield from see("intentd-gpu(8)")

    return page("intentd-gpu-launcher", 8, "starts GPU jobs as their owners", body())


def extra_page() -> str:
    def body() -> Iterator[str]:
        yield ".SH SYNOPSIS"
        yield roff("intentd-extra EXTRA...")
        yield ".SH DESCRIPTION"
        yield roff(
            "Adds to /opt/intentd what the package leaves out for its size, at the versions and "
            "hashes it was locked with. Without an argument it names the extras there are. Run it "
            "again after an upgrade of the package."
        )
        yield from see("intentctl(1)")

    return page("intentd-extra", 8, "adds Ray, litellm and others to the intentd suite", body())


def item(term: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield f"\\fB{roff(term)}\\fR"
    yield roff(text)


def exits() -> Iterator[str]:
    yield ".SH EXIT STATUS"
    for code, text in EXIT:
        yield from item(code, text)


def see(*pages: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield roff(", ".join(pages))


def pages() -> dict[str, str]:
    """File name -> text."""
    tool: Any = typer.main.get_command(app)
    context = typer.Context(tool)
    commands = {name: tool.get_command(context, name) for name in tool.list_commands(context)}
    made = {"intentctl.1": tool_page(tool, commands)}
    for name, command in commands.items():
        if name in GROUPS and hasattr(command, "commands"):
            made[f"intentctl-{name}.1"] = group_page(name, command)
    made |= {"intentd-gpu-launcher.8": launcher_page(), "intentd-extra.8": extra_page()}
    for role in DAEMONS:
        made[f"intentd-{role}.8"] = daemon_page(role)
    return made


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python packaging/man.py DIR", file=sys.stderr)
        return 2
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (where / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
