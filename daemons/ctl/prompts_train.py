"""intentctl prompts train: learn the proxy's decisions from recorded data, into files it loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.errors import IntentdError
from intentd.daemons.ctl.output import JsonOption, message, print_json
from intentd.daemons.ctl.prompts_evaluate import embedder

app = typer.Typer(help="Learn routers, gates and thresholds into files.", no_args_is_help=True)

TrainOption = Annotated[
    list[Path],
    typer.Option(help="Files to learn and choose from; of rows with splits, the train rows."),
]
OutOption = Annotated[Path, typer.Option(help="The file to write.")]


def _write(model: Any, made: Mapping[str, Any], out: Path, as_json: bool) -> None:
    from intentd.core.prompts.modelfile import decode_model, encode_model
    from intentd.daemons.kit.files import write_atomically

    data = encode_model(model, made)
    trained = decode_model(data)
    try:
        write_atomically(out, data, 0o644)
    except OSError as error:
        raise IntentdError(f"cannot write {out}: {error.strerror}") from None
    if as_json:
        print_json(
            {
                "file": str(out),
                "kind": trained.kind,
                "bytes": len(data),
                "sha256": trained.digest,
                "made": made,
            }
        )
    else:
        message(f"{out}: {trained.kind}, {len(data)} bytes, sha256 {trained.digest[:16]}")


@app.command("routing")
def routing(
    train: TrainOption,
    weak: Annotated[str, typer.Option(help="The cheap model's name in the files.")],
    strong: Annotated[str, typer.Option(help="The dear model's name in the files.")],
    out: OutOption,
    labels: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many of the prompts only.")
    ] = None,
    weak_as: Annotated[str, typer.Option(help="The pool's name of it, if another.")] = "",
    strong_as: Annotated[str, typer.Option(help="The pool's name of it, if another.")] = "",
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """A router that foretells what the dear model gains over the cheap one."""
    from intentd.controller.search.prompts_training import train_routing

    model, made = train_routing(
        train, embedder(), weak=weak, strong=strong, labels=labels, seed=seed, progress=message
    )
    names = {weak: weak_as or weak, strong: strong_as or strong}
    _write(model.renamed(names), made, out, json)


@app.command("cache")
def cache(
    train: TrainOption,
    out: OutOption,
    max_false_hit: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Wrong answers a query, at most.")
    ] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """The cache's second gate with its one threshold."""
    from intentd.controller.search.prompts_training import train_cache

    model, made = train_cache(
        train, embedder(), max_false_hit=max_false_hit, seed=seed, progress=message
    )
    _write(model, made, out, json)


@app.command("cascade")
def cascade(
    train: TrainOption,
    m1: Annotated[str, typer.Option(help="The cheap model.")],
    verifier: Annotated[list[str], typer.Option(help="Cheap models to compare with.")],
    m2: Annotated[str, typer.Option(help="The dear model.")],
    out: OutOption,
    max_loss: Annotated[float, typer.Option(help="Mean loss of quality allowed.")] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """When agreement of cheap models is not enough, with the cheapest threshold."""
    from intentd.controller.search.prompts_training import train_cascade

    model, made = train_cascade(
        train, first=m1, compared=verifier, second=m2, max_loss=max_loss, seed=seed
    )
    _write(model, made, out, json)


@app.command("context")
def context(train: TrainOption, out: OutOption, seed: int = 0, json: JsonOption = False) -> None:
    """How many messages of a conversation a prompt needs."""
    from intentd.controller.search.prompts_training import train_context

    model, made = train_context(train, seed=seed)
    _write(model, made, out, json)
