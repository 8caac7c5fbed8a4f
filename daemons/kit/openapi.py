"""OpenAPI 3.1 documents of JSON APIs, from one table of operations each; and bodies as they say.

Every operation may be refused in the ways of the endpoint itself (``daemons.kit.status``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from intentd.core.errors import InputError

TEXT: Final = {"type": "string"}
OPEN: Final = {"type": "object", "additionalProperties": True}
ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
    "additionalProperties": True,
}
REFUSALS: Final = {
    400: "What is wrong with which field.",
    401: "Needs Authorization: Bearer TOKEN.",
    403: "The token's role does not suffice, or none is configured.",
    421: "The Host header names another site.",
    503: "Starting, or the store is away.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of an API. name: its operationId. params: query parameter -> schema; those in the
    path are found there, whole numbers where path_schema says so. body: schema, None for none.
    refusals: status -> why, beside REFUSALS."""

    method: str
    path: str
    name: str
    summary: str
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    refusals: Mapping[int, str] = field(default_factory=dict)
    status: int = 200
    path_schema: Mapping[str, Any] = field(default_factory=lambda: TEXT)
    required: Sequence[str] = ()


def number(low: int = 0, high: int = 2**53) -> dict[str, Any]:
    """The schema of a whole number."""
    return {"type": "integer", "minimum": low, "maximum": high}


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    """The schema of an object without other fields. required: names, separated by spaces."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def document(
    title: str, version: str, description: str, operations: Sequence[Operation]
) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": description},
        "security": [{"token": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": dict(operation.path_schema)}
            for name in re.findall(r"{([a-z]+)}", operation.path)
        ]
        + [
            {"name": name, "in": "query", "required": name in operation.required, "schema": schema}
            for name, schema in operation.params.items()
        ],
        "responses": {
            str(operation.status): {
                "description": "Done.",
                "content": {"application/json": {"schema": OPEN}},
            },
            **{
                str(status): {
                    "description": why,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
                for status, why in sorted({**REFUSALS, **operation.refusals}.items())
            },
        },
    }
    if operation.body is not None:
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": operation.body}},
        }
    return found


async def json_body(request: web.Request) -> dict[str, Any]:
    """The body as one JSON object. Raises InputError."""
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise InputError("body", "(text)", "one JSON object") from None
    if not isinstance(body, dict):
        raise InputError("body", type(body).__name__, "one JSON object")
    return body
