"""The cache in a pipeline: look up, judge, SmartCache, store, prefetch (section 4.3.5)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from intentd.core.prompts.answering import ModelSteps
from intentd.core.prompts.cache.keys import context_hash
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
from intentd.core.prompts.request import Verdict
from intentd.core.prompts.service_types import CacheStage, PrefetchStage, StoreStage

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


def relevance_word(text: str) -> str:
    """SAME, REWRITE, USE or NONE; anything unclear is NONE."""
    upper = text.upper()
    found = [word for word in ("SAME", "REWRITE", "USE", "NONE") if word in upper.split()]
    stripped = upper.strip(" .\n*`'\"")
    if stripped in ("SAME", "REWRITE", "USE", "NONE"):
        return stripped
    return found[0] if len(found) == 1 else "NONE"
