"""What the stages of a pipeline share: the request's state, its history, calls to models."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from intentd.core.prompts.context import (
    Messages,
    begins_with_result,
    chat_texts,
    fit_window,
    join_tool_results,
    newest_needed,
)
from intentd.core.prompts.effects import (
    CallFailed,
    CallModel,
    ChatMessage,
    ContextLoaded,
    Effect,
    LoadContext,
    Outcome,
    Purpose,
    Reply,
)
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.models import Models, ModelSpec, named, without
from intentd.core.prompts.request import Env, Request
from intentd.core.prompts.service_types import (
    CHEAPEST,
    ContextStage,
    ModelStage,
    PrefetchStage,
    ServiceType,
)


class Steps:
    """One request on its way through the stages."""

    def __init__(
        self, service_type: ServiceType, request: Request, env: Env, trace: Trace | None = None
    ) -> None:
        self.type = service_type
        self.request = request
        self.env = env
        self.trace = Trace(service_type.name) if trace is None else trace
        self.loaded: Messages | None = None
        self.available = 0
        self.kept: Messages | None = None
        self.called: tuple[ChatMessage, ...] = ()  # what a turn of tool results answers to
        self.updates = True
        self.extra: tuple[ChatMessage, ...] = ()
        self.small_answers: ModelSpec | None = None
        self.reply: Reply | None = None
        caps = [service_type.max_tokens]
        caps += [request.max_tokens] if request.max_tokens is not None else []
        self.cap = min(caps)

    def history(self) -> Generator[Effect, Outcome, Messages]:
        """The conversation, loaded once and only when a stage asks for it."""
        if self.loaded is None:
            self.loaded = self.request.history
            if self.request.conversation and not self.request.history:
                self.loaded = yield from self.stored()
            self.loaded = join_tool_results(self.loaded)
            self.available = max(self.available, len(self.loaded))
            if self.loaded and begins_with_result(self.request.turn):
                self.called = self.loaded[-1].as_chat()
                self.loaded = self.loaded[:-1]
        return self.loaded

    def stored(self) -> Generator[Effect, Outcome, Messages]:
        """As many of the conversation's last messages as the filters look at."""
        request = self.request
        stage = self.type.stage(ContextStage)
        later = self.type.stage(PrefetchStage) or self.type.stage(ModelStage).strategy == "fast"
        least = newest_needed(stage.filters) if stage is not None and not later else None
        if least is not None and begins_with_result(request.turn):
            least += 1  # the call that this turn answers
        wanted = least
        while True:
            outcome = yield LoadContext(
                request.conversation, request.replaces, request.before, wanted
            )
            if not isinstance(outcome, ContextLoaded):
                return ()
            self.available = outcome.available
            found = outcome.messages
            if wanted is None or least is None or len(found) < wanted:
                return found
            joined = join_tool_results(found)  # a result and its call count as one
            if len(joined) >= least and not (joined and begins_with_result(joined[0].chat)):
                return found
            wanted = 2 * wanted + 2

    def recording(
        self, steps: Generator[Effect, Outcome, Messages]
    ) -> Generator[Effect, Outcome, Messages]:
        """Pass the effects of `steps` on, with every model call of theirs in the trace."""
        try:
            effect = next(steps)
            while True:
                outcome = yield effect
                if isinstance(effect, CallModel) and isinstance(outcome, (Reply, CallFailed)):
                    self.trace.record(outcome, effect.purpose)
                effect = steps.send(outcome)
        except StopIteration as stop:
            kept: Messages = stop.value
            return kept

    def chat_for(self, model: ModelSpec) -> tuple[ChatMessage, ...]:
        """The chat that fits the model's window; fills in the trace's context figures."""
        turn = (*self.called, *self.request.turn_messages())
        fixed = (*self.request.system, *self.extra, *turn)
        cap = min(self.cap, model.max_output_tokens or self.cap)
        kept = fit_window(
            self.kept or (),
            fixed,
            window_tokens=model.window_tokens,
            answer_tokens=cap,
            count_tokens=self.env.count_tokens,
        )
        chat = [chat_message for message in kept for chat_message in message.as_chat()]
        self.trace.context_messages = len(kept)
        self.trace.context_ids = tuple(m.message_id for m in kept if m.message_id)
        self.trace.context_tokens = sum(self.env.count_tokens(text) for text in chat_texts(chat))
        return (*self.request.system, *self.extra, *chat, *turn)

    def small_model(self, query: Any) -> ModelSpec | None:
        """The low-cost model of a component: its own query, else the cheapest one allowed."""
        found = (query or CHEAPEST)(without(self.env.down)(self.allowed()))
        return found[0] if found else None

    def allowed(self) -> Models:
        models: Models = tuple(self.env.pool)
        return named(*self.type.allowed)(models) if self.type.allowed else models

    def call(
        self,
        model: ModelSpec,
        messages: tuple[ChatMessage, ...],
        purpose: Purpose,
        max_tokens: int,
        *,
        params: Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> Generator[Effect, Outcome, Reply | CallFailed]:
        given = {"temperature": 0} if params is None else params
        outcome = yield CallModel(model.name, messages, purpose, given, max_tokens, stream)
        assert isinstance(outcome, (Reply, CallFailed))
        self.trace.record(outcome, purpose)
        return outcome

    def answer_call(self, model: ModelSpec, *, stream: bool) -> CallModel:
        """The call that answers this turn. Raises InputError when the turn does not fit."""
        cap = min(self.cap, model.max_output_tokens or self.cap)
        return CallModel(
            model.name,
            self.chat_for(model),
            Purpose.ANSWER,
            self.request.params,
            cap,
            stream and self.request.stream,
        )

    def named_or(self, name: str) -> ModelSpec | None:
        return self.env.pool.get(name) if name else None
