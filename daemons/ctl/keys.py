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
