"""What models can do, what they cost by day, which one keeps a conversation, litellm's faults."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

from intentd.core.errors import ConfigError
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.config import validate
from intentd.proxy.adapter import litellm
from intentd.proxy.adapter.litellm import LitellmUpstream
from intentd.proxy.adapter.native import PriceList, UpstreamError
from intentd.proxy.config import ModelSection, ProxyConfig, UpstreamSection

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


# -- capabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": IMAGE}, "messages"),
    ],
)
async def test_what_a_model_cannot_do_is_refused(
    site: Any, fields: dict[str, Any], param: str
) -> None:
    able = site.model("able", capabilities=["tools", "json", "logprobs", "images"])
    await site.start(models=[site.model("m", capabilities=["words"]), able, site.model("silent")])
    status, answer, _ = await site.chat(**fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert "able: able, silent" in answer["error"]["message"]
    assert site.provider.requests == []
    assert (await site.chat(model="able", **fields))[0] == 200
    assert (await site.chat(model="silent", **fields))[0] == 200
    # a service type passes it by; the cheapest would be m
    _, answer, _ = await site.chat(model="cost", **fields)
    assert answer["intentd"]["model"] == "able"


async def test_fallbacks_must_be_able_too(site: Any) -> None:
    models = [
        site.model("m", fallbacks=["plain", "able"]),
        site.model("plain", capabilities=["words"]),
        site.model("able", capabilities=["tools"]),
    ]
    await site.start(models=models)
    site.provider.scripts = [Script(status=500)]
    assert (await site.chat(tools=[TOOL]))[1]["intentd"]["model"] == "able"


async def test_nobody_is_able(site: Any) -> None:
    await site.start(models=[site.model("m", capabilities=["words"])])
    status, answer, _ = await site.chat(model="cost", tools=[TOOL])
    assert (status, answer["error"]["param"]) == (400, "model")
    assert "tools" in answer["error"]["message"]
    status, answer, _ = await site.post("/v1/embeddings", {"model": "m", "input": "x"})
    assert (status, answer["error"]["param"]) == (400, "input")


# -- prices by day ---------------------------------------------------------------------------------


def day_s(day: str) -> float:
    return datetime.datetime.fromisoformat(f"{day}T12:00:00+00:00").timestamp()


def section(**fields: Any) -> ModelSection:
    given = {"models": [{"name": "m", "base_url": "http://x/v1", **fields}]}
    return validate(ProxyConfig, given).models[0]


def test_prices_hold_from_their_day() -> None:
    later = [
        {"since": "2026-03-01", "price_in": "2", "price_out": "4"},
        {"since": "2026-06-01", "price_in": "3", "price_out": "6", "price_cached_in": "0.3"},
    ]
    model = section(price_in="1", price_out="2", prices=later)
    assert [price.in_nano // 10**9 for price in model.history()] == [1, 2, 3]
    for day, dollars in (("2026-02-28", 1), ("2026-03-01", 2), ("2026-12-01", 3)):
        clock = ManualClock(wall_s=day_s(day))
        assert PriceList(model.history(), clock).today().in_nano == dollars * 10**9
        assert model.spec(day).price.in_nano == dollars * 10**9
    clock = ManualClock(wall_s=day_s("2026-05-31"))
    prices = PriceList(model.history(), clock)
    assert prices.today().in_nano == 2 * 10**9
    clock.advance(86400)
    assert (prices.today().in_nano, prices.today().cached_in_nano) == (3 * 10**9, 3 * 10**8)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prices": [{"since": "soon", "price_in": "1", "price_out": "1"}]},
         "models[0].prices[0].since"),
        ({"prices": [{"since": "2026-01-01", "price_in": "x", "price_out": "1"}]},
         "models[0].prices[0].price_in"),
        ({"prices": [{"since": day, "price_in": "1", "price_out": "1"}
                     for day in ("2026-02-01", "2026-01-01")]}, "models[0].prices[1].since"),
        ({"params": {"api_version": "1"}}, "models[0].params"),
        ({"base_url": ""}, "models[0].base_url"),
        ({"provider": "elsewhere"}, "models[0].provider"),
    ],
)  # fmt: skip
def test_wrong_models_are_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**fields)
    assert caught.value.field == path


# -- staying with a model --------------------------------------------------------------------------


async def test_a_conversation_stays_where_it_is_held(site: Any) -> None:
    models = [
        site.model("cheap", price_in="3", price_out="3"),
        site.model("dear", price_in="10", price_out="10", price_cached_in="1"),
    ]
    plain = {
        "name": "thrifty",
        "stages": [{"context": "all"}, {"model": "one", "models": {"order": "cheapest"}}],
    }
    await site.start(models=models, service_types=[plain])
    history = [{"role": "user", "content": "word " * 6000}]
    first = {"intentd": {"options": {"model": "dear"}}, "model": "thrifty"}
    _, answer, _ = await site.chat(messages=history, **first)
    assert answer["intentd"]["model"] == "dear"
    history += [
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "more"},
    ]
    _, answer, _ = await site.chat(messages=history, model="thrifty")
    assert answer["intentd"]["model"] == "dear"
    notes = answer["intentd"]["context"]["decisions"]
    assert any("stays with dear" in note for note in notes)
    # Another beginning is held by nobody; and what is held is forgotten.
    other = [{"role": "user", "content": "else"}, *history[1:]]
    assert (await site.chat(messages=other, model="thrifty"))[1]["intentd"]["model"] == "cheap"
    site.proxy.api.driver.warmth.keep_s = 0.0
    assert (await site.chat(messages=history, model="thrifty"))[1]["intentd"]["model"] == "cheap"


# -- litellm, played by a stand-in -----------------------------------------------------------------


class FaultError(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__("said by the provider")
        self.status_code = status
        self.litellm_response_headers = headers


class Chunk:
    def __init__(self, **value: Any) -> None:
        self.value = value

    def model_dump(self, **_options: Any) -> dict[str, Any]:
        return self.value


class Library:
    """What of litellm is used."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.asked: dict[str, Any] = {}

    async def acompletion(self, **given: Any) -> Any:
        self.asked = given
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def upstream(**fields: Any) -> LitellmUpstream:
    model = section(provider="litellm", upstream_model="x/y", **{"base_url": "", **fields})
    limits = UpstreamSection(first_token_timeout_s=5, idle_timeout_s=0.05)
    return LitellmUpstream(model, limits, "secret", ManualClock())


async def chunks(*values: dict[str, Any], then: Exception | None = None) -> AsyncIterator[Chunk]:
    for value in values:
        yield Chunk(**value)
    if then is not None:
        raise then


@pytest.mark.parametrize(
    ("fault", "kind", "billed", "wait_s"),
    [
        (FaultError(429, {"retry-after": "7"}), "rate_limited", False, 7.0),
        (FaultError(429), "rate_limited", False, 0.0),
        (FaultError(400), "request", False, 0.0),
        (FaultError(401), "status", False, 0.0),
        (FaultError(503), "status", False, 0.0),
        (FaultError(504), "timeout", True, 0.0),
        (ValueError("a fault of its own"), "cut", True, 0.0),
    ],
)
async def test_litellms_faults_by_status(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, kind: str, billed: bool, wait_s: float
) -> None:
    monkeypatch.setattr(litellm, "_library", Library(fault))
    with pytest.raises(UpstreamError) as caught:
        await upstream().call("/chat/completions", b'{"messages": []}', budget_s=5)
    error = caught.value
    assert (error.kind, error.billed, error.retry_after_s) == (kind, billed, wait_s)
    assert "secret" not in str(error)


async def test_a_client_sets_nothing_of_litellms(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(Chunk(choices=[]))
    monkeypatch.setattr(litellm, "_library", library)
    made = upstream(params={"api_version": "2"})
    with pytest.raises(UpstreamError, match="aws_access_key_id"):
        await made.call("/chat/completions", b'{"aws_access_key_id": "x"}', budget_s=5)
    assert library.asked == {}
    await made.call("/chat/completions", b'{"model": "m", "temperature": 0}', budget_s=5)
    assert library.asked == {
        "model": "x/y", "temperature": 0, "api_key": "secret", "api_version": "2", "timeout": 5,
        "num_retries": 0, "max_retries": 0,
    }  # fmt: skip


DELTA = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {
    "choices": [{"index": 0, "delta": {"role": "assistant"}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


async def read_all(made: LitellmUpstream) -> list[Any]:
    events = []
    async with made.stream("/chat/completions", b'{"stream": true}', budget_s=5) as stream:
        while got := await stream.read():
            events += got
    return events


async def test_a_stream_of_litellms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litellm, "_library", Library(chunks(DELTA, STOP, USAGE)))
    events = await read_all(upstream())
    assert [event.value and event.value["choices"] for event in events][2:] == [[], None]
    assert events[2].usage.in_tokens == 3


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (lambda: chunks(DELTA), "cut"),
        (lambda: chunks(DELTA, then=FaultError(500)), "status"),
        (lambda: chunks(DELTA, then=ValueError()), "cut"),
    ],
)
async def test_a_stream_that_ends_early_is_cut(
    monkeypatch: pytest.MonkeyPatch, source: Any, kind: str
) -> None:
    monkeypatch.setattr(litellm, "_library", Library(source()))
    with pytest.raises(UpstreamError) as caught:
        await read_all(upstream())
    assert (caught.value.kind, caught.value.billed) == (kind, True)


async def test_a_silent_stream_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> AsyncIterator[Chunk]:
        yield Chunk(**DELTA)
        await asyncio.Event().wait()

    monkeypatch.setattr(litellm, "_library", Library(silent()))
    with pytest.raises(UpstreamError) as caught:
        await read_all(upstream())
    assert caught.value.kind == "timeout"
