"""intentctl policy: numbered policies of the flows application, at the controller."""

from __future__ import annotations

import getpass
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from intentd.core.errors import InputError
from intentd.core.units import format_rate, format_size
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(help="Policies: list, show, set, roll back, release.", no_args_is_help=True)

MAX_FILE_BYTES: Final = 1 << 20
ApplicationOption = Annotated[str, typer.Option("--application", help="flows, jobs or prompts.")]


@app.callback()
def _group() -> None:
    """Keeps the commands of the group named."""


@app.command("list")
def list_policies(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    application: ApplicationOption = "flows",
    as_json: JsonOption = False,
) -> None:
    """Policies as issued: number, when, by whom, why, what changed."""
    page = admin_client("controller").call("policy_list", limit=limit, application=application)
    if as_json:
        print_json(page)
        return
    if page["held"] is not None:
        message(
            f"held at the content of {page['held']['number']} by {page['held']['author']}: "
            "automatic policies wait for `intentctl policy release`"
        )
    print_table(
        ("number", "era", "issued", "author", "reason", "changes"),
        [
            (
                row["number"],
                row["era"],
                when(row["issued_wall_s"]),
                row["author"],
                row["reason"],
                brief(row["changes"]),
            )
            for row in page["policies"]
        ],
    )


@app.command("show")
def show(
    number: Annotated[
        int | None, typer.Argument(min=1, help="Number; the newest if left out.")
    ] = None,
    application: ApplicationOption = "flows",
    as_json: JsonOption = False,
) -> None:
    """One policy whole: classes, inputs, what it changed, who runs or refused it."""
    plain = admin_client("controller").call("policy_show", number=number, application=application)
    if as_json:
        print_json(plain)
        return
    print(
        f"policy {plain['number']} of era {plain['era']}, issued {when(plain['issued_wall_s'])} "
        f"by {plain['author']}: {plain['reason']}"
    )
    for line in plain["changes"]:
        print(f"  {line}")
    if application == "prompts":
        show_prompts(plain)
    elif application != "flows":
        print_table(("", ""), [(k, v) for k, v in plain["body"].items() if v not in ({}, [])])
    for row in plain["body"].get("domains", ()):
        inputs = plain["inputs"].get("domains", {}).get(row["domain"], {})
        because = ", ".join(f"{key} {value}" for key, value in inputs.items() if value is not None)
        print(f"\n{row['domain']}: {row['name']}, {format_rate(row['rate_bps'])} ({because})")
        print_table(
            ("class", "up to", "weight", "mpl", "order", "sequencing", "dscp"),
            [
                (
                    index,
                    limit(cls["threshold_bytes"]),
                    f"{cls['weight']:.4f}",
                    cls["mpl"] or "no gate",
                    cls["order"],
                    cls["sequencing"],
                    cls["dscp"],
                )
                for index, cls in enumerate(row["classes"])
            ],
        )
    print(f"\nrun by: {', '.join(plain['run_by']) or 'nobody'}")
    for refusal in plain["refused_by"]:
        print(f"refused by {refusal['member']}: {refusal['reason']}")


@app.command("diff")
def diff(
    first: Annotated[int, typer.Argument(min=1, help="Number of a policy.")],
    second: Annotated[
        int | None, typer.Argument(min=1, help="Number of another; the newest if left out.")
    ] = None,
    application: ApplicationOption = "flows",
    as_json: JsonOption = False,
) -> None:
    """What one policy has otherwise than another, a setting a line."""
    client = admin_client("controller")
    one, other = (
        client.call("policy_show", number=number, application=application)
        for number in (first, second)
    )
    before, after = flat(one["body"]), flat(other["body"])
    lines = [
        {"setting": path, "was": before.get(path), "is": after.get(path)}
        for path in before | after
        if before.get(path) != after.get(path)
    ]
    if as_json:
        numbers = {"first": one["number"], "second": other["number"]}
        print_json({**numbers, "application": application, "differences": lines})
        return
    if not lines:
        message(f"policies {one['number']} and {other['number']} of {application} are equal")
        return
    columns = ("setting", str(one["number"]), str(other["number"]))
    print_table(columns, [(row["setting"], row["was"], row["is"]) for row in lines])


def flat(body: Any, path: str = "") -> dict[str, Any]:
    """A body's settings by their paths; entries of lists by domain or name, where they have one."""
    if isinstance(body, dict):
        rows = [(f"{path}.{key}" if path else key, value) for key, value in body.items()]
    elif isinstance(body, list):
        rows = [(f"{path}[{_called(item, at)}]", item) for at, item in enumerate(body)]
    else:
        return {path: body}
    return {name: leaf for at, value in rows for name, leaf in flat(value, at).items()}


def _called(item: Any, index: int) -> Any:
    named = item if isinstance(item, dict) else {}
    return named.get("domain", named.get("name", index))


def show_prompts(plain: dict[str, Any]) -> None:
    """Thresholds with what was expected of them and what else was possible; the rest as it is."""
    body, inputs = plain["body"], plain["inputs"]
    for row in body["service_types"]:
        why = inputs.get("service_types", {}).get(row["name"], {})
        print(f"\n{row['name']}: {row['strategy']} threshold {row['threshold']:g}")
        if why:
            print(f"  {why['because']} ({why['outcomes']:.0f} outcomes)")
            print_table(
                (
                    "threshold",
                    "quality",
                    "at least (90 %)",
                    "asks the dear model",
                    "cost a request",
                ),
                [
                    (
                        f"{option['threshold']:g}" + (" *" if option == why["expected"] else ""),
                        f"{option['quality']:.3f}",
                        f"{option['quality_low']:.3f}",
                        f"{option['escalated']:.1%}",
                        "?"
                        if option["cost_nano"] is None
                        else f"{option['cost_nano'] / 1e9:.6f} $",
                    )
                    for option in why["options"]
                ],
            )
    for row in body["models"]:
        print(f"{row['name']}: cooldown {row['cooldown_s']:g} s")
    for row in body["budgets"]:
        print(f"{row['scope']}: at most {row['limit']} {row['unit']} a {row['period']}")


@app.command("set")
def set_policy(
    file: Annotated[
        Path | None,
        typer.Argument(help="TOML or JSON with a domain's policy or settings; - stdin."),
    ] = None,
    domain: Annotated[str, typer.Option(help="Domain, when settings are given as options.")] = "",
    service_type: Annotated[
        str, typer.Option(help="With --application prompts: whose quality or daily bound.")
    ] = "",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, such as policy=2d-boost or mpl=[2,1]; repeatable."),
    ] = None,
    reset: Annotated[bool, typer.Option(help="Back to the controller's configuration.")] = False,
    application: ApplicationOption = "flows",
    as_json: JsonOption = False,
) -> None:
    """Set a domain's settings, or pin a whole policy; refused whole with the path when wrong.

    With --application prompts what is wanted: --service-type NAME --set quality=8.5 --set
    daily='"2.50"', or --set daily='"10"' for all service types together.
    """
    document = read_document(file) if file is not None else {}
    if application == "prompts":
        domain = ""
    if file is None and not (domain or application == "prompts"):
        raise InputError("FILE, --domain", "neither", "one of them")
    if domain or service_type or setting or reset:
        if "domains" in document or "intents" in document:
            raise InputError("--domain", domain, "no options beside a file of several tables")
        document = document | ({"domain": domain} if domain else {})
        document |= {"service_type": service_type} if service_type else {}
        document |= dict(key_value(text) for text in setting or ())
        if reset:
            document["reset"] = True
    answer = admin_client("controller").call(
        "policy_set", document=document, application=application, author=getpass.getuser()
    )
    _tell(answer, as_json)


@app.command("rollback")
def rollback(
    number: Annotated[int, typer.Argument(min=1, help="Whose content to issue again.")],
    application: ApplicationOption = "flows",
    as_json: JsonOption = False,
) -> None:
    """Issue an old policy under a new number and hold the automatic ones until `release`."""
    answer = admin_client("controller").call(
        "policy_rollback", number=number, application=application, author=getpass.getuser()
    )
    _tell(answer, as_json)
    message("automatic policies are held until `intentctl policy release`")


@app.command("release")
def release(application: ApplicationOption = "flows", as_json: JsonOption = False) -> None:
    """Let automatic policies go on after a rollback."""
    answer = admin_client("controller").call("policy_release", application=application)
    if as_json:
        print_json(answer)
    else:
        print("released" if answer["released"] else "nothing was held")


def read_document(file: Path) -> dict[str, Any]:
    """A table of a TOML or JSON file. Raises InputError naming the file."""
    name = "stdin" if str(file) == "-" else str(file)
    try:
        if name == "stdin":
            text = sys.stdin.read(MAX_FILE_BYTES + 1)
        else:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("FILE", name, f"a readable text file ({error})") from None
    if len(text) > MAX_FILE_BYTES:
        raise InputError("FILE", name, f"at most {MAX_FILE_BYTES} characters")
    try:
        document = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("FILE", name, f"TOML or a JSON object ({error})") from None
    if not isinstance(document, dict):
        raise InputError("FILE", name, "a table")
    return document


def key_value(text: str) -> tuple[str, Any]:
    """``mpl=[2,1]`` as key and value; what is not TOML is text. Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError("--set", text, "key=value")
    try:
        return key.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def when(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall_s))


def limit(threshold_bytes: float | None) -> str:
    return "inf" if threshold_bytes is None else format_size(threshold_bytes)


def brief(changes: list[str]) -> str:
    return "" if not changes else changes[0] + (f" (+{len(changes) - 1})" if changes[1:] else "")


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    issued = answer["issued"]
    if issued is None:
        print("stored; the policy in force stays as it is")
        return
    print(f"issued policy {issued['number']} of era {issued['era']}")
    for line in issued["changes"]:
        print(f"  {line}")
