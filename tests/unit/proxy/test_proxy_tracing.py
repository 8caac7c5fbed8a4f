"""Spans of requests and calls, in the words of OpenTelemetry, without prompts."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.unit.proxy.provider import Script

from intentd.core.errors import ConfigError
from intentd.proxy.config import TracingSection
from intentd.proxy.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def traced(site: Any, **fields: Any) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    proxy = await site.start(**fields)
    proxy.api.tracing = Tracing(TracingSection(), "p", "1", exporter)
    return exporter


async def test_a_request_and_its_calls(site: Any) -> None:
    models = [site.model("m"), site.model("big", price_in="9")]
    exporter = await traced(site, models=models)
    site.provider.words_for = lambda sent: ("9",) if "rate the answer" in str(sent) else ("Hi",)
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
    await site.chat(model="model_selector", headers=headers)
    *calls, request = exporter.get_finished_spans()
    assert request.name == "/v1/chat/completions"
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert request.attributes["intentd.request_id"].startswith("req_")
    assert request.attributes["intentd.client_request_id"] == "mine"
    assert request.attributes["intentd.service_type"] == "model_selector"
    assert request.attributes["http.response.status_code"] == 200
    assert [call.attributes["intentd.purpose"] for call in calls] == ["answer", "verify"]
    for call in calls:
        assert call.name == "chat m"
        assert call.parent.span_id == request.context.span_id
        assert call.attributes["gen_ai.operation.name"] == "chat"
        assert call.attributes["gen_ai.request.model"] == "up-m"
        assert call.attributes["gen_ai.provider.name"] == "openai"
        assert call.attributes["gen_ai.usage.output_tokens"] == 1
        assert call.attributes["server.address"] == "127.0.0.1"
        assert request.start_time <= call.start_time <= call.end_time <= request.end_time + 10**6
    text = json.dumps([json.loads(span.to_json()) for span in (*calls, request)])
    assert "Say hello" not in text


async def test_failures_and_embeddings(site: Any) -> None:
    exporter = await traced(site, upstream={"attempts": 1, "backoff_s": 0.001})
    site.provider.scripts = [Script(status=500)]
    await site.chat()
    call, request = exporter.get_finished_spans()
    assert call.attributes["error.type"] == "status"
    assert request.attributes["error.type"] == "upstream_status"
    assert not request.status.is_ok
    exporter.clear()
    await site.post("/v1/embeddings", {"model": "m", "input": "x"})
    call, _ = exporter.get_finished_spans()
    assert (call.name, call.attributes["gen_ai.operation.name"]) == ("embeddings m", "embeddings")


async def test_nothing_is_sampled_or_asked_for(site: Any) -> None:
    exporter = InMemorySpanExporter()
    proxy = await site.start()
    proxy.api.tracing = Tracing(TracingSection(sample=0), "p", "1", exporter)
    await site.chat()
    assert exporter.get_finished_spans() == ()


async def test_spans_are_sent_and_what_is_missing_is_named(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        Tracing(TracingSection(endpoint="http://127.0.0.1:1/v1/traces", token_env="NONE_SUCH"),
                "p", "1")  # fmt: skip
    assert caught.value.field == "tracing.token_env"
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="proxy-otel"):
        await site.start(tracing={"endpoint": "http://127.0.0.1:1/v1/traces"})
