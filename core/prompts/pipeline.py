"""Runs a service type: one generator for the proxy, for replay and for tests.

`run` yields effects (`core.prompts.effects`), is sent their outcomes and returns an `Answer`.
It raises InputError for what the request got wrong and PipelineError when no model could answer.
"""

from __future__ import annotations

from collections.abc import Generator

from intentd.core.prompts.cache.stage import CacheSteps, relevance_word
from intentd.core.prompts.effects import Effect, Outcome
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.request import (
    Answer,
    Env,
    Gate,
    Pipeline,
    PipelineError,
    Request,
    Verdict,
)
from intentd.core.prompts.service_types import (
    CacheStage,
    ContextStage,
    ModelStage,
    PrefetchStage,
    ServiceType,
    StoreStage,
)

__all__ = [
    "Answer",
    "Env",
    "Gate",
    "Pipeline",
    "PipelineError",
    "Request",
    "Verdict",
    "relevance_word",
    "run",
]


def run(
    service_type: ServiceType, request: Request, env: Env, trace: Trace | None = None
) -> Pipeline:
    """Execute the stages in their order; the first one that has an answer ends it.

    trace: filled on the way, for who must say what is known before the end (a new one if None).
    """
    steps = _Run(service_type, request, env, trace)
    return (yield from steps.run())


class _Run(CacheSteps):
    """One request on its way through all stages."""

    def run(self) -> Pipeline:
        text, item = "", None
        for stage in self.type.stages:
            if item is not None and not isinstance(stage, PrefetchStage):
                continue  # answered; what is likely next is prefetched after hits too
            if isinstance(stage, CacheStage):
                item = yield from self.cache(stage)
                text = item.response if item is not None else ""
            elif isinstance(stage, ContextStage):
                yield from self.context(stage)
            elif isinstance(stage, ModelStage):
                self.reply = yield from self.model(stage)
                text = self.reply.text
                self.trace.answered_by = self.reply.model
            elif isinstance(stage, StoreStage):
                yield from self.store(stage)
            else:
                yield from self.prefetch(stage, text)
        joins = self.request.conversation if self.updates else ""
        context_stage = self.type.stage(ContextStage)
        if item is not None and context_stage is not None and not context_stage.updates:
            joins = ""
        return Answer(text, self.trace, self.reply, item, joins)

    def context(self, stage: ContextStage) -> Generator[Effect, Outcome, None]:
        messages = yield from self.history()
        self.updates = stage.updates
        small = self.small_model(stage.small)
        steps = stage.filters.apply(
            messages, self.request.prompt, self.trace.notes, small.name if small else ""
        )
        self.kept = yield from self.recording(steps)
        self.trace.context_available = self.available
