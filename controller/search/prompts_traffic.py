"""A gate's threshold while traffic changes, and what thresholds chosen in hindsight would give.

The stream is drawn from measured queries: each has a chance the gate gave its best stored text, and
whether that text was right. Some served answers are checked (by a model, or by people's words);
only these are learned from.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.controller.search.prompts_cache import Measured, upper_bound
from intentd.core.prompts.cache.gate import OnlineThreshold
from intentd.core.prompts.router import Array

RATES: Final = (0.01, 0.02, 0.03, 0.05)
PHASE_QUERIES: Final = 6000
EDITED_SHARE: Final = 0.3
STEP: Final = 0.02
Labelled = tuple[Array, npt.NDArray[np.bool_]]


def oracle(measured: Measured) -> dict[str, dict[str, float]]:
    """Hits by data set at each set's own best threshold for a false-hit rate, in hindsight."""
    found: dict[str, dict[str, float]] = {}
    for name, (scores, right) in measured.best.items():
        order = np.argsort(-scores, kind="stable")
        false = np.cumsum(~right[order]) / len(scores)
        row = {}
        for rate in RATES:
            fits = np.flatnonzero(false <= rate)
            row[f"{rate:g}"] = round(float((fits[-1] + 1) / len(scores)) if len(fits) else 0.0, 4)
        found[name] = row
    return found


def curve(measured: Measured, points: int = 60) -> dict[str, list[list[float]]]:
    """(false hits a query, hits a query) by data set over all thresholds."""
    found = {}
    for name, (scores, right) in measured.best.items():
        order = np.argsort(-scores, kind="stable")
        false = np.cumsum(~right[order]) / len(scores)
        hits = np.arange(1, len(scores) + 1) / len(scores)
        rows = np.unique(np.linspace(0, len(scores) - 1, points).astype(int))
        found[name] = [[round(float(false[r]), 4), round(float(hits[r]), 4)] for r in rows]
    return found


def phases(measured: Measured) -> list[tuple[str, list[Labelled], list[float]]]:
    """Kinds of traffic one after the other: each data set, then one with many edited questions.

    The edits are of kinds no gate was trained on where there are any: their answers are wrong.
    """
    made: list[tuple[str, list[Labelled], list[float]]] = [
        (name, [pair], [1.0]) for name, pair in measured.best.items()
    ]
    kinds = list((measured.other_edits or measured.edits).values())
    if kinds:
        edits = np.concatenate(kinds)
        first, pair = next(iter(measured.best.items()))
        wrong = (edits, np.zeros(len(edits), bool))
        made.append((f"{first}, edited", [pair, wrong], [1 - EDITED_SHARE, EDITED_SHARE]))
        made.append((f"{first} again", [pair], [1.0]))
    return made


def simulate(
    measured: Measured,
    threshold: float,
    *,
    target: float,
    checked: float = 0.25,
    queries: int = PHASE_QUERIES,
    seed: int = 0,
) -> dict[str, Any]:
    """Fixed and online thresholds on the same stream; rates are of the hits, as users see them.

    target: share of served answers that may be wrong. checked: share of them whose outcome is
    learned. By phase: the first third, in which the threshold moves, and the rest.
    """
    rng = random.Random(seed)
    online = OnlineThreshold(threshold, target, step=STEP, least=0.05, most=0.999)
    rows = []
    for name, parts, weights in phases(measured):
        counts = {kind: np.zeros((2, 2), int) for kind in ("fixed", "online")}
        for number in range(queries):
            scores, right = parts[0] if len(parts) == 1 else rng.choices(parts, weights)[0]
            place = rng.randrange(len(scores))
            late = int(number >= queries // 3)
            for kind, bar in (("fixed", threshold), ("online", online.threshold)):
                if scores[place] >= bar:
                    counts[kind][late] += (1, int(not right[place]))
            if scores[place] >= online.threshold and rng.random() < checked:
                online.learn(false_hit=not right[place])
        late_queries = queries - queries // 3
        rows.append(
            {
                "traffic": name,
                "threshold": round(online.threshold, 4),
                **{kind: _phase(table, late_queries) for kind, table in counts.items()},
            }
        )
    total = {kind: _total(rows, kind) for kind in ("fixed", "online")}
    return {"target_of_hits": target, "checked": checked, "phases": rows, "settled": total}


def _phase(table: npt.NDArray[Any], queries: int) -> dict[str, float]:
    (early_hits, early_wrong), (hits, wrong) = table.tolist()
    return {
        "moving": round(early_wrong / max(1, early_hits), 4),
        "settled": round(wrong / max(1, hits), 4),
        "settled_95": round(upper_bound(wrong, max(1, hits)), 4),
        "hit_rate": round(hits / queries, 4),
        "hits": hits,
        "wrong": wrong,
    }


def _total(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    hits = sum(row[kind]["hits"] for row in rows)
    wrong = sum(row[kind]["wrong"] for row in rows)
    worst = max(row[kind]["settled"] for row in rows)
    return {"wrong_of_hits": round(wrong / max(1, hits), 4), "worst_phase": worst}
