"""The scheduler by HTTP, on the status endpoint, under /api/jobs; described by /api/openapi.json.

On loopback reading is free, but what belongs to a user (environment, arguments, output) takes a
token, as every change does: see ``daemons.kit.status``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from intentd.core.errors import InputError
from intentd.daemons.gpu.service import Caller, NotAllowedError, Service, UnknownJobError
from intentd.daemons.kit.status import CALLER, json_response
from intentd.daemons.kit.store import StoreError
from intentd.daemons.kit.tokens import Role

ROUTES: Final = (
    ("POST", "/api/jobs", "submit", "Submit a job; array: n submits n of it."),
    ("GET", "/api/jobs", "list", "Jobs, newest first; state, owner, name, label, before, limit."),
    ("POST", "/api/jobs/predict", "predict", "Predict a job without submitting it."),
    ("GET", "/api/jobs/{job}", "show", "One job with its predictions."),
    ("DELETE", "/api/jobs/{job}", "cancel", "Cancel a job."),
    ("GET", "/api/jobs/{job}/logs", "logs", "A piece of its output; offset, limit. Token."),
    ("GET", "/api/jobs/{job}/explain", "explain", "Why it is where it is, in numbers."),
    ("GET", "/api/events", "events", "Changes of state; job, after, limit."),
    ("GET", "/api/nodes", "nodes", "Nodes and their GPUs."),
    ("POST", "/api/nodes/{node}/drain", "drain", "Drain a node; evict, undo."),
)
_NUMBERS: Final = ("job", "limit", "before", "after", "offset")


class Api:
    """service: None until the daemon is up."""

    def __init__(self, service: Callable[[], Service | None]) -> None:
        self._service = service

    def add_routes(self, app: web.Application) -> None:
        for method, path, name, _ in ROUTES:
            app.router.add_route(method, path, self._handler(name))
        app.router.add_get("/api/openapi.json", self._openapi)

    def _handler(self, name: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            service = self._service()
            if service is None:
                return json_response({"error": "starting"}, 503)
            caller = Caller("", trusted=request[CALLER].role >= Role.OPERATE)
            try:
                args: dict[str, Any] = {
                    key: _value(key, value)
                    for key, value in (*request.query.items(), *request.match_info.items())
                }
                if request.can_read_body:
                    args = {**await _body(request), **args}
                answer = await answer_to(service, name, args, caller)
            except UnknownJobError as error:
                return json_response({"error": str(error)}, 404)
            except NotAllowedError as error:
                return json_response({"error": f"{error}; a token is needed"}, 403)
            except StoreError as error:
                return json_response({"error": str(error)}, 507)
            except InputError as error:
                said = {"error": str(error), "field": error.field, "expected": error.expected}
                return json_response(said, 400)
            return json_response(answer, 201 if name == "submit" else 200)

        return handle

    async def _openapi(self, _request: web.Request) -> web.Response:
        return json_response(openapi())


async def answer_to(
    service: Service, name: str, args: dict[str, Any], caller: Caller
) -> dict[str, Any]:
    """One request, by its name in ROUTES (what-if is predict). Raises IntentdError."""
    match name:
        case "submit":
            return await service.submit(args, caller)
        case "predict" | "what-if":
            return await service.predict(args, caller)
        case "list":
            return await service.list_jobs(args, caller)
        case "show":
            return service.show(args, caller)
        case "cancel":
            return await service.cancel(args, caller)
        case "logs":
            return service.logs(args, caller)
        case "explain":
            return service.explain(args, caller)
        case "events":
            return service.events(args, caller)
        case "nodes":
            return service.nodes()
        case "drain":
            return await service.drain(args, caller)
    raise InputError("command", name, f"one of {', '.join(row[2] for row in ROUTES)}")


def openapi() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for method, path, name, text in ROUTES:
        paths.setdefault(path, {})[method.lower()] = {
            "operationId": name,
            "summary": text,
            "responses": {"201" if name == "submit" else "200": {"description": "JSON"}},
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "intentd-gpu", "version": "1"},
        "paths": paths,
    }


def _value(key: str, text: str) -> Any:
    if key in _NUMBERS:
        try:
            return int(text)
        except ValueError:
            raise InputError(key, text[:80], "a whole number") from None
    if key == "state":
        return text.split(",")
    return text == "true" if key in ("evict", "undo") else text


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise InputError("body", "(text)", "one JSON object") from None
    if not isinstance(body, dict):
        raise InputError("body", type(body).__name__, "one JSON object")
    return body
