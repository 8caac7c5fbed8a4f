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
    list[Path], typer.Option(help="Files to learn from; of rows with splits, the train rows.")
]
TestOption = Annotated[
    Path, typer.Option(help="File to report on; of rows with splits, the dev rows.")
]


def _rows(paths: list[Path], split: str) -> list[dict[str, Any]]:
    from intentd.controller.search.prompts_data import of_split, read_rows

    rows = [row for path in paths for row in of_split(read_rows(path), split)]
    if not rows:
        raise InputError("files", [str(path) for path in paths], f"rows of the split {split!r}")
    return rows


def _embedder() -> CachedEmbedder:
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
    train: TrainOption,
    test: TestOption,
    weak: Annotated[str, typer.Option(help="The cheap model's name in the files.")],
    strong: Annotated[str, typer.Option(help="The dear model's name in the files.")],
    labels: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many of the prompts only.")
    ] = None,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Learn a router and report APGR and the strong calls for 50 % and 80 % of the gap."""
    from intentd.controller.search.prompts_routing import (
        evaluate_routing,
        fit_router,
        outcomes_of,
        sample,
    )

    learned = outcomes_of(_rows(train, "train"), weak, strong)
    if labels is not None:
        learned = sample(learned, labels, seed)
    tested = outcomes_of(_rows([test], "dev"), weak, strong, helpers=False)
    embed = _embedder()
    model = fit_router(learned, embed, weak=weak, strong=strong, seed=seed, progress=message)
    _show(evaluate_routing(model, tested, embed, seed=seed), json)


@app.command("cache")
def cache(
    train: TrainOption,
    test: Annotated[list[Path], typer.Option(help="Files to report on; of splits, the dev rows.")],
    max_false_hit: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Wrong answers a query, at most.")
    ] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Fit the second gate, choose one threshold on the test files, report hits and edits.

    Half of each file's items are stored, the others ask.
    """
    from intentd.controller.search.prompts_cache import (
        choose_threshold,
        fit_gate,
        measure,
        report,
    )

    embed = _embedder()
    learned = {path.name.split(".")[0]: _rows([path], "train") for path in train}
    tested = {path.name.split(".")[0]: _rows([path], "dev") for path in test}
    model = fit_gate(learned, embed, seed=seed, progress=message)
    measured = measure(model, tested, embed, seed)
    _show(report(measured, choose_threshold(measured, max_false_hit)), json)


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
    train: Annotated[
        list[Path] | None, typer.Option(help="Learn from agreement in these files.")
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Without --threshold: mean loss allowed on the train files.")
    ] = 0.01,
    seed: int = 0,
    json: JsonOption = False,
) -> None:
    """Replay M1 -> verifier -> M2 on recorded answers; report quality, cost and escalations."""
    import numpy as np

    from intentd.controller.search import prompts_cascade as study
    from intentd.core.prompts.cascade import PRIOR_AGREEMENT, check_threshold

    rows = _rows([test], "dev")
    if study.has_judges(rows):
        if len(verifier) != 1 or threshold is None:
            raise InputError("--verifier, --threshold", verifier, "one judge and a threshold")
        replay, scores, other = study.judged_replay(rows, m1, verifier[0], m2)
        escalated = scores < check_threshold(threshold, "--threshold")
        result = study.score_cascade(np.asarray(escalated), replay, seed=seed)
        _show({**result, "threshold": threshold, "measured_by": other}, json)
        return
    replay = study.replay_of(rows, m1, verifier, m2)
    model = PRIOR_AGREEMENT
    if train:
        learned = study.replay_of(_rows(train, "train"), m1, verifier, m2)
        model = study.fit_agreement(learned)
        if threshold is None:
            doubt = study.doubts(model, learned)
            threshold = study.cheapest_threshold(doubt, learned, max_loss)
    elif threshold is None:
        raise InputError("--threshold", None, "a chance from 0 to 1, or --train files")
    if not 0 <= threshold <= 1:
        raise InputError("--threshold", threshold, "a chance from 0 to 1")
    escalated = study.doubts(model, replay) >= threshold
    result = study.score_cascade(np.asarray(escalated), replay, seed=seed)
    _show({**result, "threshold": round(threshold, 6)}, json)


@app.command("context")
def context(train: TrainOption, test: TestOption, json: JsonOption = False) -> None:
    """Learn how many messages a turn needs; report tokens, turns with enough, needless ones."""
    import numpy as np

    from intentd.controller.search import prompts_context as study

    model = study.fit_chooser(study.turns_of(_rows(train, "train")))
    turns = study.turns_of(_rows([test], "dev"))
    chances = study.predict(model, turns)
    found = study.score(turns, chances, model.threshold, model.further)
    found["last_k"] = {
        str(k): study.count(turns, np.full(len(turns.needed), k)) for k in (0, 1, 2, 5)
    }
    _show(found, json)
