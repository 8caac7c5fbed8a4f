"""A Pareto search in a process of its own, for the controller: niced, bounded, cancelled by word.

    python -m intentd.controller.search.worker

The first line of standard input is the job (``process.search_job``); a later line "cancel" ends
the search with what was found so far; the end of the input, which is the controller's death, ends
everything.
Standard output: ``{"done": n, "total": m}`` after each batch, at last ``{"result": {...}}`` or
``{"error": "..."}``, one JSON document a line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from intentd.controller.search import histories
from intentd.controller.search.process import table_from_plain
from intentd.controller.search.solver import Budget, PreferenceSolver, Search
from intentd.core.errors import IntentdError
from intentd.core.jobs.metrics import parse_objectives
from intentd.core.jobs.policy import Costs, from_plain
from intentd.core.jobs.search_space import Evaluator

NICE: Final = 10


def run(job: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Search, and measure the policy in force on the same histories. Raises IntentdError."""
    found = histories.of_trace(
        table_from_plain(job["table"]),
        jobs=job["sample_jobs"],
        seed=job["seed"],
        samples=job["samples"],
    )
    costs = Costs(**job["costs"])
    solver = PreferenceSolver(
        job["gpus"],
        found.train,
        found.test,
        costs=costs,
        predictions=job["predictions"],
        judge=found.judge,
    )
    objectives = parse_objectives(",".join(job["objectives"]))
    solver.set_preference(objectives)
    result = solver.update_pareto_front(
        algorithm=job["algorithm"],
        space=job["space"],
        budget=Budget(job["evaluations"], job["seconds"]),
        seed=job["seed"],
        workers=job["workers"],
        warm=[from_plain(policy) for policy in job["warm"]],
        progress=progress,
    )
    return document(result, job, Evaluator(found.train, job["gpus"], objectives, costs),
                    Evaluator(found.test, job["gpus"], objectives, costs))  # fmt: skip


def document(
    result: Search, job: Mapping[str, Any], train: Evaluator, test: Evaluator
) -> dict[str, Any]:
    plain = result.to_plain()
    present = job["present"]
    if present is not None:
        policy = replace(from_plain(present), integral=True)
        names = [objective.name for objective in train.objectives]
        plain["present"] = {
            "config": present,
            "train": dict(zip(names, train(policy), strict=True)),
            "test": dict(zip(names, test(policy), strict=True)),
        }
    finite: dict[str, Any] = _finite(plain)
    return finite


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> int:
    with contextlib.suppress(OSError):  # a unit that forbids it has said by how much already
        os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the controller's to answer
    job = json.loads(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_listen, args=(cancelled,), daemon=True).start()

    def progress(done: int, total: int, _values: Any) -> bool:
        print(json.dumps({"done": done, "total": total}), flush=True)
        return not cancelled.is_set()

    try:
        said: dict[str, Any] = {"result": run(job, progress)}
    except IntentdError as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
    return 0


def _listen(cancelled: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "cancel":
            cancelled.set()
    os.killpg(0, signal.SIGKILL)  # the controller is gone: its pool of ours must not stay


if __name__ == "__main__":
    sys.exit(main())
