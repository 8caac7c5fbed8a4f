"""Calls to the pool: which model, how often, with whose money; every attempt is accounted for.

The decisions are core's (health, budgets); here they meet the providers. A failure before the
first token leads to the next model or another attempt, within the client's request's deadline, its
number of attempts (one budget for all calls of its pipeline) and the retry budget of all requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, TypeVar

from intentd.core.prompts.budgets import BudgetRule, Reservation
from intentd.core.prompts.counting import TokenRatio
from intentd.core.prompts.health import RATE_LIMITED, HealthState, ModelHealth, RetryBudget
from intentd.daemons.kit.clock import Clock
from intentd.proxy.adapter.litellm import LitellmStream, LitellmUpstream
from intentd.proxy.adapter.native import Answer, UpstreamError, UpstreamStream, Usage
from intentd.proxy.adapter.native import Upstream as NativeUpstream
from intentd.proxy.call import Call, Exchange, Step, guessed_usage
from intentd.proxy.config import UpstreamSection
from intentd.proxy.errors import ApiError
from intentd.proxy.keys import Key
from intentd.proxy.metrics import ProxyMetrics
from intentd.proxy.store.base import Books, Purpose, Sums

_log = logging.getLogger(__name__)

MIN_BUDGET_S: Final = 0.05
POLL_S: Final = 0.25
T = TypeVar("T")
Upstream = NativeUpstream | LitellmUpstream
Stream = UpstreamStream | LitellmStream

_STATUS: Final = {"timeout": 504, "rate_limited": 429, "refused": 502, "cut": 502, "garbage": 502}


class Places:
    """At most `limit` calls at once (0: any number); others wait in order, at most max_waiting."""

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    async def take(self, budget_s: float) -> None:
        """Raises ApiError 429 when the queue is full or the time runs out in it."""
        if not self.limit or (self.taken < self.limit and not self._queue):
            self.taken += 1
            return
        if len(self._queue) >= self.max_waiting:
            raise ApiError(429, "too many requests wait for this model", retry_after_s=1)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(budget_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self.give()  # it was handed over just now
            else:
                with contextlib.suppress(ValueError):
                    self._queue.remove(place)
            if isinstance(error, TimeoutError):
                raise ApiError(
                    429, "no place at this model within the time", retry_after_s=1
                ) from None
            raise

    def resize(self, limit: int, max_waiting: int) -> None:
        """Take other bounds; what runs goes on and counts."""
        self.limit, self.max_waiting = limit, max_waiting
        self._hand_out()

    def give(self) -> None:
        self.taken -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue and (not self.limit or self.taken < self.limit):
            place = self._queue.popleft()
            if not place.done():
                self.taken += 1
                place.set_result(None)


class PoolModel:
    """A model with what the process knows about it."""

    def __init__(self, upstream: Upstream, section: UpstreamSection) -> None:
        self.upstream = upstream
        self.name = upstream.name
        self.health = ModelHealth(section.cooldown_failures, section.cooldown_s)
        self.places = Places(upstream.model.max_concurrency, section.max_waiting)
        self.ratio = TokenRatio()
        self.capabilities = frozenset(upstream.model.capabilities)

    def lacks(self, call: Call) -> dict[str, str]:
        """What the call needs and this model cannot do, by the field that asks for it; nothing
        of a model that declares nothing."""
        if not self.capabilities:
            return {}
        return {need: at for need, at in call.needs().items() if need not in self.capabilities}


class Attempt:
    """One call under way: its place, its reservation; ends exactly once."""

    def __init__(
        self, engine: Engine, model: PoolModel, call: Call, exchange: Exchange, held: _Held
    ) -> None:
        self.model = model
        self._engine = engine
        self._call = call
        self._exchange = exchange
        self._held = held
        self._started_s = engine.clock.now()
        self._ended = False

    def answered(self, usage: Usage | None, answer_bytes: int) -> None:
        """A whole answer came."""
        self.model.health.succeeded()
        self._end("ok", usage, answer_bytes, sent=True)

    def failed(self, error: UpstreamError, answer_bytes: int = 0) -> None:
        """The provider failed; what it may have charged is booked."""
        if error.kind != "request":
            opened = self.model.health.failed(
                self._engine.clock.now(), error.kind, error.retry_after_s
            )
            if opened:
                _log.warning(
                    "model cools down", extra={"model": self.model.name, "reason": str(error)}
                )
        self._end(error.kind, None, answer_bytes, sent=error.billed)

    def left(self, answer_bytes: int = 0) -> None:
        """The client went away, or the request's time is over: the call is stopped."""
        self._end("left", None, answer_bytes, sent=True)

    def _end(self, outcome: str, usage: Usage | None, answer_bytes: int, *, sent: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self.model.places.give()
        engine = self._engine
        held = self._held
        upstream = self.model.upstream
        step = Step(self.model.name, self._call.purpose, outcome, usage)
        step.started_s = self._started_s
        step.seconds = engine.clock.now() - self._started_s
        if usage is not None:
            if not self._call.images:
                self.model.ratio.learn(self._call.size_bytes, usage.in_tokens)
            step.cost_nano = usage.cost_nano(upstream.price)
            if held.reservation is not None:
                engine.ledger.settle(
                    held.reservation,
                    {
                        "nano_dollars": step.cost_nano,
                        "tokens": usage.in_tokens + usage.out_tokens,
                        "requests": held.amounts["requests"],
                    },
                )
        elif sent:
            # The provider's count is lost. With a budget the books take the reserved amount, the
            # most it can have charged; without one a guess.
            step.estimated = True
            if held.reservation is not None:
                step.cost_nano = held.amounts["nano_dollars"]
                amounts = {
                    **held.amounts,
                    "requests": held.amounts["requests"] if outcome in ("ok", "left", "cut") else 0,
                }
                engine.ledger.settle(held.reservation, amounts, estimated=True)
            else:
                step.usage = guessed_usage(self._call, answer_bytes)
                step.cost_nano = step.usage.cost_nano(upstream.price)
        elif held.reservation is not None:
            engine.ledger.release(held.reservation)
        self._exchange.steps.append(step)
        engine.book(self._exchange, step)


class _Held:
    """A reservation, or that none was needed."""

    __slots__ = ("amounts", "cap", "reservation")

    def __init__(
        self, reservation: Reservation | None, amounts: Mapping[str, int], cap: int
    ) -> None:
        self.reservation = reservation
        self.amounts = dict(amounts)
        self.cap = cap


_NO_HOLD: Final = _Held(None, {}, 0)


class Engine:
    """The pool and the rules for asking it."""

    def __init__(
        self,
        section: UpstreamSection,
        ledger: Books,
        metrics: ProxyMetrics,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.section = section
        self.ledger = ledger
        self.metrics = metrics
        self.clock = clock
        self._rng = rng
        self.models: dict[str, PoolModel] = {}
        self.shared_budgets: Mapping[str, tuple[BudgetRule, ...]] = {}
        self._retries = RetryBudget(section.retry_share)
        self._boot = secrets.token_hex(8)
        self._numbers = itertools.count()

    def set_pool(self, upstreams: Mapping[str, Upstream], section: UpstreamSection) -> None:
        """Take a pool (start, reload). Models that stay keep their health, and the calls under
        way their places."""
        fresh = {name: PoolModel(upstream, section) for name, upstream in upstreams.items()}
        for name, model in fresh.items():
            known = self.models.get(name)
            if known is not None:
                model.places = known.places
                model.places.resize(upstreams[name].model.max_concurrency, section.max_waiting)
            if known is not None and known.upstream.model.base_url == model.upstream.model.base_url:
                model.health, model.ratio = known.health, known.ratio
                model.health.failures = section.cooldown_failures
                model.health.cooldown_s = section.cooldown_s
        self.section = section
        self._retries = RetryBudget(section.retry_share)
        self.models = fresh

    def rules(self, key: Key, service_type: str) -> tuple[BudgetRule, ...]:
        """Every budget that binds a key's request of a service type."""
        shared = self.shared_budgets
        if not shared and not key.grants.budgets:
            return ()
        return (
            *key.grants.budgets,
            *shared.get(f"tenant:{key.tenant}", ()),
            *shared.get(f"type:{service_type}", ()),
            *shared.get("global", ()),
        )

    def book(self, exchange: Exchange, step: Step) -> None:
        """Put one call into the day's spend and the metrics."""
        usage = step.usage
        in_tokens = usage.in_tokens if usage is not None else 0
        out_tokens = usage.out_tokens if usage is not None else 0
        self.metrics.called(step.model, step.outcome)
        self.metrics.spent(step.model, in_tokens, out_tokens, step.cost_nano)
        key = exchange.key
        self.ledger.book(
            Purpose(key.key_id, key.tenant, step.model, exchange.service_type),
            Sums(
                1,
                int(step.outcome != "ok"),
                in_tokens,
                out_tokens,
                step.cost_nano,
                step.cost_nano if step.estimated else 0,
            ),
        )

    async def complete(self, call: Call, exchange: Exchange) -> Answer:
        """A whole answer. Raises ApiError."""

        async def once(upstream: Upstream, body: bytes, budget_s: float) -> Answer:
            return await upstream.call(call.path, body, budget_s=budget_s)

        answer, attempt = await self._attempts(call, exchange, once)
        attempt.answered(answer.usage, len(answer.raw))
        return answer

    @contextlib.asynccontextmanager
    async def stream(self, call: Call, exchange: Exchange) -> AsyncIterator[tuple[Stream, Attempt]]:
        """A stream whose first events are there. Raises ApiError; the caller ends the attempt."""

        async with contextlib.AsyncExitStack() as stack:

            async def once(upstream: Upstream, body: bytes, budget_s: float) -> Stream:
                streaming: contextlib.AbstractAsyncContextManager[Stream] = upstream.stream(
                    call.path, body, budget_s=budget_s, choices=call.answers
                )
                return await stack.enter_async_context(streaming)

            stream, attempt = await self._attempts(call, exchange, once)
            try:
                yield stream, attempt
            finally:
                attempt.left()  # does nothing when it has ended

    # -- inside --------------------------------------------------------------------------------

    async def _attempts(
        self,
        call: Call,
        exchange: Exchange,
        once: Callable[[Upstream, bytes, float], Awaitable[T]],
    ) -> tuple[T, Attempt]:
        """Ask until a model answers; the last failure becomes the client's error.

        Every call of a pipeline is made once; what fails is asked again, here or of a fallback,
        `attempts` - 1 times for the client's request, before one deadline.
        """
        clock = self.clock
        if not exchange.deadline_s:
            exchange.deadline_s = clock.now() + self.section.total_timeout_s
            self._retries.request()
        deadline_s = exchange.deadline_s
        if clock.now() >= deadline_s:
            raise ApiError(
                504, f"{call.model}: the time of this request is over",
                code="upstream_timeout", kind="upstream_error",
            )  # fmt: skip
        failed: list[str] = []
        last: UpstreamError | None = None
        paid = True  # the first attempt is not a retry
        while True:
            if last is not None and not paid:
                if not self._untried(call, failed):
                    if not self._may_retry(last):
                        raise _api_error(last)
                    pause_s = self._backoff_s(len(failed), last)
                    if clock.now() + pause_s >= deadline_s:
                        raise _api_error(last)
                    await clock.sleep(pause_s)
                self.metrics.retries += 1
                paid = True
            model = self._choose(call, failed, clock.now())
            if model is None:
                await self._wait(call, last, deadline_s)
                continue
            attempt, body = await self._begin(call, exchange, model, deadline_s)
            budget_s = max(deadline_s - clock.now(), MIN_BUDGET_S)
            try:
                result = await once(model.upstream, body, budget_s)
            except UpstreamError as error:
                attempt.failed(error)
                last = error
                paid = False
                failed.append(model.name)
                over = exchange.repeats >= self.section.attempts - 1 or clock.now() >= deadline_s
                if over or not error.retryable:
                    raise _api_error(error) from None
                exchange.repeats += 1
                continue
            except BaseException:
                attempt.left()
                raise
            return result, attempt

    async def _begin(
        self, call: Call, exchange: Exchange, model: PoolModel, deadline_s: float
    ) -> tuple[Attempt, bytes]:
        """Take a place and reserve the money."""
        clock = self.clock
        places = model.places
        if places.limit:
            before_s = clock.now()
            await places.take(max(deadline_s - before_s, MIN_BUDGET_S))
            exchange.wait_s += clock.now() - before_s
        else:
            places.taken += 1
        try:
            rules = (*self.rules(exchange.key, exchange.service_type), *exchange.rules)
            held = await self._reserve(call, exchange, model.upstream, rules) if rules else _NO_HOLD
            body = call.payload(model.upstream, held.cap)
        except BaseException:
            places.give()
            raise
        return Attempt(self, model, call, exchange, held), body

    async def _reserve(
        self,
        call: Call,
        exchange: Exchange,
        upstream: Upstream,
        rules: tuple[BudgetRule, ...],
    ) -> _Held:
        in_tokens, out_tokens, cap = call.most_tokens(upstream)
        amounts = {
            "nano_dollars": upstream.price.cost_nano(in_tokens, out_tokens),
            "tokens": in_tokens + out_tokens,
            "requests": int(call.purpose == "answer"),
        }
        key = exchange.key
        before_s = self.clock.now()
        reservation = await self.ledger.reserve(
            f"{self._boot}/{next(self._numbers)}",  # not the client's id, which may repeat
            rules,
            amounts,
            Purpose(key.key_id, key.tenant, upstream.name, exchange.service_type),
        )
        exchange.reserve_s += self.clock.now() - before_s
        return _Held(reservation, amounts, cap)

    def _choose(self, call: Call, failed: list[str], now: float) -> PoolModel | None:
        """The first of the model and its fallbacks that has not failed and may be asked; else the
        first that may be asked again."""
        first = self.models[call.model]
        if not failed and first.health.state is HealthState.CLOSED:
            return first
        for again in (False, True):
            for model in self._order(call):
                if (model.name in failed) is again and model.health.admit(now):
                    return model
        return None

    def _order(self, call: Call) -> list[PoolModel]:
        first = self.models[call.model]
        if call.by_pipeline:
            return [first]
        others = (self.models[name] for name in first.upstream.model.fallbacks)
        return [first, *(other for other in others if not other.lacks(call))]

    def _untried(self, call: Call, failed: list[str]) -> bool:
        """Whether a fallback is left that may be asked."""
        now = self.clock.now()
        return any(
            model.name not in failed and model.health.wait_s(now) <= 0
            for model in self._order(call)
        )

    async def _wait(self, call: Call, last: UpstreamError | None, deadline_s: float) -> None:
        """No model may be asked now: wait where the provider said how long, else give up.

        Raises ApiError.
        """
        now = self.clock.now()
        soonest = min(self._order(call), key=lambda model: model.health.wait_s(now))
        wait_s = soonest.health.wait_s(now)
        patient = soonest.health.reason == RATE_LIMITED
        if not patient or wait_s > self.section.max_retry_after_s or now + wait_s > deadline_s:
            if last is not None:
                raise _api_error(last, wait_s)
            raise _limited(call, wait_s) if patient else _cooling(call, wait_s)
        # Another request's probe may succeed sooner.
        await self.clock.sleep(min(wait_s, POLL_S) + 0.01 * self._rng.random())

    def _may_retry(self, last: UpstreamError) -> bool:
        """Whether the same model may be asked again: not if the provider wants a long pause."""
        return last.retry_after_s <= self.section.max_retry_after_s and self._retries.take()

    def _backoff_s(self, attempts: int, last: UpstreamError) -> float:
        pause_s = self.section.backoff_s * 2.0 ** (attempts - 1) * (0.5 + self._rng.random())
        return max(pause_s, last.retry_after_s)


def _api_error(error: UpstreamError, wait_s: float = 0.0) -> ApiError:
    """What the client hears of the last failure."""
    if error.kind == "request":
        details = error.details
        param, code = details.get("param"), details.get("code")
        return ApiError(
            error.status if error.status in (400, 404, 409, 413, 422) else 400,
            str(error),
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) else None,
            outcome="upstream_request",
        )
    return ApiError(
        _STATUS.get(error.kind, 502),
        str(error),
        code=f"upstream_{error.kind}",
        kind="rate_limit_error" if error.kind == "rate_limited" else "upstream_error",
        retry_after_s=max(wait_s, error.retry_after_s) or None,
    )


def _limited(call: Call, wait_s: float) -> ApiError:
    return ApiError(
        429,
        f"{call.model}: its provider limits the rate and wants to be left alone for {wait_s:.1f} s",
        code="upstream_rate_limited",
        kind="rate_limit_error",
        retry_after_s=wait_s,
    )


def _cooling(call: Call, wait_s: float) -> ApiError:
    return ApiError(
        503,
        f"{call.model}: the model failed repeatedly and is left alone for {wait_s:.0f} s",
        code="upstream_cooldown",
        kind="upstream_error",
        retry_after_s=max(wait_s, 1.0),
    )
