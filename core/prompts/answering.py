"""The model stage: who answers, by each strategy (section 4.3.3)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Final

from intentd.core.errors import InputError
from intentd.core.prompts import cascade
from intentd.core.prompts.context import chat_texts
from intentd.core.prompts.effects import (
    CallFailed,
    Effect,
    Foretell,
    Outcome,
    Prediction,
    Prefetch,
    Purpose,
    Reply,
    Together,
)
from intentd.core.prompts.models import (
    Models,
    ModelSpec,
    able,
    cascade_trio,
    not_cheaper_than,
    ordered,
    without,
)
from intentd.core.prompts.request import PipelineError
from intentd.core.prompts.service_types import ModelStage
from intentd.core.prompts.steps import Steps
from intentd.core.prompts.stickiness import held_tokens, weigh_switch

MAX_FALLBACKS: Final = 3
SHORT_PROMPT: Final = "Answer in two or three sentences."


class ModelSteps(Steps):
    """Gets an answer by the stage's strategy."""

    def candidates(self, stage: ModelStage) -> Models:
        """Models that may answer, best first. Raises InputError or PipelineError."""
        for name in (*stage.models.names, stage.first, stage.verifier, stage.second):
            if name:
                self.env.pool.get(name)
        needs = self.request.needs
        models = stage.models(able(needs)(self.allowed()))
        if needs and not models and stage.models(self.allowed()):
            expected = f"a model that can do {', '.join(sorted(needs))}"
            raise InputError("model", stage.models.names or "any", expected)
        if self.request.floor and self.request.floor in self.env.pool:
            floor = self.env.pool.get(self.request.floor)
            models = not_cheaper_than(floor)(models) or (floor,)
        if not models:
            raise InputError("model", stage.models.names or "any", "a model of the pool")
        up = without(self.env.down)(models)
        if not up:  # whoever is only rate limited can be waited for
            up = without(self.env.down - self.env.limited)(models)
        if not up:
            reason = f"{', '.join(m.name for m in models)} cooling down after failures"
            raise PipelineError(reason, 503, self.trace)
        return up

    def model(self, stage: ModelStage) -> Generator[Effect, Outcome, Reply]:
        if self.request.cached_only:
            raise PipelineError("only-if-cached, and nothing stored serves", 504, self.trace)
        candidates = self.candidates(stage)
        if self.small_answers is not None:
            first = (self.small_answers,)
            rest = tuple(m for m in candidates if m.name != first[0].name)
            reply = yield from self.first_that_answers((*first, *rest), stream=True)
            self.count_avoided(candidates, reply)
            return reply
        if stage.strategy == "verify":
            reply = yield from self.verified(stage, candidates)
        elif stage.strategy == "agree":
            reply = yield from self.agreed(stage, candidates)
        elif stage.strategy == "route":
            reply = yield from self.routed(stage, candidates)
        elif stage.strategy == "fast":
            reply = yield from self.fast(stage, candidates)
        else:
            single = bool(stage.models.names)
            if not single and not stage.models.order and len(candidates) > 1:
                raise InputError("model", None, f"one of {', '.join(m.name for m in candidates)}")
            if stage.models.order == "cheapest":
                candidates = self.staying(candidates)
            reply = yield from self.first_that_answers(candidates, stream=True)
        self.count_avoided(candidates, reply)
        return reply

    def staying(self, models: Models) -> Models:
        """Models in an order made for the price, the one that answered before first where leaving
        it would cost more than it saves."""
        warm = next(
            (m for m in models if self.request.warm and m.name == self.request.warm.model), None
        )
        if warm is None or warm is models[0] or not self.stays(warm, models[0]):
            return models
        return (warm, *(model for model in models if model is not warm))

    def stays(
        self, warm: ModelSpec, other: ModelSpec, *, judged_by: ModelSpec | None = None
    ) -> bool:
        """Whether the next answer costs less from the model that holds the conversation."""
        known = self.request.warm
        if known is None or known.model != warm.name or warm.price.cached_in_nano is None:
            return False
        count = self.env.count_tokens
        try:
            chat = self.chat_for(warm)
        except InputError:
            return False  # it does not fit there any more
        held = held_tokens(known, chat, count)
        if not held:
            return False
        in_tokens = sum(count(text) for text in chat_texts(chat))
        extra = judged_by.price.cost_nano(in_tokens, cascade.JUDGE_TOKENS) if judged_by else 0
        switch = weigh_switch(warm, held, other, in_tokens, extra_nano=extra)
        if switch.pays:
            return False
        self.trace.notes.append(
            f"model: stays with {warm.name}, which holds {held} tokens: "
            f"{switch.stay_nano} nano-dollars, {other.name} would cost {switch.switch_nano}"
        )
        return True

    def count_avoided(self, candidates: Models, reply: Reply) -> None:
        dearest = ordered("dearest")(candidates)[0]
        most = dearest.price.cost_nano(reply.in_tokens, reply.out_tokens)
        item = self.trace.cache_item
        most = max(most, item.cost_nano if item is not None else 0)
        self.trace.avoided_nano = max(0, most - self.trace.cost_nano)

    def first_that_answers(
        self, models: Models, *, stream: bool
    ) -> Generator[Effect, Outcome, Reply]:
        """Ask in order; the next one only while the client has seen nothing yet."""
        failed: CallFailed | None = None
        misfit: InputError | None = None
        for model in models[:MAX_FALLBACKS]:
            try:
                effect = self.answer_call(model, stream=stream)
            except InputError as error:
                misfit = error
                continue
            outcome = yield effect
            assert isinstance(outcome, (Reply, CallFailed))
            self.trace.record(outcome, Purpose.ANSWER)
            if isinstance(outcome, Reply):
                return outcome
            failed = outcome
            if outcome.started or not outcome.retryable:
                break
        if failed is None:
            assert misfit is not None
            raise misfit
        raise PipelineError(failed.reason, failed.status or 502, self.trace, started=failed.started)

    def verified(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """M1, verifier, M2 below the threshold (section 4.3.3)."""
        verifier = self.named_or(stage.verifier)
        if not stage.first and not stage.second and len({m.cost_rank for m in candidates}) == 1:
            self.trace.notes.append("model: one price only, nothing to choose")
            return (yield from self.first_that_answers(candidates, stream=True))
        trio = cascade_trio(
            candidates,
            first=self.named_or(stage.first),
            verifier=verifier,
            second=self.named_or(stage.second),
        )
        if verifier is None and not trio.by_rule:
            # a floor may have taken the cheap ones away from answering, not from judging
            judge = self.small_model(None)
            if judge is not None and judge.cost_rank < trio.first.cost_rank:
                trio = replace(trio, verifier=judge)
        self.trace.threshold = stage.threshold
        if trio.second in candidates and self.stays(
            trio.second, trio.first, judged_by=trio.verifier
        ):
            rest = tuple(model for model in candidates if model is not trio.second)
            return (yield from self.first_that_answers((trio.second, *rest), stream=True))
        outcome = yield self.answer_call(trio.first, stream=False)
        assert isinstance(outcome, (Reply, CallFailed))
        self.trace.record(outcome, Purpose.ANSWER)
        if isinstance(outcome, Reply):
            judged = yield from self.call(
                trio.verifier,
                cascade.judge_messages(self.request.prompt, outcome.text),
                Purpose.VERIFY,
                cascade.JUDGE_TOKENS,
            )
            text = judged.text if isinstance(judged, Reply) else ""
            self.trace.verifier_score = cascade.parse_score(text)
            if not cascade.escalates(self.trace.verifier_score, stage.threshold):
                self.trace.escalated = False
                return outcome
        return (yield from self.escalated(trio.second, outcome))

    def agreed(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """Cheap models answer together; the dear one when they are likely wrong."""
        cheap = ordered("cheapest")(candidates)
        second = self.named_or(stage.second) or ordered("dearest")(candidates)[0]
        first = self.named_or(stage.first) or cheap[0]
        rest = [m for m in cheap if m.name not in (first.name, second.name)]
        others = rest[: stage.compared]
        if not others:
            self.trace.notes.append("model: too few models to compare")
            dearest = ordered("dearest")(candidates)
            return (yield from self.first_that_answers(dearest, stream=True))
        self.trace.threshold = stage.threshold
        asked = [self.answer_call(first, stream=False)]
        asked += [self.answer_call(model, stream=False) for model in others]
        outcomes = yield Together(tuple(asked))
        assert isinstance(outcomes, tuple)
        replies: list[Reply] = []
        for index, outcome in enumerate(outcomes):
            assert isinstance(outcome, (Reply, CallFailed))
            self.trace.record(outcome, Purpose.COMPARE if index else Purpose.ANSWER)
            if isinstance(outcome, Reply):
                replies.append(outcome)
        head = outcomes[0]
        assert isinstance(head, (Reply, CallFailed))
        if isinstance(head, Reply) and len(replies) > 1:
            seen = [
                cascade.Answered(cascade.final_answer(r.text), r.out_tokens, r.text)
                for r in replies
            ]
            features = cascade.agreement_features(seen[0], seen[1:])
            chance = self.env.agreement.chance_wrong(features)
            self.trace.chance_wrong = round(chance, 4)
            if chance < stage.threshold:
                self.trace.escalated = False
                return head
        return (yield from self.escalated(second, head))

    def escalated(
        self, second: ModelSpec, first: Reply | CallFailed
    ) -> Generator[Effect, Outcome, Reply]:
        """Ask the dear model; when it fails before its first token, the cheap answer will do."""
        self.trace.escalated = True
        outcome = yield self.answer_call(second, stream=True)
        assert isinstance(outcome, (Reply, CallFailed))
        self.trace.record(outcome, Purpose.ANSWER)
        if isinstance(outcome, Reply):
            return outcome
        if isinstance(first, Reply) and not outcome.started:
            self.trace.notes.append(
                f"model: {second.name} failed, the first answer stands: {outcome.reason[:200]}"
            )
            return first
        raise PipelineError(
            outcome.reason, outcome.status or 502, self.trace, started=outcome.started
        )

    def routed(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """The learned router: the dear model where the predicted gain is above the threshold."""
        strong = self.named_or(stage.second) or ordered("dearest")(candidates)[0]
        weak = self.named_or(stage.first) or ordered("cheapest")(candidates)[0]
        prediction = Prediction(0.0, known=False)
        if self.env.routed and weak.name != strong.name:
            outcome = yield Foretell(self.request.prompt, weak.name, strong.name)
            assert isinstance(outcome, Prediction)
            prediction = outcome
        self.trace.threshold = stage.threshold
        self.trace.predicted_gain = round(prediction.gain, 4)
        self.trace.router_known = prediction.known
        self.trace.escalated = prediction.gain > stage.threshold
        order = (strong, weak) if self.trace.escalated else self.staying((weak, strong))
        models = tuple(dict.fromkeys(order))
        return (yield from self.first_that_answers(models, stream=True))

    def fast(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """A short answer now; the same prompt to a better model behind it (section 4.5.1)."""
        self.extra = ({"role": "system", "content": SHORT_PROMPT},)
        self.cap = min(self.cap, stage.short_tokens)
        reply = yield from self.first_that_answers(candidates, stream=True)
        if not self.request.bypass and self.request.store:
            history = yield from self.history()
            yield Prefetch("better", "quality", self.request.prompt, reply.text, history)
        return reply
