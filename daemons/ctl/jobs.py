"""intentctl jobs: the GPU scheduler of this machine."""

from __future__ import annotations

import json
import sys
import time
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.core.units import parse_duration_s
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(help="GPU jobs: submit, predict, watch, explain, cancel.", no_args_is_help=True)
FOLLOW_S = 0.5
OVER = ("finished", "failed", "cancelled")
MAX_FILE_BYTES = 1 << 20

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
    str, typer.Option(help="Measured seconds by GPUs: 1=100,2=60,4=40 instead of --size.")
]
TypeOption = Annotated[
    list[str] | None, typer.Option("--gpu-type", help="GPU type it may use; repeatable.")
]
ProfileOption = Annotated[str, typer.Option(help="Named demand of the daemon's configuration.")]


@app.command()
def submit(
    command: CommandArgument = None,
    file: FileOption = None,
    name: NameOption = "",
    owner: OwnerOption = "",
    gpus: GpusOption = "",
    size: SizeOption = "",
    demand: DemandOption = "",
    profile: ProfileOption = "",
    gpu_type: TypeOption = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE.")] = None,
    workdir: Annotated[str, typer.Option(help="Where it runs (default: its own).")] = "",
    trials: Annotated[int | None, typer.Option(help="Independent runs inside.")] = None,
    time_limit: Annotated[str, typer.Option(help="Of running, such as 2h.")] = "",
    grace: Annotated[str, typer.Option(help="From checkpoint signal to kill: 30s.")] = "",
    checkpoint_signal: Annotated[str, typer.Option(help="SIGTERM, SIGUSR1, ...")] = "",
    retries: Annotated[int | None, typer.Option(help="Restarts after a lost node.")] = None,
    array: Annotated[int, typer.Option(help="Submit so many of it.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Submit a job; prints its number and when it will be done."""
    fields = _fields(command, file, name, owner, gpus, size, demand, profile)
    optional: dict[str, Any] = {
        "gpu_types": gpu_type or [],
        "env": _pairs(env, "--env"),
        "labels": _pairs(label, "--label"),
        "workdir": str(Path(workdir).absolute()) if workdir else "",
        "trials": trials,
        "time_limit_s": parse_duration_s(time_limit, "--time-limit") if time_limit else None,
        "grace_s": parse_duration_s(grace, "--grace") if grace else None,
        "checkpoint_signal": checkpoint_signal,
        "retries": retries,
        "array": array,
    }
    fields.update(
        {key: value for key, value in optional.items() if value not in (None, "", {}, [], 0)}
    )
    if retries == 0:
        fields["retries"] = 0
    answer = admin_client("gpu").call("jobs.submit", **fields)
    if as_json:
        print_json(answer)
        return
    for warning in answer["warnings"]:
        message(f"warning: {warning}")
    numbers = answer["jobs"]
    print(f"job {numbers[0]}" if len(numbers) == 1 else f"jobs {numbers[0]}-{numbers[-1]}")
    print(_when(answer["predicted"]))


def _predict(fields: dict[str, Any], as_json: bool) -> None:
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


@app.command("what-if", help="The same as predict: when it would be done, and whom it would delay.")
@app.command()
def predict(
    command: CommandArgument = None,
    file: FileOption = None,
    name: NameOption = "",
    owner: OwnerOption = "",
    gpus: GpusOption = "",
    size: SizeOption = "",
    demand: DemandOption = "",
    profile: ProfileOption = "",
    gpu_type: TypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """When a job would be done if it were submitted now."""
    fields = _fields(command, file, name, owner, gpus, size, demand, profile)
    if gpu_type:
        fields["gpu_types"] = gpu_type
    _predict(fields, as_json)


@app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Of this state, or unfinished.")
    ] = None,
    owner: Annotated[str, typer.Option(help="Of this owner.")] = "",
    name: NameOption = "",
    label: Annotated[str, typer.Option(help="NAME=VALUE.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Jobs, newest first."""
    args = {"state": state or [], "owner": owner, "name": name, "label": label, "limit": limit}
    page = admin_client("gpu").call("jobs.list", **args)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            row["job"],
            row["name"],
            row["owner"],
            row["state"],
            f"{row['gpus']} of {row['min_gpus']}-{row['max_gpus']}",
            f"{row['done_percent']:g} %",
            _short(row["predicted"]),
        )
        for row in page["jobs"]
    ]
    print_table(("job", "name", "owner", "state", "GPUs", "done", "ends"), rows)


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
    dropped, until = 0, None
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
def cancel(job: JobArgument, as_json: JsonOption = False) -> None:
    """End a job: its checkpoint signal, and after its grace the kill."""
    answer = admin_client("gpu").call("jobs.cancel", job=job)
    if as_json:
        print_json(answer)
    else:
        message(f"job {job}: cancelled")


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


def _fields(
    command: list[str] | None,
    file: Path | None,
    name: str,
    owner: str,
    gpus: str,
    size: str,
    demand: str,
    profile: str,
) -> dict[str, Any]:
    fields = read_job(file) if file is not None else {}
    given: dict[str, Any] = {
        "command": command,
        "name": name,
        "owner": owner,
        "profile": profile,
        "size_gpu_s": parse_duration_s(size, "--size") if size else None,
    }
    fields.update({key: value for key, value in given.items() if value})
    if gpus:
        least, _, most = gpus.partition("-")
        if not least.isdecimal() or (most and not most.isdecimal()):
            raise InputError("--gpus", gpus, "MIN or MIN-MAX")
        fields["min_gpus"], fields["max_gpus"] = int(least), int(most or least)
    if demand:
        fields["demand"] = {}
        for pair in demand.split(","):
            at, _, seconds = pair.partition("=")
            fields["demand"][at.strip()] = parse_duration_s(seconds, f"--demand {pair}")
    return fields


def read_job(path: Path) -> dict[str, Any]:
    """The fields of a job file. Raises InputError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError("--file", str(path), f"a file of at most {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("--file", str(path), f"a readable text file ({error})") from None
    import yaml

    try:
        if path.suffix == ".toml":
            fields: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            fields = json.loads(text)
        else:
            fields = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
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


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).astimezone().strftime("%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    if abs(seconds) < 120:
        return f"{seconds:.0f} s"
    if abs(seconds) < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


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
