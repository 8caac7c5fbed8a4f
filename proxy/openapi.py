"""The OpenAPI document of the API: every door, what it takes, what it gives, how it refuses.

Bodies that belong to OpenAI or Anthropic are described by what the proxy reads of them, and open
for the rest, which goes to the provider as it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 1}
_OPEN: Final = {"type": "object", "additionalProperties": True}
_LIST: Final = {"type": "array", "items": {}}
_NAMES: Final = {"type": "array", "items": _TEXT}


def _object(required: str = "", **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object", "properties": fields}
    return {**made, "required": required.split()} if required else made


_MODEL: Final = {"$ref": "#/components/schemas/Model"}
_SERVICE: Final = {"$ref": "#/components/schemas/ServiceType"}
_MESSAGES: Final = {"type": "array", "items": {"$ref": "#/components/schemas/Message"}}
_EXTENSION: Final = _object(service_type=_SERVICE, conversation=_TEXT, options=_OPEN)
_GENERATED: Final = {"model": _MODEL, "stream": {"type": "boolean"}, "service_type": _SERVICE,
                     "intentd": _EXTENSION}  # fmt: skip
_OWN: Final = {"service_type": _SERVICE, "options": _OPEN}

SCHEMAS: Final[dict[str, dict[str, Any]]] = {
    "Error": _object(
        "error",
        error=_object("message type", message=_TEXT, type=_TEXT,
                      param={"type": ["string", "null"]}, code={"type": ["string", "null"]}),
    ),
    "Metadata": {
        **_object(
            request_id=_TEXT, client_request_id=_TEXT, service_type=_TEXT, model=_TEXT,
            models=_LIST, context=_OPEN, cache=_OPEN, selection=_OPEN, cost=_TEXT,
            cost_nano={"type": "integer"},
            avoided_nano={"type": "integer"}, estimated={"type": "boolean"}, latency_ms=_OPEN,
            policy=_LIST,
        ),
        "additionalProperties": True,
    },
    "Message": {
        **_object("role", role={"enum": ["system", "developer", "user", "assistant", "tool"]},
                  content={"anyOf": [_TEXT, _LIST, {"type": "null"}]}),
        "additionalProperties": True,
    },
    "Answer": _object(id=_TEXT, response=_TEXT, metadata={"$ref": "#/components/schemas/Metadata"}),
}  # fmt: skip

# path: {method: (what it does, body or None)}
PATHS: Final[dict[str, dict[str, tuple[str, dict[str, Any] | None]]]] = {
    "/v1/chat/completions": {
        "post": ("OpenAI's chat, to a model or by a service type; streams as server-sent events.",
                 {**_object("model messages", **_GENERATED, messages=_MESSAGES, max_tokens=_COUNT,
                            n=_COUNT, tools=_LIST, response_format=_OPEN, stream_options=_OPEN),
                  "additionalProperties": True}),
    },
    "/v1/completions": {
        "post": ("OpenAI's completions.",
                 {**_object("model prompt", **_GENERATED, prompt={}, max_tokens=_COUNT),
                  "additionalProperties": True}),
    },
    "/v1/embeddings": {
        "post": ("OpenAI's embeddings.",
                 {**_object("model input", model=_MODEL, input={}), "additionalProperties": True}),
    },
    "/v1/responses": {
        "post": ("OpenAI's responses; stored unless store is false.",
                 _object("model input", **_GENERATED, input={}, instructions=_TEXT, tools=_LIST,
                         tool_choice={}, text=_OPEN, reasoning=_OPEN, max_output_tokens=_COUNT,
                         store={"type": "boolean"}, previous_response_id=_TEXT, conversation={})),
    },
    "/v1/responses/{id}": {
        "get": ("A stored response; /input_items after it: what it answered.", None),
        "delete": ("Forget a stored response.", None),
    },
    "/v1/messages": {
        "post": ("Anthropic's messages; errors in Anthropic's shape.",
                 _object("model messages max_tokens", **_GENERATED, messages=_MESSAGES,
                         max_tokens=_COUNT, system={}, tools=_LIST, tool_choice=_OPEN,
                         stop_sequences=_NAMES)),
    },
    "/v1/messages/count_tokens": {
        "post": ("An estimate of a message's input tokens.",
                 _object("model messages", model=_MODEL, messages=_MESSAGES, system={},
                         tools=_LIST)),
    },
    "/v1/request": {
        "post": ("Answer a prompt by a service type.",
                 _object("prompt service_type", prompt=_TEXT, **_OWN, conversation=_TEXT,
                         system=_TEXT, params=_OPEN, max_tokens=_COUNT)),
    },
    "/v1/regenerate": {
        "post": ("A better answer in place of another.", _object("id", id=_TEXT, **_OWN)),
    },
    "/v1/batch": {
        "post": ("A list of prompts by several models or service types.",
                 _object("prompts", prompts=_LIST, models=_NAMES, service_types=_NAMES,
                         system=_TEXT, params=_OPEN, options=_OPEN, max_tokens=_COUNT,
                         concurrency=_COUNT, stream={"type": "boolean"})),
    },
    "/v1/feedback": {
        "post": ("A word on an answer.",
                 _object("id rating", id=_TEXT, rating={"enum": ["good", "bad"]}, comment=_TEXT)),
    },
    "/v1/models": {"get": ("The models and service types this key may use.", None)},
    "/v1/models/{id}": {"get": ("One of them.", None)},
    "/v1/requests/{id}": {"get": ("What was done for a request, and the feedback on it.", None)},
    "/v1/conversations": {"get": ("This key's conversations; limit and after page them.", None)},
    "/v1/conversations/{id}": {
        "get": ("The messages of a conversation.", None),
        "delete": ("Forget a conversation.", None),
    },
    "/v1/cache": {
        "get": ("Items of this key's cache.", None),
        "put": ("Put an object with its typed keys, or leave the keys to the cache.", _OPEN),
        "post": ("Find objects by keys and filters.", _OPEN),
        "delete": ("Delete by source.", None),
    },
    "/v1/cache/{id}": {
        "get": ("One item.", None),
        "delete": ("Forget an item.", None),
    },
    "/openapi.json": {"get": ("This document.", None)},
}  # fmt: skip

REFUSALS: Final = {
    400: "What is wrong with which field.",
    401: "The key is missing, unknown, revoked or expired.",
    402: "A budget is spent.",
    403: "The key may not use this.",
    404: "There is none.",
    405: "Another method.",
    408: "The body took too long.",
    409: "The conversation went on meanwhile.",
    413: "Larger than the bound.",
    415: "Not a kind of input that a model takes.",
    422: "Refused by the provider.",
    429: "Too many at once, for the key or the provider; Retry-After says how long.",
    499: "The client left.",
    502: "The provider failed.",
    503: "Stopping, no model, or the store is away.",
    504: "The provider took too long.",
}


def openapi_document(version: str, paths: Iterable[str], service_types: Iterable[str]) -> Any:
    """The document of a proxy that has these paths and offers these service types."""
    known, offered = set(paths), sorted(service_types)
    named = {"anyOf": [{"enum": offered}, _TEXT]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "intentd-proxy",
            "version": version,
            "description": "Language-model prompts by service type: " + ", ".join(offered),
        },
        "security": [{"key": []}, {}],
        "paths": {
            path: {method: _operation(path, *told) for method, told in methods.items()}
            for path, methods in PATHS.items()
            if path in known or path.removesuffix("/{id}") in known or path.endswith("/{id}")
        },
        "components": {
            "schemas": {
                **SCHEMAS,
                "Model": {**named, "description": "A model of the pool, or a service type."},
                "ServiceType": named,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, summary: str, body: dict[str, Any] | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer; metadata in `intentd` and in headers X-Intentd-*."},
            **{
                str(status): {
                    "description": why,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
                for status, why in REFUSALS.items()
            },
        },
    }
    if "{id}" in path:
        made["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _TEXT}]
    if body is not None:
        made["requestBody"] = {
            "required": True, "content": {"application/json": {"schema": body}},
        }  # fmt: skip
    return made
