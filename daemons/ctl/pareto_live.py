"""The controller's Pareto front from the command line: preference, search, choice."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from intentd.core.errors import InputError
from intentd.daemons.ctl.output import ExitCode, JsonOption, message, print_json
from intentd.daemons.ctl.reach import admin_client

POLL_S: Final = 0.5


def live_front() -> dict[str, Any]:
    """The controller's present front whole."""
    return admin_client("controller").call("pareto_show")


def set_preference(
    objectives: Annotated[str, typer.Argument(help="Such as jct:avg,prederr:p99.")],
    as_json: JsonOption = False,
) -> None:
    """What the trade-offs are between; for the controller's next searches."""
    answer = admin_client("controller").call("pareto_set", objectives=objectives)
    if as_json:
        print_json(answer)
    else:
        print(f"objectives: {', '.join(answer['objectives'])}")


def update(
    evaluations: Annotated[int | None, typer.Option(min=1, help="Evaluations.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="spea2 or nsga2.")] = None,
    space: Annotated[str | None, typer.Option(help="direct or wfq.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have the controller search its front anew, from the history it has."""
    client = admin_client("controller")
    given = {
        "evaluations": evaluations, "seconds": seconds, "algorithm": algorithm, "space": space,
        "workers": workers,
    }  # fmt: skip
    told = client.call("pareto_update", **{k: v for k, v in given.items() if v is not None})
    while wait and told["searching"]:
        time.sleep(POLL_S)
        told = client.call("pareto_status")["search"]
    if as_json:
        print_json(told)
    elif told["error"]:
        message(f"intentctl: {told['error']}")
    else:
        print(f"searching: {told['searching']}" if told["searching"] else "done")
    if wait and told["error"]:
        raise typer.Exit(int(ExitCode.FAILED))


def cancel(as_json: JsonOption = False) -> None:
    """End the controller's search with what it found."""
    answer = admin_client("controller").call("pareto_cancel")
    if as_json:
        print_json(answer)
    else:
        print("cancelled" if answer["cancelled"] else "no search runs")


def status(as_json: JsonOption = False) -> None:
    """What the controller knows of jobs, its front, the choice and the policy in force."""
    told = admin_client("controller").call("pareto_status")
    if as_json:
        print_json(told)
        return
    search, front, policy = told["search"], told["front"], told["policy"]
    print(f"objectives: {', '.join(told['objectives'])}")
    if policy is not None:
        print(f"in force: policy {policy['era']}.{policy['number']}: {policy['reason']}")
    if front is not None:
        print(f"front {front['number']}: {front['points']} points ({front['reason']})")
    if search["searching"]:
        print(f"searching ({search['searching']}): {search['done']} of {search['total']}")
    if search["error"]:
        print(f"last search: {search['error']}")
    for row in told["schedulers"]:
        load = "?" if row["load"] is None else f"{row['load']:.2f}"
        print(f"{row['name']}: {row['gpus']:g} GPUs, {row['known_jobs']} jobs known, load {load}")


def apply(
    file: Annotated[
        Path | None, typer.Argument(help="A result of `pareto search --out`; else the live front.")
    ] = None,
    index: Annotated[int | None, typer.Option("--index", "-i", help="Its point's number.")] = None,
    prefer: Annotated[
        str, typer.Option(help="Best in this objective, such as jct:avg, or balanced.")
    ] = "",
    at_most: Annotated[
        list[str] | None, typer.Option("--at-most", help="Bound first: prederr:avg=5; repeatable.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Choose by the same rule on every new front.")
    ] = False,
    T: Annotated[float | None, typer.Option("--T", help="Own WFQ: C^2 in a class.")] = None,  # noqa: N803  the chapter's symbol
    W: Annotated[float | None, typer.Option("--W", help="Own WFQ: weight steepness.")] = None,  # noqa: N803  the chapter's symbol
    zeta: Annotated[float | None, typer.Option(help="Own WFQ: least efficiency.")] = None,
    delta: Annotated[float | None, typer.Option(help="Own WFQ: step of relaxation.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Change nothing, say what.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put one configuration in force: a point of a front, a rule, or WFQ(T, W, zeta, delta)."""
    own = {"T": T, "W": W, "zeta": zeta, "delta": delta}
    own = {name: value for name, value in own.items() if value is not None}
    choice: dict[str, Any] = {"index": index, "prefer": prefer, "follow": follow}
    choice["at_most"] = dict(_bound(text) for text in at_most or ())
    chosen = index is not None or bool(prefer or at_most)
    if bool(own) == chosen:
        raise InputError("--index, --prefer, --at-most, --T", "both" if own else "none", "one way")
    if own and "T" not in own:
        raise InputError("--T", None, "a number > 0 with --W, --zeta, --delta")
    if file is not None and (own or follow):
        raise InputError("FILE", str(file), "neither --T nor --follow beside a file")
    args: dict[str, Any] = {"preview": preview, "author": getpass.getuser()}
    if own:
        args["config"] = own
    elif file is not None:
        args |= _from_file(file, choice)
    else:
        args["choice"] = choice
    answer = admin_client("controller").call("pareto_apply", **args)
    if as_json:
        print_json(answer)
    elif answer["issued"] is None:
        shown = answer.get("test") or answer.get("config")
        print(f"would be: {shown}")
    else:
        issued = answer["issued"]
        print(f"issued policy {issued['number']} of era {issued['era']}: {issued['reason']}")


def _from_file(file: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """The configuration a choice means in a file's front."""
    from intentd.core.jobs.choice import choice_from_plain, pick
    from intentd.core.jobs.policy import to_plain
    from intentd.daemons.ctl.pareto import read_result

    front = read_result(file)
    at = pick([point.test or point.train for point in front], choice_from_plain(choice))
    return {"config": to_plain(front[at].policy), "why": f"point {at} of {file.name}"}


def _bound(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name.strip(), float(value if equals else "x")
    except ValueError:
        raise InputError("--at-most", text, "OBJECTIVE=NUMBER, such as prederr:avg=5") from None
