"""OpenTelemetry spans of requests and of the calls made for them, in the words of ``gen_ai.*``.

Spans are built when a request is over, from what was measured anyway: nothing happens on the way of
an answer, and without ``tracing.endpoint`` nothing is imported. They hold names, numbers and ids,
never prompts or answers. A ``traceparent`` that comes in is the parent; none goes to providers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from intentd.core.errors import ConfigError
from intentd.proxy.call import Exchange, Step
from intentd.proxy.config import TracingSection
from intentd.proxy.engine import PoolModel

_OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
_NANO: Final = 1_000_000_000


class Tracing:
    """Makes spans and hands them to an exporter, which sends them in a thread of its own.

    exporter: another one than OTLP over HTTP, which then gets each span at once.
    """

    def __init__(
        self, section: TracingSection, name: str, version: str, exporter: Any = None
    ) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise _missing(error) from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        resource = {"service.name": "intentd-proxy", "service.instance.id": name,
                    "service.version": version}  # fmt: skip
        self._provider = TracerProvider(
            resource=Resource.create(resource),
            sampler=ParentBased(TraceIdRatioBased(section.sample)),
        )
        self._provider.add_span_processor(
            SimpleSpanProcessor(exporter)
            if exporter is not None
            else BatchSpanProcessor(_otlp_exporter(section))
        )
        self._tracer = self._provider.get_tracer("intentd.proxy", version)

    def record(self, exchange: Exchange, models: Mapping[str, PoolModel]) -> None:
        """The span of one request that is over, with one a call below it."""
        trace = self._trace
        parent = None
        if exchange.trace_parent:
            parent = self._propagator.extract({"traceparent": exchange.trace_parent})
        begin = int(exchange.wall_s * _NANO)
        span = self._tracer.start_span(
            exchange.path,
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=_request_attributes(exchange),
            start_time=begin,
        )
        inside = trace.set_span_in_context(span)
        for step in exchange.steps:
            start = begin + int((step.started_s - exchange.started_s) * _NANO)
            call = self._tracer.start_span(
                f"{_operation(exchange)} {step.model}",
                context=inside,
                kind=trace.SpanKind.CLIENT,
                attributes=_call_attributes(exchange, step, models.get(step.model)),
                start_time=start,
            )
            if step.outcome != "ok":
                call.set_status(trace.StatusCode.ERROR, step.outcome)
            call.end(start + int(step.seconds * _NANO))
        if exchange.status >= 500 or exchange.outcome.startswith("upstream_"):
            span.set_status(trace.StatusCode.ERROR, exchange.outcome)
        span.end(begin + int(exchange.total_s * _NANO))

    def close(self) -> None:
        """Send what waits; it may take seconds."""
        self._provider.shutdown()


def _otlp_exporter(section: TracingSection) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise _missing(error) from None
    headers = {}
    if section.token_env:
        token = os.environ.get(section.token_env, "")
        if not token:
            raise ConfigError(
                "tracing.token_env", section.token_env, "an environment variable with the token"
            )
        headers["Authorization"] = f"Bearer {token}"
    return OTLPSpanExporter(endpoint=section.endpoint, headers=headers, timeout=10)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        "tracing.endpoint", "set", f"{error.name} installed (pip install 'intentd[proxy-otel]')"
    )


def _operation(exchange: Exchange) -> str:
    return _OPERATIONS.get(exchange.path, "chat")


def _request_attributes(exchange: Exchange) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.route": exchange.path,
        "http.response.status_code": exchange.status,
        "gen_ai.operation.name": _operation(exchange),
        "gen_ai.response.model": exchange.model,
        "intentd.request_id": exchange.request_id,
        "intentd.service_type": exchange.service_type,
        "intentd.outcome": exchange.outcome,
        "intentd.cost_nano": exchange.cost_nano,
        "intentd.key": exchange.key.name,
    }
    if exchange.client_request_id:
        attributes["intentd.client_request_id"] = exchange.client_request_id
    if exchange.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = exchange.first_token_s
    if exchange.trace is not None:
        attributes["intentd.cache"] = exchange.trace.cache
        attributes["intentd.context_messages"] = exchange.trace.context_messages
    if exchange.policy is not None:
        attributes["intentd.policy"] = ".".join(map(str, exchange.policy))
    if exchange.outcome != "ok":
        attributes["error.type"] = exchange.outcome
    return attributes


def _call_attributes(exchange: Exchange, step: Step, model: PoolModel | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _operation(exchange),
        "intentd.purpose": step.purpose,
        "intentd.model": step.model,
        "intentd.cost_nano": step.cost_nano,
        "intentd.estimated": step.estimated,
    }
    if model is not None:
        section = model.upstream.model
        name = model.upstream.upstream_model
        litellm = section.provider == "litellm" and "/" in name
        attributes["gen_ai.provider.name"] = name.partition("/")[0] if litellm else "openai"
        attributes["gen_ai.request.model"] = name
        host = urlsplit(section.base_url).hostname
        if host:
            attributes["server.address"] = host
    if step.usage is not None:
        attributes["gen_ai.usage.input_tokens"] = step.usage.in_tokens
        attributes["gen_ai.usage.output_tokens"] = step.usage.out_tokens
        attributes["gen_ai.usage.cache_read.input_tokens"] = step.usage.cached_in_tokens
    if step.outcome != "ok":
        attributes["error.type"] = step.outcome
    return attributes
