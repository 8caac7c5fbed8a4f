"""Many prompts by several models or service types: /v1/batch, the classroom's comparison.

Every pair is a request of its own, with its own id, metadata, budget and place in the request log;
one that fails says so in its place and stops no other. At most `concurrency` are worked on at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from aiohttp import web

from intentd.core.errors import InputError
from intentd.core.prompts.money import format_dollars
from intentd.core.prompts.pipeline import Answer, PipelineError
from intentd.daemons.kit.clock import Clock
from intentd.proxy import native
from intentd.proxy.call import Exchange
from intentd.proxy.config import BatchSection
from intentd.proxy.dialects.openai_chat import MAX_TOKENS, integer, read_object
from intentd.proxy.errors import ApiError, bad_field, from_input_error, no_answer
from intentd.proxy.keys import Key
from intentd.proxy.service import FIXED
from intentd.proxy.streams import answer_headers, json_response

_FIELDS: Final = frozenset(
    {"prompts", "models", "service_types", "system", "params", "options", "max_tokens",
     "concurrency", "stream"}
)  # fmt: skip
_PROMPT_FIELDS: Final = frozenset({"prompt", "system"})


@dataclass(frozen=True, slots=True)
class Cell:
    """One prompt by one model or service type. place: of the prompt."""

    place: int
    model: str
    service_type: str
    body: dict[str, Any]

    def named(self) -> dict[str, Any]:
        target = {"model": self.model} if self.model else {"service_type": self.service_type}
        return {"prompt": self.place, **target}


@dataclass(frozen=True, slots=True)
class BatchRequest:
    cells: tuple[Cell, ...]
    concurrency: int
    stream: bool


@dataclass(slots=True)
class Sums:
    """What one model or service type came to."""

    answered: int = 0
    failed: int = 0
    cost_nano: int = 0
    in_tokens: int = 0
    out_tokens: int = 0
    seconds: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        asked = self.answered + self.failed
        return {
            "answered": self.answered,
            "failed": self.failed,
            "cost_nano": self.cost_nano,
            "cost": format_dollars(self.cost_nano),
            "in_tokens": self.in_tokens,
            "out_tokens": self.out_tokens,
            "mean_ms": round(self.seconds / asked * 1e3, 2) if asked else 0.0,
        }


def read_batch(raw: bytes, section: BatchSection) -> BatchRequest:
    """Raises ApiError naming the field."""
    body = read_object(raw)
    for name in sorted(body):
        if name not in _FIELDS:
            expected = f"one of {', '.join(sorted(_FIELDS))}"
            raise bad_field(name[:64], body[name], expected, code="unknown_field")
    models, types = _names(body, "models"), _names(body, "service_types")
    if not models and not types:
        raise bad_field("models", None, "a list of models, or service_types")
    prompts = body.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise bad_field("prompts", prompts, "a list of prompts")
    targets = [(model, FIXED) for model in models] + [("", name) for name in types]
    if len(prompts) * len(targets) > section.max_requests:
        raise bad_field(
            "prompts", len(prompts) * len(targets), f"at most {section.max_requests} requests"
        )
    integer(body, "max_tokens", 1, MAX_TOKENS)
    shared = {
        name: body[name]
        for name in ("system", "params", "max_tokens")
        if body.get(name) is not None
    }
    options = body.get("options")
    if options is not None and not isinstance(options, dict):
        raise bad_field("options", options, "an object")
    cells = []
    for place, prompt in enumerate(prompts):
        own = _prompt(prompt, f"prompts[{place}]")
        for model, service_type in targets:
            given = {**(options or {}), "model": model} if model else options
            cell = {**shared, **own, "service_type": service_type, "options": given}
            if place == 0:
                native.read_request(orjson.dumps(cell))  # what is wrong with all is said at once
            cells.append(Cell(place, model, service_type, cell))
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise bad_field("stream", stream, "true or false")
    wanted = integer(body, "concurrency", 1, 10_000, default=section.concurrency)
    return BatchRequest(tuple(cells), min(wanted, section.concurrency), stream)


def _names(body: dict[str, Any], field: str) -> list[str]:
    value = body.get(field)
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad_field(field, value, "a list of names")
    for index, name in enumerate(value):
        if not isinstance(name, str) or not 0 < len(name) <= 128 or name in value[:index]:
            raise bad_field(f"{field}[{index}]", name, "a name, each once")
    return value


def _prompt(value: object, where: str) -> dict[str, Any]:
    if isinstance(value, str) and value:
        return {"prompt": value}
    if isinstance(value, dict):
        for name in sorted(value):
            if name not in _PROMPT_FIELDS or not isinstance(value[name], str):
                raise bad_field(f"{where}.{name}"[:96], value[name], "prompt and system, as text")
        if value.get("prompt"):
            return value
    raise bad_field(where, value, "text, or an object with prompt and system")


@dataclass(slots=True)
class Batch:
    """Works one batch off.

    perform: answers by a service type. close: the books of one request. pace: waits for the
    key's request rate.
    """

    asked: BatchRequest
    exchange: Exchange
    clock: Clock
    perform: Callable[[native.Asked, Exchange], Awaitable[Answer]]
    close: Callable[[Exchange], None]
    pace: Callable[[Key], Awaitable[None]]
    _sums: dict[str, Sums] = field(default_factory=dict)

    async def whole(self) -> web.StreamResponse:
        """All results in one document, in the order of the prompts."""
        results: list[Any] = [None] * len(self.asked.cells)

        async def keep(number: int, result: dict[str, Any]) -> None:
            results[number] = result

        await self._work(keep)
        return json_response({"object": "batch", "results": results, **self._end()}, self.exchange)

    async def streamed(self, http: web.BaseRequest) -> web.StreamResponse:
        """A line of JSON a result as it comes; the last one sums up and says ``done``."""
        response = web.StreamResponse(headers=answer_headers(self.exchange))
        response.content_type = "application/x-ndjson"
        await response.prepare(http)
        writing = asyncio.Lock()

        async def send(number: int, result: dict[str, Any]) -> None:
            async with writing:
                await response.write(orjson.dumps({"number": number, **result}) + b"\n")

        await self._work(send)
        await response.write(orjson.dumps({"done": True, **self._end()}) + b"\n")
        await response.write_eof()
        return response

    # -- inside --------------------------------------------------------------------------------

    async def _work(self, take: Callable[[int, dict[str, Any]], Awaitable[None]]) -> None:
        rest = iter(enumerate(self.asked.cells))

        async def worker(todo: Iterable[tuple[int, Cell]]) -> None:
            for number, cell in todo:  # shared: each takes the next one
                await take(number, await self._one(number, cell))

        async with asyncio.TaskGroup() as tasks:
            for place in range(min(self.asked.concurrency, len(self.asked.cells))):
                tasks.create_task(worker(rest), name=f"batch {place}")

    async def _one(self, number: int, cell: Cell) -> dict[str, Any]:
        parent = self.exchange
        await self.pace(parent.key)
        exchange = Exchange(
            f"{parent.request_id}.{number}", parent.key, self.clock.now(), self.clock.wall(),
            client_request_id=parent.client_request_id,
        )  # fmt: skip
        exchange.path = parent.path
        named = {**cell.named(), "id": exchange.request_id}
        error: ApiError | None = None
        text = ""
        try:
            text = (await self.perform(native.read_request(orjson.dumps(cell.body)), exchange)).text
        except ApiError as failure:
            error = failure
        except InputError as failure:
            error = from_input_error(failure)
        except PipelineError as failure:
            error = no_answer(failure, exchange.retry_after_s)
        except asyncio.CancelledError:
            exchange.outcome, exchange.status = "left", 499
            raise
        finally:
            if error is not None:
                exchange.outcome = exchange.outcome or error.outcome
                exchange.status = error.status
            self.close(exchange)
        self._count(cell, exchange, failed=error is not None)
        metadata = exchange.document() if exchange.service_type else None
        if error is not None:
            return {**named, "error": error.document()["error"], "metadata": metadata}
        return {**named, "response": text, "metadata": metadata}

    def _count(self, cell: Cell, exchange: Exchange, *, failed: bool) -> None:
        sums = self._sums.setdefault(cell.model or cell.service_type, Sums())
        sums.failed += failed
        sums.answered += not failed
        sums.cost_nano += exchange.cost_nano
        sums.seconds += exchange.total_s
        for step in exchange.steps:
            if step.usage is not None:
                sums.in_tokens += step.usage.in_tokens
                sums.out_tokens += step.usage.out_tokens

    def _end(self) -> dict[str, Any]:
        cost = sum(sums.cost_nano for sums in self._sums.values())
        return {
            "id": self.exchange.request_id,
            "summary": {name: sums.to_plain() for name, sums in self._sums.items()},
            "cost_nano": cost,
            "cost": format_dollars(cost),
        }
