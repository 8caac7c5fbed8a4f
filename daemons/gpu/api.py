"""The scheduler by HTTP, on the status endpoint, under /api/jobs; described by /api/openapi.json.

On loopback reading is free, but what belongs to a user (environment, arguments, output) takes a
token, as every change does: see ``daemons.kit.status``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

import intentd
from intentd.core.errors import InputError
from intentd.core.jobs.demand import MAX_GPUS
from intentd.core.jobs.spec import (
    MAX_ARRAY,
    MAX_COMMAND,
    MAX_GRACE_S,
    MAX_SIZE_GPU_S,
    MAX_TRIALS,
    SIGNALS,
)
from intentd.daemons.gpu.service import (
    MAX_LOG_BYTES,
    MAX_PAGE,
    Caller,
    NotAllowedError,
    Service,
    UnknownJobError,
)
from intentd.daemons.kit.changes import Changes
from intentd.daemons.kit.openapi import TEXT, Operation, document, json_body, number, record
from intentd.daemons.kit.status import CALLER, json_response
from intentd.daemons.kit.store import StoreError
from intentd.daemons.kit.tokens import Role

_JOB: Final = number(0, 2**53)
_LABEL: Final = {"type": "string", "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}$"}
_SECONDS: Final = {"type": "number", "minimum": 0}
_LONG: Final = {**_SECONDS, "maximum": MAX_SIZE_GPU_S}
_TABLE: Final = {
    "type": "object",
    "propertyNames": {"pattern": "^[1-9][0-9]{0,2}$"},
    "additionalProperties": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_SIZE_GPU_S / 1000,
    },
}
# core.jobs.spec says what each means, and refuses what does not fit together.
_JOB_FIELDS: Final[dict[str, Any]] = {
    "name": _LABEL, "owner": _LABEL, "workdir": TEXT,
    "command": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_COMMAND},
    "env": {"type": "object", "additionalProperties": TEXT,
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,255}$"}},
    "labels": {"type": "object", "additionalProperties": TEXT, "propertyNames": _LABEL},
    "min_gpus": number(1, MAX_GPUS), "max_gpus": number(1, MAX_GPUS),
    "demand": {"anyOf": [_TABLE, {"type": "object", "additionalProperties": _TABLE},
                         {"type": "null"}]},
    "gpu_types": {"type": "array", "items": _LABEL}, "size_gpu_s": _LONG, "profile": TEXT,
    "speeds": {"type": "array", "items": _SECONDS}, "trials": number(1, MAX_TRIALS),
    "checkpoint_signal": {"enum": list(SIGNALS)}, "grace_s": {**_SECONDS, "maximum": MAX_GRACE_S},
    "time_limit_s": _LONG, "retries": number(0, 100), "array_index": number(-1, MAX_ARRAY),
    "array": number(0, MAX_ARRAY),
}  # fmt: skip
_LOST: Final = {404: "There is no such job or node.", 507: "The disk refuses: not accepted."}
OPERATIONS: Final = (
    Operation("POST", "/api/jobs", "submit", "Submit a job; array: n submits n of it.",
              body=record("command", **_JOB_FIELDS), status=201, refusals=_LOST),
    Operation("GET", "/api/jobs", "list", "Jobs, newest first.",
              {"state": TEXT, "owner": TEXT, "name": TEXT, "label": TEXT, "before": _JOB,
               "array": _JOB, "limit": number(1, MAX_PAGE)}, refusals=_LOST),
    Operation("POST", "/api/jobs/predict", "predict", "Predict a job without submitting it.",
              body=record("", **_JOB_FIELDS), refusals=_LOST),
    Operation("GET", "/api/jobs/{job}", "show", "One job with its predictions.",
              refusals=_LOST, path_schema=_JOB),
    Operation("DELETE", "/api/jobs/{job}", "cancel", "Cancel a job.",
              refusals=_LOST, path_schema=_JOB),
    Operation("GET", "/api/jobs/{job}/logs", "logs", "A piece of its output. Token.",
              {"offset": number(-(2**53)), "limit": number(1, MAX_LOG_BYTES)},
              refusals=_LOST, path_schema=_JOB),
    Operation("GET", "/api/jobs/{job}/explain", "explain", "Why it is where it is, in numbers.",
              refusals=_LOST, path_schema=_JOB),
    Operation("GET", "/api/events", "events", "Changes of state.",
              {"job": _JOB, "after": _JOB, "limit": number(1, MAX_PAGE)}, refusals=_LOST),
    Operation("GET", "/api/nodes", "nodes", "Nodes and their GPUs.", refusals=_LOST),
    Operation("POST", "/api/nodes/{node}/drain", "drain", "Drain a node.",
              {"evict": {"enum": ["true", "false"]}, "undo": {"enum": ["true", "false"]}},
              refusals=_LOST),
)  # fmt: skip
_NUMBERS: Final = ("job", "limit", "before", "after", "offset", "array")


class Api:
    """service: None until the daemon is up. changes: where those of operators are noted."""

    def __init__(self, service: Callable[[], Service | None], changes: Changes) -> None:
        self._service = service
        self._changes = changes

    def add_routes(self, app: web.Application) -> None:
        for row in OPERATIONS:
            app.router.add_route(row.method, row.path, self._handler(row))
        for path in ("/openapi.json", "/api/openapi.json"):
            app.router.add_get(path, self._openapi)

    def _handler(self, row: Operation) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            service = self._service()
            if service is None:
                return json_response({"error": "starting"}, 503)
            known = request[CALLER]
            caller = Caller(
                known.name, trusted=known.role >= Role.ADMIN, operates=known.role >= Role.OPERATE
            )
            name = row.name
            try:
                for key in request.query:
                    if key not in row.params:
                        taken = ", ".join(row.params) or "nothing"
                        raise InputError(key[:80], request.query[key][:80], f"one of {taken}")
                args: dict[str, Any] = {
                    key: _value(key, value)
                    for key, value in (*request.query.items(), *request.match_info.items())
                }
                if request.can_read_body:
                    args = {**await json_body(request), **args}
                answer = await answer_to(service, name, args, caller)
            except UnknownJobError as error:
                return json_response({"error": str(error)}, 404)
            except NotAllowedError as error:
                return json_response(
                    {"error": f"{error}; a token of that name or of role admin may"}, 403
                )
            except StoreError as error:
                return json_response({"error": str(error)}, 507)
            except InputError as error:
                said = {"error": str(error), "field": error.field, "expected": error.expected}
                return json_response(said, 400)
            if name in ("cancel", "drain"):
                about = str(args.get("job", args.get("node", "")))
                self._changes.add(known.name, "api", f"jobs.{name}", about, "done")
            return json_response(answer, 201 if name == "submit" else 200)

        return handle

    async def _openapi(self, _request: web.Request) -> web.Response:
        return json_response(openapi())


async def answer_to(
    service: Service, name: str, args: dict[str, Any], caller: Caller
) -> dict[str, Any]:
    """One request, by its name in OPERATIONS (what-if is predict). Raises IntentdError."""
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
    raise InputError("command", name, f"one of {', '.join(row.name for row in OPERATIONS)}")


def openapi() -> dict[str, Any]:
    told = "Jobs on GPUs, each with a finish time."
    return document("intentd-gpu", intentd.__version__, told, OPERATIONS)


def _value(key: str, text: str) -> Any:
    if key in _NUMBERS:
        if not re.fullmatch(r"-?[0-9]{1,16}", text):
            raise InputError(key, text[:80], "a whole number")
        return int(text)
    if key == "state":
        return text.split(",")
    if key in ("evict", "undo"):
        if text not in ("true", "false"):
            raise InputError(key, text[:80], "true or false")
        return text == "true"
    return text
