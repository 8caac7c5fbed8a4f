"""Calls to OpenAI-compatible providers over HTTP: one attempt each, every failure named.

Whoever calls decides about retries; here an answer is whole and valid, or there is an
UpstreamError that says whether it may have been billed and whether another attempt may help.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol

import orjson

from intentd.core.errors import IntentdError, WireError
from intentd.core.prompts.budgets import period_name
from intentd.core.prompts.money import Price, price_at
from intentd.daemons.kit.clock import Clock
from intentd.proxy.adapter.http import (
    BadAnswerError,
    ConnectError,
    Connection,
    Connections,
    CutError,
    Origin,
)
from intentd.proxy.adapter.sse import DONE, EventSplitter, event_data
from intentd.proxy.config import ModelSection, UpstreamSection

MAX_ERROR_BYTES: Final = 64 << 10
MAX_MESSAGE: Final = 1000
_FAILURES: Final = (OSError, ConnectError, CutError, BadAnswerError)  # TimeoutError is an OSError
_CLIENT_FAULTS: Final = frozenset({400, 404, 405, 409, 413, 415, 422})


class UpstreamError(IntentdError):
    """One attempt failed.

    kind: refused (no connection), timeout, cut, garbage, rate_limited, status (5xx, 401, 403) or
    request (the provider blames the request: another attempt will not help).
    billed: the provider may have charged for it.
    """

    def __init__(
        self,
        kind: str,
        text: str,
        *,
        status: int = 0,
        billed: bool = False,
        retry_after_s: float = 0.0,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.status = status
        self.billed = billed
        self.retry_after_s = retry_after_s
        self.details = details or {}
        super().__init__(text)

    @property
    def retryable(self) -> bool:
        return self.kind != "request"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them; cached_in is a part of in_tokens."""

    in_tokens: int
    out_tokens: int
    cached_in_tokens: int = 0

    def cost_nano(self, price: Price) -> int:
        return price.cost_nano(self.in_tokens, self.out_tokens, self.cached_in_tokens)


def read_usage(value: object) -> Usage | None:
    """The ``usage`` object of an answer; None when it has none or a nonsensical one."""
    if not isinstance(value, dict):
        return None
    in_tokens = value.get("prompt_tokens", value.get("input_tokens"))
    out_tokens = value.get("completion_tokens", value.get("output_tokens", 0))
    if type(in_tokens) is not int or type(out_tokens) is not int:
        return None
    if not (0 <= in_tokens < 2**40 and 0 <= out_tokens < 2**40):
        return None
    details = value.get("prompt_tokens_details") or value.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    cached = cached if type(cached) is int else 0
    return Usage(in_tokens, out_tokens, min(max(cached, 0), in_tokens))


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the provider's bytes and what they decode to."""

    raw: bytes
    value: dict[str, Any]
    usage: Usage | None


@dataclass(slots=True)  # not frozen: that would double the cost of making one
class Event:
    """One event of a stream. value: decoded, None for [DONE]."""

    raw: bytes
    value: dict[str, Any] | None
    usage: Usage | None


class PriceList:
    """A model's prices by day; which one holds is looked up once a day."""

    def __init__(self, history: tuple[Price, ...], clock: Clock) -> None:
        self._history = history
        self._clock = clock
        self._day = -1
        self._price = history[0]

    def today(self) -> Price:
        if len(self._history) > 1:
            wall_s = self._clock.wall()
            if int(wall_s // 86400) != self._day:
                self._day = int(wall_s // 86400)
                self._price = price_at(self._history, period_name("day", wall_s))
        return self._price


class Upstream:
    """One model of the pool and how to reach it."""

    def __init__(
        self,
        model: ModelSection,
        section: UpstreamSection,
        session: Connections,
        api_key: str,
        clock: Clock,
    ) -> None:
        self.model = model
        self.name = model.name
        self.upstream_model = model.upstream_model or model.name
        self._prices = PriceList(model.history(), clock)
        self._section = section
        self._session = session
        self._origin = Origin(model.base_url)
        self._clock = clock
        self._heads: dict[str, bytes] = {}
        self._headers = {
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "intentd-proxy",
        }
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @property
    def price(self) -> Price:
        """Today's."""
        return self._prices.today()

    async def call(self, path: str, body: bytes, *, budget_s: float) -> Answer:
        """One request, one whole answer, within budget_s seconds. Raises UpstreamError."""
        limit_s = min(budget_s, self._section.first_token_timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                response = await self._post(path, body)
                try:
                    if response.status != 200:
                        raise await self._refusal(response)
                    raw = await self._read(response)
                finally:
                    response.release()
        except _FAILURES as error:
            raise self.failed(error) from None
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise UpstreamError("garbage", f"{self.name}: the answer is not JSON", billed=True)
        if value.get("error") is not None and "choices" not in value:
            raise _error_object(self.name, value["error"], billed=True)
        return Answer(raw, value, read_usage(value.get("usage")))

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, budget_s: float, choices: int = 1
    ) -> AsyncIterator[UpstreamStream]:
        """A stream whose first events have come. Raises UpstreamError.

        choices: how many answers it carries (``n``). Leaving before its end closes the
        connection, which stops the provider.
        """
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + budget_s
        first_s = min(budget_s, self._section.first_token_timeout_s)
        response: Connection | None = None
        try:
            try:
                async with asyncio.timeout(first_s):
                    response = await self._post(path, body)
                    if response.status != 200:
                        raise await self._refusal(response)
                    stream = UpstreamStream(self, response, self._section, ends_s, choices)
                    await stream.read_first()
            except _FAILURES as error:
                raise self.failed(error) from None
            stream.watch()
            try:
                yield stream
                await stream.finish()
            finally:
                stream.unwatch()
        finally:
            if response is not None:
                response.release()  # one that has not ended is closed

    # -- inside --------------------------------------------------------------------------------

    async def _post(self, path: str, body: bytes) -> Connection:
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = self._origin.head(path, self._headers)
        return await self._session.post(self._origin, head, body)

    def event(self, event: bytes) -> Event | None:
        data = event_data(event)
        if data is None:
            return None
        if data == DONE:
            return Event(event, None, None)
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise UpstreamError("garbage", f"{self.name}: an event is not JSON", billed=True)
        if value.get("error") is not None:
            raise _error_object(self.name, value["error"], billed=True)
        usage = value.get("usage")
        return Event(event, value, None if usage is None else read_usage(usage))

    async def _read(self, response: Connection) -> bytes:
        if response.whole:  # it came with the head, as small ones do
            return await response.readany()
        bound = self._section.max_answer_bytes
        parts: list[bytes] = []
        size = 0
        while part := await response.readany():
            size += len(part)
            if size > bound:
                raise UpstreamError(
                    "garbage", f"{self.name}: the answer is over {bound} bytes", billed=True
                )
            parts.append(part)
        return b"".join(parts)

    async def _refusal(self, response: Connection) -> UpstreamError:
        """What a status other than 200 means."""
        status = response.status
        raw = await self._read_error(response)
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = None
        error = value.get("error") if isinstance(value, dict) else None
        details = error if isinstance(error, dict) else {}
        if status == 429:
            return UpstreamError(
                "rate_limited",
                f"{self.name}: the provider limits the rate",
                status=status,
                retry_after_s=read_retry_after_s(response.header(b"retry-after"), self._clock),
                details=details,
            )
        if status in _CLIENT_FAULTS:
            text = details.get("message")
            return UpstreamError(
                "request",
                text[:MAX_MESSAGE]
                if isinstance(text, str) and text
                else f"{self.name}: the provider refuses the request ({status})",
                status=status,
                details=details,
            )
        return UpstreamError(
            "timeout" if status in (408, 504) else "status",
            f"{self.name}: the provider answers {status}",
            status=status,
            retry_after_s=read_retry_after_s(response.header(b"retry-after"), self._clock),
        )

    async def _read_error(self, response: Connection) -> bytes:
        raw = b""
        while len(raw) < MAX_ERROR_BYTES and (part := await response.readany()):
            raw += part
        return raw[:MAX_ERROR_BYTES]

    def failed(self, error: Exception) -> UpstreamError:
        if isinstance(error, ConnectError):
            return UpstreamError("refused", f"{self.name}: no connection to the provider")
        if isinstance(error, TimeoutError):
            return UpstreamError("timeout", f"{self.name}: the provider is too slow", billed=True)
        if isinstance(error, BadAnswerError):
            return UpstreamError("garbage", f"{self.name}: the answer is {error}", billed=True)
        return UpstreamError("cut", f"{self.name}: the provider cut the answer", billed=True)


class Output(Protocol):
    """Where a stream is forwarded to. full: it takes more only after drain()."""

    @property
    def full(self) -> bool: ...

    def put(self, data: bytes) -> None: ...

    def put_chunk(self, chunk: bytes) -> bool:
        """Send a chunk of HTTP with its lines as it is; False where that cannot be."""

    async def drain(self) -> None: ...


class UpstreamStream:
    """The events of one streamed answer, in the batches they arrive in.

    It ends with [DONE]. An end without one is accepted from servers that leave it out if every
    answer gave its finish reason; else it is an UpstreamError (cut), never an end.
    """

    def __init__(
        self,
        upstream: Upstream,
        response: Connection,
        section: UpstreamSection,
        ends_s: float,
        choices: int,
    ) -> None:
        self._upstream = upstream
        self._content = response
        self._idle_s = section.idle_timeout_s
        self._ends_s = ends_s
        self._choices = choices
        self._splitter = EventSplitter(section.max_answer_bytes)
        self._finished: set[int] = set()
        self._ready: list[Event] = []
        self._failure: UpstreamError | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._since_s = 0.0
        self.done = False

    async def read_first(self) -> None:
        """Wait for the first events, so that a failure before them can still be retried."""
        while not self._ready:
            self._ready = await self._batch()

    async def read(self) -> list[Event]:
        """The next events, at least one; [] once after [DONE]. Raises UpstreamError."""
        if self._ready:
            events, self._ready = self._ready, []
            return events
        if self.done:
            return []
        self._since_s = self._loop.time()
        self._reading = True
        try:
            while not (events := await self._batch()):
                pass
        except _FAILURES as error:
            raise self._upstream.failed(error) from None
        finally:
            self._reading = False
        return events

    def watch(self) -> None:
        """Break a read that waits too long for an event.

        One timer a stream, set anew when it runs out: a timer for each read would cost a third of
        a chunk. Silence is counted between events, so a provider that drips bytes does not count
        as alive, and only while this side reads, so a slow client does not look like it.
        """
        now = self._loop.time()
        due_s = min(
            self._since_s + self._idle_s if self._reading else now + self._idle_s, self._ends_s
        )
        if now >= due_s and (self._reading or now >= self._ends_s):
            self._content.set_exception(TimeoutError())
            return
        self._timer = self._loop.call_at(max(due_s, now + 0.001), self.watch)

    def unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def finish(self) -> None:
        """Take the end of the body, which mostly came with [DONE], so the connection is reused."""
        if self.done and not self._content.at_eof():
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(0.05):
                    await self._content.readany()

    async def forward(
        self,
        take: Callable[[list[Event]], bytes],
        out: Output,
        passed: Callable[[int], None] | None = None,
    ) -> None:
        """Send all that comes on to `out`, as take() words it, until [DONE]. Raises UpstreamError
        and whatever out raises.

        Events are passed on in the callback that received them: waking this task for each would
        cost a third of a chunk. It wakes when the client is slow, and at the end.

        passed: where take() would change nothing of an event that neither ends an answer nor
        tells tokens, one that comes as a chunk of its own goes on as that chunk; told its bytes.
        """
        content, loop = self._content, self._loop
        woken: asyncio.Future[None] = loop.create_future()

        def receive() -> None:
            if woken.done():
                return
            try:
                while not self.done and (data := content.take()) is not None:
                    self._pass_on(self._events(data), take, out)
                if self.done or out.full:
                    woken.set_result(None)
            except Exception as error:  # noqa: BLE001  it is raised where it is waited for
                woken.set_exception(error)

        def direct(chunk: bytes) -> bool:
            if woken.done() or self._splitter.begun or passed is None:
                return False
            size_bytes = _plain_event_bytes(chunk)
            if not size_bytes or not out.put_chunk(chunk):
                return False
            passed(size_bytes)
            self._since_s = loop.time()
            if out.full:
                woken.set_result(None)
            return True

        try:
            self._pass_on(await self.read(), take, out)
            while not self.done:
                if out.full:
                    self._reading = False
                    content.hold(held=True)
                    await out.drain()
                    content.hold(held=False)
                self._since_s = loop.time()
                self._reading = True
                woken = loop.create_future()
                content.push_to(receive, direct if passed is not None else None)
                receive()  # what came meanwhile
                await woken
        except _FAILURES as error:
            if isinstance(error, ConnectionError):
                raise  # the client's
            raise self._upstream.failed(error) from None
        finally:
            self._reading = False
            content.push_to(None)
            # its error knows the callback, which knows it: garbage that only a collector finds
            woken = loop.create_future()

    def _pass_on(
        self, events: list[Event], take: Callable[[list[Event]], bytes], out: Output
    ) -> None:
        if events:
            self._since_s = self._loop.time()
            data = take(events)
            if data:
                out.put(data)
        if self._failure is not None:
            raise self._failure

    async def _batch(self) -> list[Event]:
        """Events of one read; [] when it completed none."""
        if self._failure is not None:
            raise self._failure
        return self._events(await self._content.readany())

    def _events(self, data: bytes) -> list[Event]:
        """Events that the bytes completed; b"": the end of the body. Raises UpstreamError."""
        if self._failure is not None:
            raise self._failure
        try:
            raw = self._splitter.feed(data) if data else self._splitter.finish()
        except WireError as error:
            raise UpstreamError("garbage", f"{self._upstream.name}: {error}", billed=True) from None
        events: list[Event] = []
        for item in raw:
            try:
                event = self._upstream.event(item)
            except UpstreamError as error:
                if not events:
                    raise
                self._failure = error  # after what came whole before it
                return events
            if event is None:
                continue
            events.append(event)
            if event.value is None:
                self.done = True
                return events
            self._note_finished(event.value)
        if not data:
            if len(self._finished) < self._choices or self._splitter.pending:
                raise UpstreamError(
                    "cut", f"{self._upstream.name}: the stream ended early", billed=True
                )
            events.append(Event(b"data: " + DONE, None, None))
            self.done = True
        return events

    def _note_finished(self, value: dict[str, Any]) -> None:
        choices = value.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                    index = choice.get("index", 0)
                    self._finished.add(index if isinstance(index, int) else 0)


def _plain_event_bytes(chunk: bytes) -> int:
    """Size of the event in a chunk of HTTP that is one whole event of an answer under way; 0 for
    anything else: that is read with care.

    Most of a stream are such chunks, and this is most of what they cost.
    """
    start = chunk.find(b"\r\n", 0, 18) + 2
    size_bytes = len(chunk) - start - 4
    if (
        size_bytes < 8
        or chunk[:start] != b"%x\r\n" % (size_bytes + 2)
        or chunk[start : start + 6] != b"data: "
        or chunk[-4:] != b"\n\n\r\n"
    ):
        return 0
    try:
        value = orjson.loads(chunk[start + 6 : -4])
    except orjson.JSONDecodeError:
        return 0
    if type(value) is not dict or value.get("usage") is not None or "error" in value:
        return 0
    choices = value.get("choices")
    if type(choices) is not list:
        return 0
    for choice in choices:
        if type(choice) is not dict or choice.get("finish_reason") is not None:
            return 0
    return size_bytes


def _error_object(name: str, error: object, *, billed: bool) -> UpstreamError:
    """An error inside a 200: some servers send one instead of an answer."""
    details = error if isinstance(error, dict) else {}
    text = details.get("message")
    shown = text[:MAX_MESSAGE] if isinstance(text, str) else "no message"
    return UpstreamError(
        "status", f"{name}: the provider reports: {shown}", billed=billed, details=details
    )


def read_retry_after_s(text: str, clock: Clock) -> float:
    """Seconds of a Retry-After header (a number or a date); 0 when there is none."""
    text = text.strip()
    if not text:
        return 0.0
    try:
        wait_s = float(text)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(text).timestamp() - clock.wall()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait_s, 0.0), 86400.0) if wait_s == wait_s else 0.0


def open_session(section: UpstreamSection) -> Connections:
    """The connections to all providers."""
    return Connections(
        connect_timeout_s=section.connect_timeout_s, max_connections=section.max_connections
    )
