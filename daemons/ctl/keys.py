"""``intentctl keys``: CURVE pairs for links and the key of FIN datagrams."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from intentd.daemons.ctl.output import JsonOption, print_json

app = typer.Typer(help="Make and show keys.", no_args_is_help=True, add_completion=False)


class Kind(enum.StrEnum):
    CURVE = "curve"
    FIN = "fin"


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="File to write, mode 0600; never overwritten.")],
    kind: Annotated[
        Kind, typer.Option(help="curve: a pair for ZeroMQ links (and PATH.pub); fin: shared key.")
    ] = Kind.CURVE,
    as_json: JsonOption = False,
) -> None:
    """Make a key file."""
    from intentd.daemons.kit import keys

    if kind is Kind.FIN:
        keys.write_fin_key(path, keys.new_fin_key())
        document = {"kind": "fin", "path": str(path)}
    else:
        pair = keys.new_curve_keys()
        keys.write_curve_keys(path, pair)
        document = {
            "kind": "curve",
            "path": str(path),
            "public_path": f"{path}.pub",
            "public": pair.public.hex(),
        }
    if as_json:
        print_json(document)
        return
    print(f"wrote {path}")
    if kind is Kind.CURVE:
        print(f"wrote {path}.pub: {document['public']}")


@app.command()
def fin(
    path: Annotated[Path, typer.Argument(help="File to write, mode 0600; never overwritten.")],
    as_json: JsonOption = False,
) -> None:
    """Make the shared key of FIN datagrams; the same as new --kind fin."""
    new(path, Kind.FIN, as_json)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A key file, or its .pub.")],
    as_json: JsonOption = False,
) -> None:
    """Show the public part of a CURVE pair; secrets are never printed."""
    from intentd.daemons.kit import keys

    public = keys.read_curve_public(path).hex()
    print_json({"kind": "curve", "public": public}) if as_json else print(public)


@app.command()
def rotate(
    path: Annotated[Path, typer.Argument(help="A FIN key, or the CURVE pair of one side.")],
    allow: Annotated[
        list[Path] | None,
        typer.Option(help="Allow list with the pair's public key; repeatable."),
    ] = None,
    reload: Annotated[
        list[str] | None,
        typer.Option(help="Role to reload here once the files are written; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Take the next of the three steps of a rotation; says what has to happen before the next.

    Step 1 adds a key, step 2 uses it, step 3 forgets the old one. At every moment both sides have
    a key in common, so nothing is cut off and no step has to happen everywhere at once.
    """
    from intentd.daemons.ctl.reach import admin_client
    from intentd.daemons.kit import keys, rotation

    step = rotation.next_step(path, allow or ())
    fin = keys.FIN in keys.secret_lines(path)
    for role in reload or ():
        admin_client(role).call("reload")
    next_steps = _next_steps(step.name, path, fin=fin, allow=bool(allow))
    if as_json:
        print_json({"path": str(path), "step": step.name.lower(), "next": next_steps})
        return
    print(f"{path}: {step.value}")
    for number, text in enumerate(next_steps, 1):
        print(f"  {number}. {text}")


def _next_steps(step: str, path: Path, *, fin: bool, allow: bool) -> list[str]:
    """What the operator does now, in order."""
    again = f"intentctl keys rotate {path}" + (" --allow FILE" if allow else "")
    if fin:
        steps = [f"copy {path} to every agent and sequencer of its domains", "reload them"]
    elif allow:  # a member's pair: who lets it in must know
        also = f"if others connect to the owner of {path}: copy {path}.pub to them, reload them"
        steps = {
            "ADDED": ["reload the daemons whose allow lists have changed", also],
            "SWITCHED": [f"reload the daemon whose key {path} is"],
            "DROPPED": ["reload the daemons whose allow lists have changed", also],
        }[step]
    else:
        pub = f"copy {path}.pub over the server_key_file of every member that connects here"
        steps = {
            "ADDED": [pub, "reload those members"],
            "SWITCHED": [f"reload the daemon whose key {path} is", "see that members are back"],
            "DROPPED": [pub, "reload those members"],
        }[step]
    return steps if step == "DROPPED" else [*steps, f"then: {again}"]
