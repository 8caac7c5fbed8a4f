"""Runs a service type: one generator for the proxy, for replay and for tests.

`run` yields effects (`core.prompts.effects`), is sent their outcomes and returns an `Answer`.
It raises InputError for what the request got wrong and PipelineError when no model could answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from intentd.core.errors import InputError, IntentdError
from intentd.core.prompts import cascade
from intentd.core.prompts.cache.keys import context_hash
from intentd.core.prompts.context import Messages, chat_texts, fit_window
from intentd.core.prompts.effects import (
    CacheFound,
    CacheItem,
    CallFailed,
    CallModel,
    ChatMessage,
    ContextLoaded,
    Effect,
    LoadContext,
    LookupCache,
    Outcome,
    Prefetch,
    Purpose,
    Reply,
    StoreCache,
    Together,
)
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.models import (
    ModelPool,
    Models,
    ModelSpec,
    capable,
    cascade_trio,
    named,
    not_cheaper_than,
    ordered,
    without,
)
from intentd.core.prompts.service_types import (
    CHEAPEST,
    CacheStage,
    ContextStage,
    ModelStage,
    PrefetchStage,
    ServiceType,
    StoreStage,
)

Pipeline = Generator[Effect, Outcome, "Answer"]
MAX_FALLBACKS: Final = 3
SHORT_PROMPT: Final = "Answer in two or three sentences."
RELEVANCE_TOKENS: Final = 8
SHOWN_CHARS: Final = 4000

RELEVANCE_PROMPT: Final = (
    "You see a question and stored texts. Say with one word what they are worth for it: SAME (a "
    "text is the answer to exactly this question), REWRITE (a text holds the answer but has to "
    "be put differently), USE (the texts hold facts the answer needs) or NONE."
)
REWRITE_PROMPT: Final = (
    "Answer the user's question by rewriting this stored answer. Add nothing that it does not "
    "say.\n\nStored answer:\n"
)
USE_PROMPT: Final = (
    "Answer from these stored texts. When they do not hold the answer, say so.\n\nStored texts:\n"
)


class PipelineError(IntentdError):
    """No model gave a complete answer. status: for the client; reason: of the last failure."""

    def __init__(self, reason: str, status: int, trace: Trace, *, started: bool = False) -> None:
        self.reason = reason
        self.status = status
        self.trace = trace
        self.started = started
        super().__init__(f"{trace.service_type}: no model answered: {reason}")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the router expects of the dear model over the cheap one. known: it has seen such."""

    gain: float
    known: bool


class Router(Protocol):
    def predict(self, prompt: str, weak: str, strong: str) -> Prediction: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """The second gate's word on a stored item. reason: what spoke against it."""

    hit: bool
    score: float
    reason: str = ""


class Gate(Protocol):
    def judge(self, prompt: str, key: str, similarity: float) -> Verdict: ...


def _rough_tokens(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass")) // 3 + 1


@dataclass(frozen=True, slots=True)
class Env:
    """What a pipeline knows beside the request. down: models that cool off."""

    pool: ModelPool
    count_tokens: Callable[[str], int] = _rough_tokens
    down: frozenset[str] = frozenset()
    router: Router | None = None
    gate: Gate | None = None
    agreement: cascade.AgreementModel = cascade.PRIOR_AGREEMENT


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and what came with it.

    prompt: the text of this turn. turn: its chat messages as they came (() makes one of the
    prompt). history: messages the client sent itself; they are the conversation then, and the
    stored one is not loaded. conversation: its name, "" for a stateless client. bypass: why the
    cache is left alone, "" if it is not. lookup, store: off by Cache-Control. floor: the least
    model by price (a second answer is never cheaper). replaces: ids of messages left out.
    needs: capabilities.
    """

    prompt: str
    turn: tuple[ChatMessage, ...] = ()
    system: tuple[ChatMessage, ...] = ()
    history: Messages = ()
    conversation: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stream: bool = False
    bypass: str = ""
    lookup: bool = True
    store: bool = True
    floor: str = ""
    replaces: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens <= 0:
            raise InputError("max_tokens", self.max_tokens, "a count > 0")

    def turn_messages(self) -> tuple[ChatMessage, ...]:
        return self.turn or ({"role": "user", "content": self.prompt},)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client gets. reply: the model's, None for a stored answer served as it is.

    updates: the conversation that this answer joins, "" for none.
    """

    text: str
    trace: Trace
    reply: Reply | None = None
    item: CacheItem | None = None
    updates: str = ""


def run(service_type: ServiceType, request: Request, env: Env) -> Pipeline:
    """Execute the stages in their order; the first one that has an answer ends it."""
    steps = _Run(service_type, request, env)
    return (yield from steps.run())


class _Run:
    """One request on its way through the stages."""

    def __init__(self, service_type: ServiceType, request: Request, env: Env) -> None:
        self.type = service_type
        self.request = request
        self.env = env
        self.trace = Trace(service_type.name)
        self.loaded: Messages | None = None
        self.kept: Messages | None = None
        self.updates = True
        self.extra: tuple[ChatMessage, ...] = ()
        self.small_answers: ModelSpec | None = None
        self.reply: Reply | None = None
        caps = [service_type.max_tokens]
        caps += [request.max_tokens] if request.max_tokens is not None else []
        self.cap = min(caps)

    def run(self) -> Pipeline:
        text, item = "", None
        for stage in self.type.stages:
            if isinstance(stage, CacheStage):
                item = yield from self.cache(stage)
                if item is not None:
                    text = item.response
                    break
            elif isinstance(stage, ContextStage):
                yield from self.context(stage)
            elif isinstance(stage, ModelStage):
                self.reply = yield from self.model(stage)
                text = self.reply.text
                self.trace.answered_by = self.reply.model
            elif isinstance(stage, StoreStage):
                yield from self.store(stage)
            else:
                yield from self.prefetch(stage)
        joins = self.request.conversation if self.updates else ""
        context_stage = self.type.stage(ContextStage)
        if item is not None and context_stage is not None and not context_stage.updates:
            joins = ""
        return Answer(text, self.trace, self.reply, item, joins)

    # -- history and context -------------------------------------------------------------------

    def history(self) -> Generator[Effect, Outcome, Messages]:
        """The conversation, loaded once and only when a stage asks for it."""
        if self.loaded is None:
            self.loaded = self.request.history
            if self.request.conversation and not self.request.history:
                outcome = yield LoadContext(self.request.conversation, self.request.replaces)
                if isinstance(outcome, ContextLoaded):
                    self.loaded = outcome.messages
        return self.loaded

    def context(self, stage: ContextStage) -> Generator[Effect, Outcome, None]:
        messages = yield from self.history()
        self.updates = stage.updates
        small = self.small_model(stage.small)
        steps = stage.filters.apply(
            messages, self.request.prompt, self.trace.notes, small.name if small else ""
        )
        self.kept = yield from self.recording(steps)
        self.trace.context_available = len(messages)

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
        turn = self.request.turn_messages()
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

    # -- cache ---------------------------------------------------------------------------------

    def cache(self, stage: CacheStage) -> Generator[Effect, Outcome, CacheItem | None]:
        trace, request = self.trace, self.request
        if stage.mode == "skip":
            return None
        if request.bypass or not request.lookup:
            trace.cache, trace.cache_reason = "bypass", request.bypass or "no-cache"
            return None
        trace.cache = "miss"
        scope = context_hash((yield from self.history()))
        found = yield LookupCache(
            request.prompt, exact=True, context_hash=scope, model_floor=request.floor
        )
        if isinstance(found, CacheFound) and found.items:
            return self.hit("exact", found.items[0], 1.0)
        if stage.mode == "exact":
            return None
        found = yield LookupCache(
            request.prompt,
            kinds=stage.kinds,
            min_similarity=stage.min_similarity,
            limit=stage.limit,
            context_hash=scope,
            model_floor=request.floor,
        )
        items = found.items if isinstance(found, CacheFound) else ()
        for item in items:
            if item.kind != "prompt" and stage.mode == "smart":
                continue
            verdict = self.judge(item)
            if verdict.hit:
                return self.hit("semantic", item, verdict.score)
            trace.cache_reason = verdict.reason
        if stage.mode == "smart" and items:
            return (yield from self.smart(stage, items))
        return None

    def judge(self, item: CacheItem) -> Verdict:
        if self.env.gate is None:
            # nothing but the cosine to go by: only what the chapter calls highly similar
            return Verdict(item.similarity >= 0.95, item.similarity, "similarity")
        return self.env.gate.judge(self.request.prompt, item.key, item.similarity)

    def hit(self, result: str, item: CacheItem, score: float) -> CacheItem:
        trace = self.trace
        trace.cache, trace.cache_item, trace.cache_reason = result, item, ""
        trace.gate_score = score
        trace.avoided_nano = item.cost_nano
        trace.answered_by = item.model
        return item

    def smart(
        self, stage: CacheStage, items: tuple[CacheItem, ...]
    ) -> Generator[Effect, Outcome, CacheItem | None]:
        """SmartCache (section 4.3.5): as it is, rewritten, or facts for a small model."""
        small = self.small_model(stage.small)
        if small is None:
            return None
        shown = "\n\n".join(
            f"[{number}] {item.response[:SHOWN_CHARS]}" for number, item in enumerate(items, 1)
        )
        outcome = yield from self.call(
            small,
            (
                {"role": "system", "content": RELEVANCE_PROMPT},
                {"role": "user", "content": f"{shown}\n\nQuestion: {self.request.prompt}"},
            ),
            Purpose.RELEVANCE,
            RELEVANCE_TOKENS,
        )
        word = relevance_word(outcome.text) if isinstance(outcome, Reply) else "NONE"
        if word == "NONE":
            self.trace.cache_reason = "not relevant"
            return None
        if word == "SAME" and items[0].kind in ("prompt", "question"):
            return self.hit("as_is", items[0], items[0].similarity)
        result = "rewritten" if word in ("SAME", "REWRITE") else "answered_from"
        self.hit(result, items[0], items[0].similarity)
        content = (
            REWRITE_PROMPT + items[0].response[:SHOWN_CHARS]
            if result == "rewritten"
            else USE_PROMPT + shown
        )
        self.extra = ({"role": "system", "content": content},)
        self.small_answers = small
        return None

    def store(self, stage: StoreStage) -> Generator[Effect, Outcome, None]:
        reply, request = self.reply, self.request
        if reply is None or request.bypass or not request.store or not reply.text.strip():
            return
        if reply.finish_reason != "stop" or self.small_answers is not None:
            return
        texts = {"prompt": request.prompt, "response": reply.text}
        keys = tuple((kind, texts[kind]) for kind in stage.keys)
        scope = context_hash((yield from self.history()))
        yield StoreCache(request.prompt, reply.text, keys, scope, reply.model)

    def prefetch(self, stage: PrefetchStage) -> Generator[Effect, Outcome, None]:
        if self.reply is not None and not self.request.bypass:
            yield Prefetch(stage.what, stage.service_type, self.request.prompt, self.reply.text)

    # -- models --------------------------------------------------------------------------------

    def small_model(self, query: Any) -> ModelSpec | None:
        """The low-cost model of a component: its own query, else the cheapest one allowed."""
        found = (query or CHEAPEST)(without(self.env.down)(self.allowed()))
        return found[0] if found else None

    def allowed(self) -> Models:
        models: Models = tuple(self.env.pool)
        return named(*self.type.allowed)(models) if self.type.allowed else models

    def candidates(self, stage: ModelStage) -> Models:
        """Models that may answer, best first. Raises InputError or PipelineError."""
        for name in (*stage.models.names, stage.first, stage.verifier, stage.second):
            if name:
                self.env.pool.get(name)
        models = self.allowed()
        if self.request.needs:
            models = capable(*self.request.needs)(models)
            if not models:
                expected = f"a model that can do {', '.join(sorted(self.request.needs))}"
                raise InputError("model", [m.name for m in self.allowed()], expected)
        models = stage.models(models)
        if self.request.floor and self.request.floor in self.env.pool:
            floor = self.env.pool.get(self.request.floor)
            models = not_cheaper_than(floor)(models) or (floor,)
        if not models:
            raise InputError("model", stage.models.names or "any", "a model of the pool")
        up = without(self.env.down)(models)
        if not up:
            reason = f"{', '.join(m.name for m in models)} cooling down after failures"
            raise PipelineError(reason, 503, self.trace)
        return up

    def model(self, stage: ModelStage) -> Generator[Effect, Outcome, Reply]:
        candidates = self.candidates(stage)
        if self.small_answers is not None:
            first = (self.small_answers,)
            rest = tuple(m for m in candidates if m.name != first[0].name)
            return (yield from self.first_that_answers((*first, *rest), stream=True))
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
            reply = yield from self.first_that_answers(candidates, stream=True)
        self.count_avoided(candidates, reply)
        return reply

    def count_avoided(self, candidates: Models, reply: Reply) -> None:
        dearest = ordered("dearest")(candidates)[0]
        most = dearest.price.cost_nano(reply.in_tokens, reply.out_tokens)
        self.trace.avoided_nano = max(0, most - self.trace.cost_nano)

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

    def named_or(self, name: str) -> ModelSpec | None:
        return self.env.pool.get(name) if name else None

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
            self.trace.notes.append(f"model: {second.name} failed, the first answer stands")
            return first
        raise PipelineError(
            outcome.reason, outcome.status or 502, self.trace, started=outcome.started
        )

    def routed(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """The learned router: the dear model where the predicted gain is above the threshold."""
        strong = self.named_or(stage.second) or ordered("dearest")(candidates)[0]
        weak = self.named_or(stage.first) or ordered("cheapest")(candidates)[0]
        prediction = Prediction(0.0, known=False)
        if self.env.router is not None and weak.name != strong.name:
            prediction = self.env.router.predict(self.request.prompt, weak.name, strong.name)
        self.trace.threshold = stage.threshold
        self.trace.predicted_gain = round(prediction.gain, 4)
        self.trace.router_known = prediction.known
        self.trace.escalated = prediction.gain > stage.threshold
        order = (strong, weak) if self.trace.escalated else (weak, strong)
        models = tuple(dict.fromkeys(order))
        return (yield from self.first_that_answers(models, stream=True))

    def fast(self, stage: ModelStage, candidates: Models) -> Generator[Effect, Outcome, Reply]:
        """A short answer now; the same prompt to a better model behind it (section 4.5.1)."""
        self.extra = ({"role": "system", "content": SHORT_PROMPT},)
        self.cap = min(self.cap, stage.short_tokens)
        reply = yield from self.first_that_answers(candidates, stream=True)
        if not self.request.bypass:
            yield Prefetch("better", "quality", self.request.prompt, reply.text)
        return reply


def relevance_word(text: str) -> str:
    """SAME, REWRITE, USE or NONE; anything unclear is NONE."""
    upper = text.upper()
    found = [word for word in ("SAME", "REWRITE", "USE", "NONE") if word in upper.split()]
    stripped = upper.strip(" .\n*`'\"")
    if stripped in ("SAME", "REWRITE", "USE", "NONE"):
        return stripped
    return found[0] if len(found) == 1 else "NONE"
