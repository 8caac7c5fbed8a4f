"""Answers made before they are asked for: bounded, at idle moments, with the asker's money."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from intentd.core.errors import IntentdError
from intentd.core.prompts.cache.followups import (
    QUESTION_TOKENS,
    followup_messages,
    parse_followups,
)
from intentd.core.prompts.effects import CallFailed, CallModel, Message, Prefetch, Purpose, Reply
from intentd.core.prompts.models import ModelPool, named
from intentd.core.prompts.request import Answer, Request
from intentd.core.prompts.service_types import (
    CacheStage,
    ContextStage,
    ModelStage,
    ServiceType,
    StoreStage,
)
from intentd.daemons.kit.clock import Clock
from intentd.proxy.cache.metrics import CacheMetrics
from intentd.proxy.call import Exchange
from intentd.proxy.config_cache import CacheSection
from intentd.proxy.errors import ApiError

_log = logging.getLogger(__name__)

POLL_S: Final = 0.05
REMEMBERED: Final = 5000


class Performer(Protocol):
    """What of the driver prefetching needs."""

    pool: ModelPool

    async def run(
        self, service_type: ServiceType, request: Request, exchange: Exchange
    ) -> Answer: ...

    async def ask(self, effect: CallModel, exchange: Exchange) -> Reply | CallFailed: ...


@dataclass(slots=True)
class _Job:
    effect: Prefetch
    asked: ServiceType
    request: Request
    parent: Exchange
    offered_s: float


class Prefetcher:
    """One job at a time while the proxy has little else to do.

    types: the service types by name. busy: how many requests are worked on now.
    """

    def __init__(
        self,
        section: CacheSection,
        performer: Performer,
        clock: Clock,
        metrics: CacheMetrics,
        busy: Callable[[], int],
    ) -> None:
        self.section = section
        self.types: Mapping[str, ServiceType] = {}
        self._performer = performer
        self._clock = clock
        self._metrics = metrics
        self._busy = busy
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._numbers = itertools.count()
        # what is done with the account of a request nobody asked for
        self.receipt: Callable[[Exchange], None] = lambda _: None
        self._questions: OrderedDict[tuple[str, str], list[str]] = OrderedDict()

    def offer(
        self, effect: Prefetch, asked: ServiceType, request: Request, parent: Exchange
    ) -> str:
        """Take a job; why not, or ""."""
        if len(self._jobs) >= self.section.prefetch_queue:
            self._metrics.prefetched("dropped")
            return "prefetch: the queue is full"
        self._jobs.append(_Job(effect, asked, request, parent, self._clock.now()))
        self._wake.set()
        return ""

    def questions(self, key_id: str, request_id: str) -> list[str]:
        """The follow-ups that are answered already."""
        return self._questions.get((key_id, request_id), [])

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            if not self._jobs:
                self._wake.clear()
                continue
            job = self._jobs[0]
            if self._clock.now() - job.offered_s > self.section.prefetch_max_wait_s:
                self._jobs.popleft()
                self._metrics.prefetched("late")
                continue
            if self._busy() >= self.section.prefetch_max_active:
                await self._clock.sleep(POLL_S)
                continue
            self._jobs.popleft()
            self._metrics.prefetched(await self._tried(job))

    async def _tried(self, job: _Job) -> str:
        """How it ended."""
        work: Callable[[_Job], Awaitable[str]]
        work = self._better if job.effect.what == "better" else self._followups
        try:
            return await work(job)
        except ApiError as error:
            return "budget" if error.kind == "insufficient_quota" else "failed"
        except IntentdError:
            return "failed"
        except Exception:  # noqa: BLE001  what nobody waits for must not end the daemon
            _log.exception("prefetch failed", extra={"request": job.parent.request_id})
            return "failed"

    async def _better(self, job: _Job) -> str:
        request = replace(
            job.request, history=job.effect.history, conversation="", stream=False, floor="",
            replaces=(), lookup=True, cached_only=False, max_age_s=None,
        )  # fmt: skip
        return await self._answer(job, request)

    async def _followups(self, job: _Job) -> str:
        effect, asked = job.effect, job.asked
        base = self._base(job)
        stage: ModelStage = base.stage(ModelStage)
        models = tuple(self._performer.pool)
        candidates = stage.models(named(*asked.allowed)(models) if asked.allowed else models)
        if not candidates:
            return "no_model"
        count = self.section.followups
        call = CallModel(
            candidates[0].name,
            followup_messages(effect.prompt, effect.response, count),
            Purpose.FOLLOWUPS,
            {"temperature": 0},
            QUESTION_TOKENS,
        )
        with self._exchange(job) as exchange:
            reply = await self._performer.ask(call, exchange)
        questions = parse_followups(reply.text, count) if isinstance(reply, Reply) else []
        history = (*effect.history, Message(effect.prompt, effect.response))
        place = (job.parent.key.key_id, job.parent.request_id)
        for question in questions:
            request = Request(
                question, system=job.request.system, history=history, params=job.request.params,
                max_tokens=job.request.max_tokens,
            )  # fmt: skip
            if await self._answer(job, request) == "done":
                self._questions.setdefault(place, []).append(question)
                if len(self._questions) > REMEMBERED:
                    self._questions.popitem(last=False)
        return "done" if questions else "no_questions"

    def _base(self, job: _Job) -> ServiceType:
        return self.types.get(job.effect.service_type) or job.asked

    async def _answer(self, job: _Job, request: Request) -> str:
        """By the models of the prefetch's type, in the context of the type that was asked: so it
        is stored under the scope in which that type will look."""
        base = self._base(job)
        model: ModelStage = base.stage(ModelStage)
        stages = [CacheStage("exact"), job.asked.stage(ContextStage), model, StoreStage()]
        made = replace(
            job.asked,
            stages=tuple(stage for stage in stages if stage is not None),
            max_tokens=max(base.max_tokens, job.asked.max_tokens),
        )
        with self._exchange(job) as exchange:
            answer = await self._performer.run(made, request, exchange)
        if answer.item is not None:
            return "done"  # it was there already
        return "done" if answer.text.strip() else "empty"

    @contextlib.contextmanager
    def _exchange(self, job: _Job) -> Iterator[Exchange]:
        """An account of its own; what was spent on it has a receipt, however it ends."""
        parent = job.parent
        exchange = Exchange(
            f"{parent.request_id}.prefetch.{next(self._numbers)}", parent.key, self._clock.now(),
            self._clock.wall(), "prefetch", parent.service_type, rules=parent.rules,
        )  # fmt: skip
        try:
            yield exchange
        finally:
            if exchange.steps:
                self.receipt(exchange)
