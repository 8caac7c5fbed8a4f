"""From files to a trained model and its provenance, one function a kind of decision.

Every choice (ridges, thresholds, penalties) is made on the rows learned from, by folds: what is
reported on has had no part in it. `intentctl prompts train` writes it, `evaluate` scores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import intentd
from intentd.controller.search import (
    prompts_cache,
    prompts_cascade,
    prompts_context,
    prompts_facts,
    prompts_routing,
)
from intentd.controller.search.prompts_data import (
    TRAIN,
    Embed,
    labelled,
    provenance,
    read_rows,
    set_name,
    train_rows,
)
from intentd.controller.search.prompts_routing import Progress
from intentd.core.errors import InputError
from intentd.core.prompts.cache.gate import GateModel
from intentd.core.prompts.cascade import TrainedCascade
from intentd.core.prompts.chooser import ChooserModel
from intentd.core.prompts.router import RouterModel

EMBEDDER: Final = "all-MiniLM-L6-v2 int8"


def _made(paths: Sequence[Path], seed: int, **settings: Any) -> dict[str, Any]:
    return {
        "by": f"intentd {intentd.__version__}",
        "files": provenance(paths),
        "rows": "train",
        "seed": seed,
        **settings,
    }


def train_routing(
    paths: Sequence[Path],
    embed: Embed,
    *,
    weak: str,
    strong: str,
    labels: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[RouterModel, dict[str, Any]]:
    """A router of two models. labels: learn from so many of the prompts only."""
    learned = prompts_routing.outcomes_of(train_rows(paths), weak, strong)
    if labels is not None:
        learned = prompts_routing.sample(learned, labels, seed)
    model = prompts_routing.fit_router(
        learned, embed, weak=weak, strong=strong, seed=seed, progress=progress
    )
    return model, _made(paths, seed, prompts=len(learned.prompts), embedder=EMBEDDER)


def routing_extras(
    model: RouterModel,
    files: Sequence[Path],
    other: Sequence[Path],
    reported: Sequence[Mapping[str, Any]],
    embed: Embed,
    *,
    weak: str,
    strong: str,
    seed: int = 0,
) -> dict[str, Any]:
    """What a router is to be compared with: the TF-IDF floor, 200 labels, no labels of its kind.

    other: files without the kind of prompt reported on; none: the rows of `files` from data sets
    that the reported rows are not of. `unlabelled` is left out when there are none.
    """
    rows = train_rows(files)
    learned = prompts_routing.outcomes_of(rows, weak, strong)
    tested = prompts_routing.outcomes_of(reported, weak, strong)
    known = {row.get("dataset") for row in reported}
    foreign = train_rows(other) if other else [r for r in rows if r.get("dataset") not in known]
    found: dict[str, Any] = {
        "floor": prompts_routing.over_floor(model, learned, tested, embed, seed=seed),
        "few": prompts_routing.few_labels(learned, tested, embed, weak=weak, strong=strong),
    }
    scored = [row for row in foreign if {weak, strong} <= set(row.get("models", {}))]
    if len(scored) >= prompts_routing.LEAST_LABELS:
        found["unlabelled"] = prompts_routing.unlabelled(
            prompts_routing.outcomes_of(scored, weak, strong),
            tested, embed, weak=weak, strong=strong, seed=seed,
        )  # fmt: skip
    return found


def train_cache(
    paths: Sequence[Path],
    embed: Embed,
    *,
    max_false_hit: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[GateModel, dict[str, Any]]:
    """The second gate with its one threshold."""
    rows = {set_name(path): labelled(train_rows([path]), path) for path in paths}
    model, chosen = prompts_cache.fit_gate(
        rows, embed, max_false_hit=max_false_hit, seed=seed, progress=progress
    )
    return model, _made(paths, seed, embedder=EMBEDDER, chosen_on=chosen)


def train_cascade(
    paths: Sequence[Path],
    *,
    first: str,
    compared: Sequence[str],
    second: str,
    max_loss: float,
    seed: int = 0,
) -> tuple[TrainedCascade, dict[str, Any]]:
    """Agreement of a cheap model with others, with the cheapest threshold within max_loss."""
    replay = prompts_cascade.replay_of(train_rows(paths), first, compared, second)
    model, chosen = prompts_cascade.fit_cascade(replay, max_loss=max_loss, seed=seed)
    named = TrainedCascade(model.agreement, model.threshold, first, tuple(compared), second)
    return named, _made(paths, seed, max_loss=max_loss, chosen_on=chosen)


def train_context(paths: Sequence[Path], *, seed: int = 0) -> tuple[ChooserModel, dict[str, Any]]:
    """How many messages a prompt needs."""
    turns = prompts_context.turns_of(train_rows(paths))
    return prompts_context.fit_chooser(turns), _made(paths, seed, turns=len(turns.needed))


def evaluate_facts(
    docs: Sequence[Path], tests: Sequence[Path], embed: Embed, *, max_wrong: float
) -> dict[str, Any]:
    """Retrieval of facts from stored passages, and the decision to answer from them.

    All passages are stored. Weight and threshold come from the train questions, the report from
    the others; without train questions there is no threshold, and none is made up.
    """
    passages = [row for path in docs for row in read_rows(path)]
    rows = [row for path in tests for row in read_rows(path)]
    tasks = [row for row in rows if "conversation" in row]
    questions = [row for row in rows if "question" in row]
    if not tasks and not questions:
        raise InputError("--test", [str(path) for path in tests], "rows with a question")

    def split(given: Sequence[dict[str, Any]], *, train: bool) -> list[dict[str, Any]]:
        return [row for row in given if (row.get("split") == TRAIN) is train]

    store = prompts_facts.store_of(passages, embed)
    result: dict[str, Any] = {"chosen_on": None}
    chosen = prompts_facts.Chosen(0.5, None)
    if split(questions, train=True):
        asked = prompts_facts.ask(store, split(questions, train=True), embed)
        chosen = prompts_facts.choose(store, asked, max_wrong)
        result["chosen_on"] = prompts_facts.report(store, asked, chosen)
    if questions:
        reported = split(questions, train=False)
        if not reported:
            raise InputError("--test", len(questions), "questions that are not train rows")
        result |= prompts_facts.report(store, prompts_facts.ask(store, reported, embed), chosen)
    if tasks:
        scored = [
            prompts_facts.task_scores(split(tasks, train=train), embed, chosen.weight)
            for train in (True, False)
        ]
        result["answerable_tasks"] = prompts_facts.report_tasks(*scored)
    return result
