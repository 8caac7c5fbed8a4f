"""intentctl jobs: the GPU scheduler of this machine."""

from __future__ import annotations

import inspect
import json
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.core.units import parse_duration_s
from intentd.daemons.ctl.output import (
    ExitCode,
    JsonOption,
    message,
    named_options,
    print_json,
    print_table,
)
from intentd.daemons.ctl.reach import admin_client
from intentd.daemons.kit.admin import AdminRefusedError

app = typer.Typer(help="GPU jobs: submit, predict, watch, explain, cancel.", no_args_is_help=True)
FOLLOW_S = 0.5
GPU_DIGITS = 6
PAGE = 1000
UNSET: tuple[Any, ...] = (None, "", [])
# a job's field -> the option that says it, where they are not called the same
FIELD_OPTIONS = {
    "min_gpus": "--gpus",
    "max_gpus": "--gpus",
    "size_gpu_s": "--size",
    "time_limit_s": "--time-limit",
    "grace_s": "--grace",
    "gpu_types": "--gpu-type",
    "labels": "--label",
}
OVER = ("finished", "failed", "cancelled")
MAX_FILE_BYTES = 1 << 20
NEAR_S = 180 * 86400.0

JobArgument = Annotated[int, typer.Argument(help="Number of the job.")]
CommandArgument = Annotated[
    list[str] | None, typer.Argument(help="Program and arguments, after --.")
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="The job's fields as YAML, JSON or TOML; options win."),
]
NameOption = Annotated[str, typer.Option("--name", help="Name of the job.")]
OwnerOption = Annotated[str, typer.Option(help="Whose job it is (default: you).")]
GpusOption = Annotated[str, typer.Option("--gpus", help="MIN[-MAX], such as 2 or 1-8.")]
SizeOption = Annotated[
    str, typer.Option(help="Work in GPU seconds at the smallest allocation, such as 3600 or 2h.")
]
DemandOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Measured seconds by GPUs instead of --size: 1=100,2=60,4=40; by GPU type, "
        "v100:1=100,2=60, or spread over so many nodes, v100/2:2=70; repeatable."
    ),
]
TypeOption = Annotated[
    list[str] | None, typer.Option("--gpu-type", help="GPU type it may use; repeatable.")
]
StateOption = Annotated[
    list[str] | None, typer.Option("--state", help="Of this state, or unfinished; repeatable.")
]
OwnersOption = Annotated[str, typer.Option("--owner", help="Of this owner.")]
LabelOption = Annotated[str, typer.Option("--label", help="NAME=VALUE, or NAME of any value.")]
ArrayOption = Annotated[
    int, typer.Option("--array", min=0, help="Submitted together with this job.")
]
ProfileOption = Annotated[str, typer.Option(help="Named demand of the daemon's configuration.")]


def _job_fields(
    command: CommandArgument = None,
    file: FileOption = None,
    name: NameOption = "",
    owner: OwnerOption = "",
    gpus: GpusOption = "",
    size: SizeOption = "",
    demand: DemandOption = None,
    profile: ProfileOption = "",
    gpu_type: TypeOption = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE.")] = None,
    workdir: Annotated[str, typer.Option(help="Where it runs (default: its own).")] = "",
    trials: Annotated[int | None, typer.Option(help="Independent runs inside.")] = None,
    time_limit: Annotated[str, typer.Option(help="Of running, such as 2h; 0: none.")] = "",
    grace: Annotated[str, typer.Option(help="From checkpoint signal to kill: 30s.")] = "",
    checkpoint_signal: Annotated[str, typer.Option(help="SIGTERM, SIGUSR1, ...")] = "",
    retries: Annotated[int | None, typer.Option(help="Restarts after a lost node.")] = None,
    array: Annotated[int | None, typer.Option(help="So many of it; 0: one, no array.")] = None,
) -> dict[str, Any]:
    """What a job file and the options that were given say; options win, also those that say 0."""
    fields = read_job(file) if file is not None else {}
    texts = {
        "command": command,
        "name": name,
        "owner": owner,
        "profile": profile,
        "gpu_types": gpu_type,
        "env": _pairs(env, "--env"),
        "labels": _pairs(label, "--label"),
        "workdir": str(Path(workdir).absolute()) if workdir else "",
        "checkpoint_signal": checkpoint_signal,
    }
    fields.update({key: value for key, value in texts.items() if value})
    numbers: dict[str, float | None] = {
        "size_gpu_s": parse_duration_s(size, "--size") if size else None,
        "time_limit_s": parse_duration_s(time_limit, "--time-limit") if time_limit else None,
        "grace_s": parse_duration_s(grace, "--grace") if grace else None,
        "trials": trials,
        "retries": retries,
        "array": array,
    }
    fields.update({key: value for key, value in numbers.items() if value is not None})
    if gpus:
        least, dash, most = gpus.partition("-")
        texts_of = [least, most] if dash else [least]
        if not all(text.isdecimal() and len(text) <= GPU_DIGITS for text in texts_of):
            raise InputError("--gpus", gpus, "MIN or MIN-MAX")
        fields["min_gpus"], fields["max_gpus"] = int(least), int(most or least)
    if demand:
        fields["demand"] = _demand(demand)
    return fields


def _demand(options: list[str]) -> dict[str, Any]:
    """{GPUs: seconds}, or {"type" or "type/nodes": {GPUs: seconds}}."""
    tables: dict[str, dict[str, float]] = {}
    for option in options:
        place, colon, rows = option.rpartition(":")
        if colon and not place:
            raise InputError("--demand", option, "TYPE:GPUS=SECONDS,... or GPUS=SECONDS,...")
        table = tables.setdefault(place, {})
        for pair in rows.split(","):
            at, _, seconds = pair.partition("=")
            if at.strip() in table:
                raise InputError("--demand", option, f"one time for {at.strip()} GPUs")
            table[at.strip()] = parse_duration_s(seconds, f"--demand {pair}")
    if "" in tables and len(tables) > 1:
        raise InputError("--demand", " ".join(options), "a GPU type in each of them, or in none")
    return dict(tables) if "" not in tables else dict(tables[""])


def _with_job(act: Callable[[dict[str, Any], bool], None]) -> Callable[..., None]:
    """A command with the options of a job and --json."""

    def run(as_json: JsonOption = False, **given: Any) -> None:
        typed = [
            f"--{name.replace('_', '-')}" for name, value in given.items() if value not in UNSET
        ]
        with named_options(FIELD_OPTIONS, typed):
            act(_job_fields(**given), as_json)

    told = inspect.signature(_job_fields, eval_str=True)
    own = inspect.signature(run, eval_str=True).parameters["as_json"]
    parameters = [*told.parameters.values(), own]
    setattr(run, "__signature__", told.replace(parameters=parameters, return_annotation=None))  # noqa: B010  a function's type has no such field
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = act.__doc__
    return run


@app.command("submit")
@_with_job
def submit(fields: dict[str, Any], as_json: bool) -> None:
    """Submit a job; prints its number and when it will be done."""
    answer = admin_client("gpu").call("jobs.submit", **fields)
    if as_json:
        print_json(answer)
        return
    for warning in answer["warnings"]:
        message(f"warning: {warning}")
    numbers = answer["jobs"]
    print(f"job {numbers[0]}" if len(numbers) == 1 else f"jobs {numbers[0]}-{numbers[-1]}")
    print(_when(answer["predicted"]))


@app.command("what-if", help="The same as predict: when it would be done, and whom it would delay.")
@app.command("predict")
@_with_job
def predict(fields: dict[str, Any], as_json: bool) -> None:
    """When a job would be done if it were submitted now; of an array, the last of it."""
    answer = admin_client("gpu").call("jobs.predict", **fields)
    if as_json:
        print_json(answer)
        return
    print(_when(answer["predicted"]))
    if answer["delayed_jobs"]:
        print(
            f"would delay {answer['delayed_jobs']} jobs, at most by "
            f"{_span(answer['largest_delay_s'])}"
        )
        rows = [(job, _span(late)) for job, late in answer["delays_s"].items()]
        print_table(("job", "later by"), rows)


@app.command("list")
def list_jobs(
    state: StateOption = None,
    owner: OwnersOption = "",
    name: NameOption = "",
    label: LabelOption = "",
    array: ArrayOption = 0,
    before: Annotated[int, typer.Option(min=0, help="Only numbers below this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    every: Annotated[bool, typer.Option("--all", help="However many there are.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Jobs, newest first; says when there are more."""
    wanted = {"state": state or [], "owner": owner, "name": name, "label": label, "array": array}
    page: dict[str, Any]
    if every:
        page = {"jobs": list(_every(wanted, before)), "next": 0}
    else:
        page = admin_client("gpu").call("jobs.list", **wanted, before=before, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            row["job"],
            row["name"] if row["array_index"] < 0 else f"{row['name']}[{row['array_index']}]",
            row["owner"],
            row["state"],
            f"{row['gpus']} of {row['min_gpus']}-{row['max_gpus']}",
            f"{row['done_percent']:g} %",
            _short(row["predicted"]),
        )
        for row in page["jobs"]
    ]
    print_table(("job", "name", "owner", "state", "GPUs", "done", "ends"), rows)
    if page["next"]:
        message(f"(there are more: --before {page['next']}, or --all)")


def _every(wanted: dict[str, Any], before: int = 0) -> Iterator[dict[str, Any]]:
    client = admin_client("gpu")
    while True:
        page = client.call("jobs.list", **wanted, before=before, limit=PAGE)
        yield from page["jobs"]
        before = page["next"]
        if not before:
            return


@app.command()
def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """One job with its predictions."""
    row = admin_client("gpu").call("jobs.show", job=job)
    if as_json:
        print_json(row)
        return
    print(f"job {row['job']} {row['name']} of {row['owner']}: {row['state']} {row['detail']}")
    print(f"command: {' '.join(row['spec']['command'])}")
    print(f"GPUs: {row['gpus']} of {row['min_gpus']}-{row['max_gpus']}; run {row['epoch']}")
    if row["predicted"]:
        print(_when(row["predicted"]))
    rows = [
        (_clock(p["at_s"]), _clock(p["p50_s"]), _clock(p["p90_s"]), p["cause"])
        for p in row["predictions"][-10:]
    ]
    print_table(("predicted at", "half a chance", "nine in ten", "because"), rows)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    tail_bytes: Annotated[int, typer.Option(min=0, help="Only the last so many bytes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What the job printed. With --follow and --json one document a piece, as it comes."""
    client = admin_client("gpu")
    offset = -tail_bytes if tail_bytes else 0
    pieces: list[str] = []
    dropped = 0
    until: int | None = None  # as much as there was at first
    while True:
        answer = client.call("jobs.logs", job=job, offset=offset)
        offset, dropped = answer["next"], dropped + answer["dropped"]
        until = answer["end"] if until is None else until
        over = answer["state"] in OVER and not answer["text"]
        if not as_json:
            if answer["dropped"]:
                message(f"({answer['dropped']} bytes that were printed here are no longer kept)")
            print(answer["text"], end="", flush=True)
        elif not follow:
            pieces.append(answer["text"])
        elif answer["text"] or over:
            print_json({"job": job, **answer})
            sys.stdout.flush()
        if over or (not follow and (offset >= until or not answer["text"])):
            break
        if not answer["text"]:
            time.sleep(FOLLOW_S)
    if as_json and not follow:
        state = answer["state"]
        print_json({"job": job, "text": "".join(pieces), "dropped": dropped, "state": state})


@app.command()
def cancel(
    job: Annotated[int | None, typer.Argument(help="Number of the job.")] = None,
    state: StateOption = None,
    owner: OwnersOption = "",
    name: NameOption = "",
    label: LabelOption = "",
    array: ArrayOption = 0,
    as_json: JsonOption = False,
) -> None:
    """End a job, or all unfinished ones that the options name: its checkpoint signal, and after its
    grace the kill."""
    wanted = {"owner": owner, "name": name, "label": label, "array": array}
    by_filter = state or any(wanted.values())
    if (job is not None) == bool(by_filter):
        given = "both" if by_filter else "neither"
        raise InputError(
            "JOB, --array, --label, --state, --owner, --name", given, "one job or some"
        )
    client = admin_client("gpu")
    if job is not None:
        answer = client.call("jobs.cancel", job=job)
        if as_json:
            print_json(answer)
        else:
            message(f"job {job}: cancelled")
        return
    numbers = [row["job"] for row in _every(wanted | {"state": state or ["unfinished"]})]
    refused: dict[str, str] = {}
    for number in numbers:
        try:
            client.call("jobs.cancel", job=number)
        except AdminRefusedError as error:  # over meanwhile, or somebody else's
            refused[str(number)] = str(error)
    cancelled = [number for number in numbers if str(number) not in refused]
    if as_json:
        print_json({"jobs": cancelled, "refused": refused})
    else:
        for number in cancelled:
            message(f"job {number}: cancelled")
        for text in refused.values():
            message(text)
        message(f"{len(cancelled)} of {len(numbers)} jobs cancelled")
    if refused:
        raise typer.Exit(int(ExitCode.FAILED))


@app.command()
def events(
    job: Annotated[int, typer.Argument(help="Only of this job.")] = 0,
    after: Annotated[int, typer.Option(min=0, help="After this number.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Changes of state, oldest first."""
    page = admin_client("gpu").call("jobs.events", job=job, after=after)
    if as_json:
        print_json(page)
        return
    rows = [
        (e["number"], _clock(e["at_s"]), e["job"], e["epoch"], e["state"], e["text"])
        for e in page["events"]
    ]
    print_table(("number", "at", "job", "run", "state", ""), rows)


@app.command()
def explain(job: JobArgument, as_json: JsonOption = False) -> None:
    """Why a job is where it is, in numbers."""
    answer = admin_client("gpu").call("jobs.explain", job=job)
    if as_json:
        print_json(answer)
        return
    print(f"job {job}: {answer['state']}: {answer['text']}")
    told = ("job", "state", "text", "predictions", "events")
    print_table(("", ""), [(k, v) for k, v in answer.items() if k not in told])
    print_table(
        ("at", "run", "state", ""),
        [(_clock(e["at_s"]), e["epoch"], e["state"], e["text"]) for e in answer["events"][-20:]],
    )


@app.command()
def nodes(as_json: JsonOption = False) -> None:
    """Nodes and their GPUs."""
    _print_nodes(admin_client("gpu").call("jobs.nodes"), as_json)


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="Name of the node.")],
    evict: Annotated[bool, typer.Option(help="Move what runs there.")] = False,
    undo: Annotated[bool, typer.Option(help="Take new jobs again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start nothing new on a node."""
    answer = admin_client("gpu").call("jobs.drain", node=node, evict=evict, undo=undo)
    _print_nodes(answer, as_json)


def _print_nodes(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            row["name"],
            row["gpus"],
            row["used_gpus"],
            "lost" if row["lost"] else "drained" if row["drained"] else "up",
        )
        for row in answer["nodes"]
    ]
    print_table(("node", "GPUs", "used", "state"), rows)


def read_job(path: Path) -> dict[str, Any]:
    """The fields of a job file. Raises InputError."""
    from intentd.daemons.kit.files import read_text

    text = read_text(path, "--file", MAX_FILE_BYTES)
    import yaml

    try:
        if path.suffix == ".toml":
            fields: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            fields = json.loads(text)
        else:
            fields = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError("--file", str(path), f"YAML, JSON or TOML ({error})") from None
    if not isinstance(fields, dict):
        raise InputError("--file", str(path), "a table of fields")
    if isinstance(fields.get("demand"), dict):
        fields["demand"] = {str(gpus): seconds for gpus, seconds in fields["demand"].items()}
    return fields


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(option, text, "NAME=VALUE")
        pairs[name] = value
    return pairs


def _clock(at_s: float | None) -> str:
    """Local time; with the year where it is not plain. Jobs may be foretold to end after the last
    date there is."""
    if at_s is None:
        return "never"
    try:
        at = datetime.fromtimestamp(at_s).astimezone()
    except (OverflowError, ValueError, OSError):
        return "beyond any date"
    near = abs(at_s - time.time()) < NEAR_S
    return at.strftime("%m-%d %H:%M:%S" if near else "%Y-%m-%d %H:%M")


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "for ever"
    if abs(seconds) < 120:
        return f"{seconds:.0f} s"
    if abs(seconds) < 7200:
        return f"{seconds / 60:.0f} min"
    if abs(seconds) < NEAR_S:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400 / 365.25:.3g} years"


def _short(predicted: dict[str, Any] | None) -> str:
    return f"{_clock(predicted['p50_s'])} (90 %: {_clock(predicted['p90_s'])})" if predicted else ""


def _when(predicted: dict[str, Any] | None) -> str:
    if not predicted:
        return "no prediction now: see intentctl jobs explain"
    coverage = predicted["coverage_percent"]
    kept = f"; {coverage:.0f} % of such predictions held so far" if coverage is not None else ""
    return (
        f"done {_clock(predicted['p50_s'])} (in {_span(predicted['in_p50_s'])}), with 90 % by "
        f"{_clock(predicted['p90_s'])}{kept} ({predicted['cause']})"
    )
