"""The cache in a pipeline: look up, judge, SmartCache, store, prefetch (section 4.3.5)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Final

from intentd.core.prompts.answering import ModelSteps
from intentd.core.prompts.cache.keys import context_hash
from intentd.core.prompts.context import NOTHING, LastK, Narrow
from intentd.core.prompts.effects import (
    CacheFound,
    CacheItem,
    Effect,
    LookupCache,
    Outcome,
    Prefetch,
    Purpose,
    Reply,
    StoreCache,
)
from intentd.core.prompts.models import ordered
from intentd.core.prompts.request import Verdict
from intentd.core.prompts.service_types import (
    HIGHLY_SIMILAR,
    CacheStage,
    ContextStage,
    ModelStage,
    PrefetchStage,
    StoreStage,
)

RELEVANCE_TOKENS: Final = 8
SHOWN_CHARS: Final = 4000
NO_MODEL: Final = "cache"  # what answered where an application put the answer

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


class CacheSteps(ModelSteps):
    """Serves from the cache what may be served, and keeps what was answered."""

    def cache(self, stage: CacheStage) -> Generator[Effect, Outcome, CacheItem | None]:
        trace, request = self.trace, self.request
        if stage.mode == "skip":
            return None
        if request.bypass or not request.lookup:
            trace.cache, trace.cache_reason = "bypass", request.bypass or "no-cache"
            return None
        trace.cache = "miss"
        lookup = LookupCache(
            request.prompt,
            exact=True,
            context_hash=(yield from self.scope()),
            model_floor=self.least_model(),
            max_tokens=request.max_tokens,
            max_age_s=request.max_age_s,
        )
        # what an application put depends on no conversation and no format of the answer
        as_it_is = not lookup.context_hash and not request.params.get("response_format")
        found = yield replace(lookup, given=as_it_is)
        if isinstance(found, CacheFound) and found.items:
            return self.hit("exact", found.items[0], 1.0)
        if stage.mode == "exact":
            return None
        smart = stage.mode == "smart" and not request.cached_only
        found = yield replace(
            lookup,
            exact=False,
            kinds=stage.kinds,
            min_similarity=stage.min_similarity,
            limit=stage.limit,
            given=as_it_is or smart,
        )
        items = found.items if isinstance(found, CacheFound) else ()
        for item in items:
            if (item.kind != "prompt" and stage.mode == "smart") or (item.put and not as_it_is):
                continue
            verdict = self.judge(item)
            if verdict.hit:
                return self.hit("semantic", item, verdict.score)
            trace.cache_reason = trace.cache_reason or verdict.reason  # the nearest item's
        if smart and items:
            return (yield from self.smart(stage, items))
        return None

    def scope(self) -> Generator[Effect, Outcome, str]:
        """Hash of the messages an answer of this type depends on; "" when it sees none."""
        stage = self.type.stage(ContextStage)
        filters = stage.filters if stage is not None else NOTHING
        if isinstance(filters, Narrow):  # the first of them already bounds what the others see
            filters = filters.filters[0]
        if filters == NOTHING:
            return ""
        messages = yield from self.history()
        if isinstance(filters, LastK) and filters.k is not None:
            messages = messages[max(0, len(messages) - filters.k) :]
        return context_hash(messages)

    def least_model(self) -> str:
        """The least model whose stored answer will do: the least that would answer now.

        Whether it is up does not matter: what is stored may be served while all models are down.
        """
        if self.request.floor:
            return self.request.floor
        stage = self.type.stage(ModelStage)
        models = stage.models(self.allowed())
        if stage.strategy in ("verify", "agree", "route"):
            if stage.first:
                return str(stage.first)
            models = ordered("cheapest")(models)
        elif not stage.models.names and not stage.models.order:
            return ""
        return models[0].name if models else ""

    def judge(self, item: CacheItem) -> Verdict:
        if self.env.gate is None:
            # nothing but the cosine to go by: only what the chapter calls highly similar
            return Verdict(item.similarity >= HIGHLY_SIMILAR, item.similarity, "similarity")
        return self.env.gate.judge(self.request.prompt, item.key, item.similarity)

    def hit(self, result: str, item: CacheItem, score: float) -> CacheItem:
        trace = self.trace
        trace.cache, trace.cache_item, trace.cache_reason = result, item, ""
        trace.gate_score = score
        trace.avoided_nano = item.cost_nano
        trace.answered_by = item.model or NO_MODEL
        return item

    def smart(
        self, stage: CacheStage, items: tuple[CacheItem, ...]
    ) -> Generator[Effect, Outcome, CacheItem | None]:
        """SmartCache (section 4.3.5): as it is, rewritten, or facts for a small model."""
        small = self.small_model(stage.small)
        if small is None:
            return None
        shown = "\n\n".join(_shown(number, item) for number, item in enumerate(items, 1))
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
        same_format = not self.request.params.get("response_format")
        if word == "SAME" and items[0].kind in ("prompt", "question") and same_format:
            return self.hit("as_is", items[0], items[0].similarity)
        result = "rewritten" if word in ("SAME", "REWRITE") else "answered_from"
        self.hit(result, items[0], items[0].similarity)
        content = (
            REWRITE_PROMPT + items[0].response[:SHOWN_CHARS]
            if result == "rewritten"
            else USE_PROMPT + shown
        )
        if result == "answered_from":
            self.trace.cache_sources = tuple(
                dict.fromkeys(one.source for one in items if one.source)
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
        yield StoreCache(
            request.prompt,
            reply.text,
            keys,
            (yield from self.scope()),
            reply.model,
            self.trace.cost_nano,
            reply.out_tokens,
        )

    def prefetch(self, stage: PrefetchStage, text: str) -> Generator[Effect, Outcome, None]:
        if text.strip() and not self.request.bypass and self.request.store:
            history = yield from self.history()
            yield Prefetch(stage.what, stage.service_type, self.request.prompt, text, history)


def _shown(number: int, item: CacheItem) -> str:
    source = f" (from {item.source})" if item.source else ""
    return f"[{number}]{source} {item.response[:SHOWN_CHARS]}"


def relevance_word(text: str) -> str:
    """SAME, REWRITE, USE or NONE; anything unclear is NONE."""
    upper = text.upper()
    found = [word for word in ("SAME", "REWRITE", "USE", "NONE") if word in upper.split()]
    stripped = upper.strip(" .\n*`'\"")
    if stripped in ("SAME", "REWRITE", "USE", "NONE"):
        return stripped
    return found[0] if len(found) == 1 else "NONE"
