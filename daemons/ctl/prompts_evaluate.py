"""intentctl prompts evaluate: the proxy's decisions, measured on recorded data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table

if TYPE_CHECKING:
    from intentd.controller.search.prompts_data import CachedEmbedder

app = typer.Typer(help="Decision quality on recorded outcomes.", no_args_is_help=True)

TrainOption = Annotated[
    list[Path] | None,
    typer.Option(help="Files to learn and choose from; of rows with splits, the train rows."),
]
ModelOption = Annotated[
    Path | None, typer.Option(help="A trained model's file, instead of --train.")
]
TestOption = Annotated[
    Path, typer.Option(help="File to report on; of rows with splits, those that are not train.")
]


def _reported(path: Path) -> list[dict[str, Any]]:
    from intentd.controller.search.prompts_data import reported_rows

    return reported_rows(path)


def _one_of(train: list[Path] | None, model: Path | None) -> list[Path]:
    """The files to learn from, [] when a trained model is given. Raises InputError."""
    if bool(train) == (model is not None):
        given = "both" if train else "neither"
        raise InputError("--train, --model", given, "one of the two")
    return train or []


def load_model(path: Path, kind: str) -> Any:
    """The model of a file. Raises InputError."""
    from intentd.core.prompts.modelfile import decode_model

    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("--model", str(path), f"a readable file ({error.strerror})") from None
    return decode_model(data, name=str(path), kind=kind).model


def embedder() -> CachedEmbedder:
    try:
        from intentd.controller.search.prompts_data import CachedEmbedder, default_cache
        from intentd.proxy.minilm import MiniLM

        lazy: list[MiniLM] = []

        def embed(texts: Any) -> Any:
            message(f"embedding {len(texts)} texts")
            if not lazy:
                lazy.append(MiniLM())
            return lazy[0].embed(texts)

        return CachedEmbedder(embed, default_cache())
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("intentd"):
            raise
        text = f"{error.name} is not installed (pip install 'intentd[evaluate]')"
        raise IntentdError(f"prompts evaluate: {text}") from None


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    shown = {key: value for key, value in result.items() if not isinstance(value, (list, dict))}
    print_table(("figure", "value"), [(key, str(value)) for key, value in shown.items()])


@app.command("routing")
def routing(
    test: TestOption,
    weak: Annotated[str, typer.Option(help="The cheap model's name in the files.")],
    strong: Annotated[str, typer.Option(help="The dear model's name in the files.")],
    train: TrainOption = None,
    model: ModelOption = None,
    labels: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many of the prompts only.")
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="Other kinds of prompts: what a router of these alone does on the test."),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Leave out the floor, the few labels and the other kinds.")
    ] = False,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Learn a router and report APGR and the strong calls for 50 % and 80 % of the gap.

    With --train also: a TF-IDF ridge on the same labels as the floor (paired bootstrap), routers
    of 200 labels, and one without labels of this kind of prompt (--other, else the train files'
    other data sets).
    """
    from intentd.controller.search.prompts_routing import evaluate_routing, outcomes_of
    from intentd.controller.search.prompts_training import routing_extras, train_routing

    files = _one_of(train, model)
    rows = _reported(test)
    tested = outcomes_of(rows, weak, strong)
    embed = embedder()
    if model is not None:
        router = load_model(model, "router")
    else:
        router, _ = train_routing(
            files, embed, weak=weak, strong=strong, labels=labels, seed=seed, progress=message
        )
    result = evaluate_routing(router, tested, embed, seed=seed)
    if files and not quick:
        message("floor, few labels, other kinds of prompts")
        result |= routing_extras(
            router, files, other or [], rows, embed, weak=weak, strong=strong, seed=seed
        )
    _show(result, json)


@app.command("cache")
def cache(
    test: Annotated[
        list[Path], typer.Option(help="Files to report on; of splits, what is not train.")
    ],
    train: TrainOption = None,
    model: ModelOption = None,
    max_false_hit: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Wrong answers a query, at most.")
    ] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Fit the second gate and its one threshold on the train files; report hits and edits.

    Half of each file's items are stored, the others ask.
    """
    from intentd.controller.search.prompts_cache import measure, report
    from intentd.controller.search.prompts_data import labelled, set_name
    from intentd.controller.search.prompts_training import train_cache

    files = _one_of(train, model)
    tested = {set_name(path): labelled(_reported(path), path) for path in test}
    embed = embedder()
    if model is not None:
        gate = load_model(model, "cache")
    else:
        gate, _ = train_cache(
            files, embed, max_false_hit=max_false_hit, seed=seed, progress=message
        )
    _show(report(measure(gate, tested, embed, seed), gate.threshold), json)


@app.command("cascade")
def cascade(
    test: TestOption,
    m1: Annotated[str, typer.Option(help="The cheap model.")],
    verifier: Annotated[
        list[str], typer.Option(help="A recorded judge, or cheap models to compare with.")
    ],
    m2: Annotated[str, typer.Option(help="The dear model.")],
    threshold: Annotated[
        float | None,
        typer.Option(help="Judge: escalate below it (1-10). Else: chance of being wrong (0-1)."),
    ] = None,
    train: TrainOption = None,
    model: ModelOption = None,
    max_loss: Annotated[
        float, typer.Option(help="Without --threshold: mean loss allowed on the train files.")
    ] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Replay M1 -> verifier -> M2 on recorded answers; report quality, cost and escalations."""
    import numpy as np

    from intentd.controller.search import prompts_cascade as study
    from intentd.controller.search.prompts_training import train_cascade
    from intentd.core.prompts.cascade import PRIOR_AGREEMENT, check_threshold

    rows = _reported(test)
    if study.has_judges(rows):
        if len(verifier) != 1 or threshold is None:
            raise InputError("--verifier, --threshold", verifier, "one judge and a threshold")
        replay, scores, other = study.judged_replay(rows, m1, verifier[0], m2)
        escalated = scores < check_threshold(threshold, "--threshold")
        result = study.score_cascade(np.asarray(escalated), replay, seed=seed)
        _show({**result, "threshold": threshold, "measured_by": other}, json)
        return
    agreement = PRIOR_AGREEMENT
    if train or model is not None:
        files = _one_of(train, model)
        if model is not None:
            learned = load_model(model, "cascade")
        else:
            learned, _ = train_cascade(
                files, first=m1, compared=verifier, second=m2, max_loss=max_loss, seed=seed
            )
        agreement = learned.agreement
        threshold = learned.threshold if threshold is None else threshold
    if threshold is None or not 0 <= threshold <= 1:
        raise InputError("--threshold", threshold, "a chance from 0 to 1, or --train files")
    replay = study.replay_of(rows, m1, verifier, m2)
    escalated = study.doubts(agreement, replay) >= threshold
    result = study.score_cascade(np.asarray(escalated), replay, seed=seed)
    _show({**result, "threshold": round(threshold, 6)}, json)


@app.command("context")
def context(
    test: TestOption, train: TrainOption = None, model: ModelOption = None, json: JsonOption = False
) -> None:
    """Learn how many messages a turn needs; report tokens, turns with enough, needless ones."""
    import numpy as np

    from intentd.controller.search import prompts_context as study
    from intentd.controller.search.prompts_training import train_context

    files = _one_of(train, model)
    turns = study.turns_of(_reported(test))
    chooser = load_model(model, "context") if model is not None else train_context(files)[0]
    found = study.score(turns, study.predict(chooser, turns), chooser.threshold, chooser.further)
    found["last_k"] = {
        str(k): study.count(turns, np.full(len(turns.needed), k)) for k in (0, 1, 2, 5)
    }
    _show(found, json)


@app.command("facts")
def facts(
    docs: Annotated[list[Path], typer.Option(help="Passages to store: text, passage_id, title.")],
    test: Annotated[
        list[Path],
        typer.Option(
            help="Questions with answers and passage_id; without one the store cannot answer. Or "
            "conversations with passages and answerability."
        ),
    ],
    max_wrong: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Foreign questions answered, at most.")
    ] = 0.05,
    json: JsonOption = False,
) -> None:
    """Store passages, ask: is the answer in the best chunk, and are foreign questions refused?"""
    from intentd.controller.search.prompts_training import evaluate_facts

    _show(evaluate_facts(docs, test, embedder(), max_wrong=max_wrong), json)
