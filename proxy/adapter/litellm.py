"""Calls to other providers through litellm, which is imported only when a model asks for it.

It translates and calls; everything else stays ours: no retries, fallbacks, caches, callbacks or
price files of its own, its bundled file instead of one from the network, and no field of a client
but those of OpenAI's API (its own would choose where a prompt goes and with whose key).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

import orjson

from intentd.core.prompts.money import Price
from intentd.daemons.kit.clock import Clock
from intentd.proxy.adapter.native import (
    MAX_MESSAGE,
    Answer,
    Event,
    Output,
    PriceList,
    UpstreamError,
    read_retry_after_s,
    read_usage,
)
from intentd.proxy.adapter.sse import DONE
from intentd.proxy.config import ModelSection, UpstreamSection

_FIELDS: Final = frozenset(
    {"messages", "temperature", "top_p", "n", "stream", "stream_options", "stop", "max_tokens",
     "max_completion_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "user",
     "response_format", "seed", "tools", "tool_choice", "parallel_tool_calls", "functions",
     "function_call", "logprobs", "top_logprobs", "reasoning_effort", "verbosity", "prompt",
     "suffix", "echo", "best_of", "input", "dimensions", "encoding_format", "modalities", "audio",
     "prediction", "service_tier"}
)  # fmt: skip
_CALLS: Final = {
    "/chat/completions": "acompletion",
    "/completions": "atext_completion",
    "/embeddings": "aembedding",
}
_CLIENT_FAULTS: Final = frozenset({400, 404, 409, 413, 422})
_library: Any = None


def load() -> Any:
    """The library, imported once; it takes seconds and 180 MB. Raises ImportError."""
    global _library  # noqa: PLW0603  one module, loaded at most once a process
    if _library is None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        os.environ.setdefault("LITELLM_LOG", "ERROR")
        library: Any = importlib.import_module("litellm")
        library.telemetry = False
        library.suppress_debug_info = True
        library.num_retries = 0
        library.cache = None
        library.callbacks = []
        # It imports more of itself on its first calls, for seconds: not in the event loop.
        warm: dict[str, Any] = {
            "model": "openai/none", "messages": [{"role": "user", "content": "x"}],
            "mock_response": "x",
        }  # fmt: skip
        library.completion(**warm)
        list(library.completion(**warm, stream=True))
        _library = library
    return _library


class LitellmUpstream:
    """One model of a provider that litellm knows; the interface of native.Upstream."""

    def __init__(
        self, model: ModelSection, section: UpstreamSection, api_key: str, clock: Clock
    ) -> None:
        self.model = model
        self.name = model.name
        self.upstream_model = model.upstream_model or model.name
        self._section = section
        self._api_key = api_key
        self._clock = clock
        self._prices = PriceList(model.history(), clock)

    @property
    def price(self) -> Price:
        return self._prices.today()

    async def call(self, path: str, body: bytes, *, budget_s: float) -> Answer:
        """One request, one whole answer, within budget_s seconds. Raises UpstreamError."""
        limit_s = min(budget_s, self._section.first_token_timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._ask(path, body, limit_s)
        except TimeoutError:
            raise self._too_slow() from None
        value = _plain(answer)
        if not value:
            raise UpstreamError("garbage", f"{self.name}: the answer is empty", billed=True)
        return Answer(orjson.dumps(value), value, read_usage(value.get("usage")))

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, *, budget_s: float, choices: int = 1
    ) -> AsyncIterator[LitellmStream]:
        """A stream whose first chunk has come. Raises UpstreamError."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + budget_s
        first_s = min(budget_s, self._section.first_token_timeout_s)
        stream: LitellmStream | None = None
        try:
            try:
                async with asyncio.timeout(first_s):
                    chunks = await self._ask(path, body, budget_s)
                    stream = LitellmStream(self, chunks, self._section, ends_s, choices)
                    await stream.read_first()
            except TimeoutError:
                raise self._too_slow() from None
            yield stream
        finally:
            if stream is not None:
                await stream.close()

    def failed(self, error: Exception) -> UpstreamError:
        """litellm's exceptions carry the provider's status."""
        status = getattr(error, "status_code", None)
        status = status if isinstance(status, int) else 0
        kind = type(error).__name__
        if kind == "Timeout" or status in (408, 504):
            return self._too_slow()
        if status == 429:
            headers = getattr(error, "litellm_response_headers", None)
            after = headers.get("retry-after", "") if isinstance(headers, Mapping) else ""
            return UpstreamError(
                "rate_limited",
                f"{self.name}: the provider limits the rate",
                status=status,
                retry_after_s=read_retry_after_s(str(after), self._clock),
            )
        if status in _CLIENT_FAULTS:
            text = str(getattr(error, "message", "") or error)[:MAX_MESSAGE]
            return UpstreamError("request", text, status=status)
        if kind == "APIConnectionError" or not status:
            # Also what litellm makes of faults it does not know: the prompt may have been sent.
            return UpstreamError("cut", f"{self.name}: the provider cut the answer", billed=True)
        return UpstreamError("status", f"{self.name}: the provider answers {status}", status=status)

    # -- inside --------------------------------------------------------------------------------

    async def _ask(self, path: str, body: bytes, limit_s: float) -> Any:
        given: dict[str, Any] = orjson.loads(body)
        given.pop("model", None)
        for name in given:
            if name not in _FIELDS:
                text = f"{name}: {self.name} takes no field of this name"
                raise UpstreamError("request", text, status=400, details={"param": name})
        call = getattr(load(), _CALLS[path])
        if self._api_key:
            given["api_key"] = self._api_key
        if self.model.base_url:
            given["api_base"] = self.model.base_url
        try:
            return await call(
                **given,
                **self.model.params,
                model=self.upstream_model,
                timeout=limit_s,
                num_retries=0,
                max_retries=0,
            )
        except Exception as error:  # noqa: BLE001  its exceptions have no common base of its own
            raise self.failed(error) from None

    def _too_slow(self) -> UpstreamError:
        return UpstreamError("timeout", f"{self.name}: the provider is too slow", billed=True)


class LitellmStream:
    """The chunks of one streamed answer, one an event; the interface of native.UpstreamStream."""

    def __init__(
        self,
        upstream: LitellmUpstream,
        chunks: Any,
        section: UpstreamSection,
        ends_s: float,
        choices: int,
    ) -> None:
        self._upstream = upstream
        self._source = chunks
        self._chunks = aiter(chunks)
        self._idle_s = section.idle_timeout_s
        self._ends_s = ends_s
        self._choices = choices
        self._finished: set[int] = set()
        self._ready: list[Event] = []
        self.done = False

    async def read_first(self) -> None:
        self._ready = [await self._next()]

    async def read(self) -> list[Event]:
        """The next events, at least one; [] once after the end. Raises UpstreamError."""
        if self._ready:
            events, self._ready = self._ready, []
            return events
        if self.done:
            return []
        left_s = self._ends_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(self._idle_s, left_s))):
                return [await self._next()]
        except TimeoutError:
            raise self._upstream._too_slow() from None

    async def forward(
        self,
        take: Callable[[list[Event]], bytes],
        out: Output,
        _passed: Callable[[int], None] | None = None,
    ) -> None:
        """Send all that comes on to `out`, as take() words it. Raises UpstreamError and whatever
        out raises."""
        while events := await self.read():
            data = take(events)
            if data:
                out.put(data)
            if out.full:
                await out.drain()

    async def close(self) -> None:
        """Let go of the connection, which stops the provider."""
        for thing in (self._source, getattr(self._source, "completion_stream", None)):
            leave = getattr(thing, "aclose", None)
            if leave is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(1.0):
                        await leave()

    async def _next(self) -> Event:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            if len(self._finished) < self._choices:
                text = f"{self._upstream.name}: the stream ended early"
                raise UpstreamError("cut", text, billed=True) from None
            self.done = True
            return Event(b"data: " + DONE, None, None)
        except Exception as error:  # noqa: BLE001  see LitellmUpstream._ask
            failure = self._upstream.failed(error)
            failure.billed = True
            raise failure from None
        value = _plain(chunk)
        choices = value.get("choices")
        usage = value.get("usage")
        if isinstance(choices, list):
            for choice in choices:
                if choice.get("finish_reason") is not None:
                    self._finished.add(choice.get("index") or 0)
            if usage is not None and all(_empty(choice) for choice in choices):
                value["choices"] = []  # its last usage chunk carries a choice
        return Event(
            b"data: " + orjson.dumps(value), value, None if usage is None else read_usage(usage)
        )


def _plain(answer: Any) -> dict[str, Any]:
    dump = getattr(answer, "model_dump", None)
    value = dump(exclude_none=True) if dump is not None else answer
    if not isinstance(value, dict):
        return {}
    for choice in value.get("choices") or ():
        if isinstance(choice, dict) and "delta" in choice:
            choice.setdefault("finish_reason", None)
    return value


def _empty(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    said = {name: value for name, value in delta.items() if value and name != "role"}
    return not said and choice.get("finish_reason") is None
