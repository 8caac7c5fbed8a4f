"""What the controller hears of prompts: sums by service type and model, never a prompt.

`OutcomeCounter` takes each finished request, and what users say later of answers; the report is
`core.prompts.outcomes` plus today's spending.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Final

from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.outcomes import SIGNALS, Outcomes, bin_of
from intentd.core.prompts.service_types import ModelStage, ServiceType
from intentd.proxy.call import Exchange, Step
from intentd.proxy.feedback import Feedback

_JUDGES: Final = frozenset({"verify", "compare"})
# strategy: what of a request's metadata its threshold was compared with
_SIGNALS: Final = {
    "verify": "verifier_score",
    "agree": "chance_wrong",
    "route": "predicted_gain",
}


class OutcomeCounter:
    """types: the service types in force, for their strategies."""

    def __init__(self) -> None:
        self.outcomes = Outcomes()
        self.types: Mapping[str, ServiceType] = {}
        self._day = ""
        self._today: dict[str, int] = {}

    def finished(self, exchange: Exchange) -> None:
        """Count one request, however it ended."""
        trace = exchange.trace
        strategy = self._strategy(exchange.service_type)
        seen = self.outcomes.of(exchange.service_type, strategy)
        seen.requests += 1
        seen.cost_nano += exchange.cost_nano
        self._spend(exchange)
        for step in exchange.steps:
            row = self.outcomes.calls.setdefault(step.model, {})
            row[step.outcome] = row.get(step.outcome, 0) + 1
        if exchange.outcome != "ok":
            seen.failed += 1
            return
        seen.latency.add(max(0.0, exchange.total_s))
        seen.models[exchange.model] = seen.models.get(exchange.model, 0) + 1
        if trace is None:
            return
        seen.avoided_nano += trace.avoided_nano
        if trace.cache_item is not None:
            seen.hits += 1
            return
        signal, told = _signal(strategy, trace)
        if told:
            seen.signals[bin_of(strategy, signal)] += 1
            seen.escalated += bool(trace.escalated)
            for name, steps in _by_step(strategy, trace, exchange.steps).items():
                if steps:
                    seen.costs[name][0] += 1
                    seen.costs[name][1] += sum(step.cost_nano for step in steps)

    def heard(self, feedback: Feedback) -> None:
        """A word on an answer: good counts 1, bad and regenerated 0, where the answer came from."""
        name = str(feedback.document.get("service_type", ""))
        strategy = self._strategy(name)
        if not name:
            return
        seen = self.outcomes.of(name, strategy)
        seen.regenerated += feedback.kind == "regenerated"
        selection = feedback.document.get("selection", {})
        if strategy and selection.get("escalated") is not None:
            signal = selection.get(_SIGNALS[strategy])
            if signal is not None or strategy == "verify":
                seen.rate(float(feedback.good), signal=signal, escalated=selection["escalated"])

    def report(self) -> dict[str, Any]:
        """The body of a report, counts since boot."""
        return {
            **self.outcomes.to_plain(),
            "offers": sorted(self.types),
            "today": {"day": self._day, "cost_nano": dict(self._today)},
        }

    # -- inside --------------------------------------------------------------------------------

    def _strategy(self, name: str) -> str:
        made = self.types.get(name)
        stage = made.stage(ModelStage) if made is not None else None
        strategy = stage.strategy if stage is not None else ""
        return strategy if strategy in SIGNALS else ""

    def _spend(self, exchange: Exchange) -> None:
        day = datetime.datetime.fromtimestamp(exchange.wall_s, tz=datetime.UTC).date().isoformat()
        if day > self._day:
            self._day, self._today = day, {}
        name = exchange.service_type
        self._today[name] = self._today.get(name, 0) + exchange.cost_nano


def _signal(strategy: str, trace: Trace) -> tuple[float | None, bool]:
    """(the value a threshold was compared with, whether there was such a comparison)."""
    if not strategy or trace.escalated is None or trace.threshold is None:
        return None, False
    if strategy == "verify":
        judged = any(call.purpose == "verify" for call in trace.calls)
        return trace.verifier_score, judged or trace.verifier_score is not None
    value: float | None = getattr(trace, _SIGNALS[strategy])
    return value, value is not None


def _by_step(strategy: str, trace: Trace, steps: list[Step]) -> dict[str, list[Step]]:
    """The calls of a request by what they were for: cheap answer, judging it, dear answer."""
    answers = [step for step in steps if step.purpose not in _JUDGES]
    judges = [step for step in steps if step.purpose in _JUDGES]
    if strategy == "route":
        return {"second" if trace.escalated else "first": answers}
    first = answers[0].model if answers else ""
    return {
        "first": [step for step in answers if step.model == first],
        "judge": judges,
        "second": [step for step in answers if step.model != first],
    }
