"""The controller's JSON API beside the kit's endpoints, described by /openapi.json.

Reading: members, alarms, policies, domains, flows, jobs, prompts, the audit log. Changing, by a
token of role operate: policies, and the Pareto front; each change is on the audit log. The console
lives under /console/.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from aiohttp import web

import intentd
from intentd.core.errors import InputError
from intentd.daemons.kit.openapi import OPEN, TEXT, Operation, document, json_body, number, record
from intentd.daemons.kit.status import CALLER, json_response
from intentd.daemons.kit.store import StoreError

MAX_PAGE: Final = 1000
APPLICATIONS: Final = ("flows", "jobs", "prompts")
_NAME: Final = {"enum": list(APPLICATIONS)}
_SEARCH: Final = record(
    evaluations=number(1, 1_000_000), seconds={"type": "number"}, algorithm=TEXT, space=TEXT,
    samples=number(1, 100), sample_jobs=number(20, 100_000), workers=number(1, 256),
)  # fmt: skip
_UNKNOWN: Final = {404: "There is none."}

READS: Final = (
    Operation("GET", "/api/members", "members", "Members, their policies and their story."),
    Operation("GET", "/api/alarms", "alarms", "What an operator should look at, worst first."),
    Operation("GET", "/api/policies", "policies", "Policies as issued, newest first.",
              {"application": _NAME, "limit": number(1, MAX_PAGE), "before": number()}),
    Operation("GET", "/api/policies/{number}", "policy", "One policy with inputs and content.",
              {"application": _NAME}, refusals=_UNKNOWN, path_schema=number(0, 10**15 - 1)),
    Operation("GET", "/api/domains", "domains", "Link domains: what was learned of each."),
    Operation("GET", "/api/flows", "flows", "Classes, queues and completion times.",
              {"domain": TEXT}),
    Operation("GET", "/api/jobs", "jobs", "Schedulers, search, front and policy."),
    Operation("GET", "/api/jobs/front", "front", "The Pareto front whole.", refusals=_UNKNOWN),
    Operation("GET", "/api/prompts", "prompts", "Service types: cost, savings, quality."),
    Operation("GET", "/api/audit", "audit", "The audit log, newest first.",
              {"limit": number(1, MAX_PAGE), "before": number()}),
    Operation("GET", "/openapi.json", "openapi", "This document."),
)  # fmt: skip
# the name of each is the controller's command (see Controller.change)
CHANGES: Final = (
    Operation("POST", "/api/policies", "policy_set",
              "Say what is wanted of flows or prompts; see intentctl policy set.",
              body=record("document", document=OPEN, application={"enum": ["flows", "prompts"]})),
    Operation("POST", "/api/policies/rollback", "policy_rollback",
              "Issue an old policy's content anew; automatic ones then rest.",
              body=record("number", number=number(), application=_NAME)),
    Operation("POST", "/api/policies/release", "policy_release",
              "Let automatic policies go on.", body=record(application=_NAME)),
    Operation("POST", "/api/jobs/front/objectives", "pareto_set",
              "What the trade-offs are between.", body=record("objectives", objectives=TEXT)),
    Operation("POST", "/api/jobs/front/search", "pareto_update",
              "Search a front now.", body=_SEARCH),
    Operation("POST", "/api/jobs/front/cancel", "pareto_cancel",
              "End a search with what it found.", body=record()),
    Operation("POST", "/api/jobs/front/apply", "pareto_apply",
              "Put a point of the front, or a configuration, in force.",
              body=record(choice=OPEN, config=OPEN, preview={"type": "boolean"}, why=TEXT)),
)  # fmt: skip


class Source(Protocol):
    """What the routes show; the controller daemon."""

    def members(self) -> list[dict[str, Any]]: ...

    def alarms(self) -> list[dict[str, str]]: ...

    def policies_page(
        self, limit: int, application: str = ..., before: int | None = ...
    ) -> dict[str, Any]: ...

    def policy(self, number: int | None, application: str = ...) -> dict[str, Any]: ...

    def jobs_page(self) -> dict[str, Any]: ...

    def front_page(self) -> dict[str, Any]: ...

    def prompts_page(self) -> dict[str, Any]: ...

    def domains_page(self) -> dict[str, Any]: ...

    def flows_page(self, domain: str | None) -> dict[str, Any]: ...

    def audit_page(self, limit: int, before: int) -> dict[str, Any]: ...

    async def change(
        self, command: str, args: dict[str, Any], *, who: str, via: str
    ) -> dict[str, Any]: ...

    async def command(self, command: str, args: dict[str, Any]) -> dict[str, Any]: ...


class Api:
    """An InputError becomes 400 by the kit's guard, an unknown policy or front 404."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def add_routes(self, app: web.Application) -> None:
        for operation in READS:
            path = operation.path.replace("{number}", "{number:[0-9]{1,15}}")
            app.router.add_get(path, getattr(self, f"_{operation.name}"))
        for operation in CHANGES:
            app.router.add_post(operation.path, self._changing(operation.name))

    def _changing(self, command: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def change(request: web.Request) -> web.Response:
            args = await json_body(request)
            if "author" in args:
                raise InputError("author", f"{args['author']!r:.60}", "nothing: the token says who")
            try:
                if args.get("preview"):
                    return json_response(await self._source.command(command, args))
                who = request[CALLER].name
                return json_response(await self._source.change(command, args, who=who, via="api"))
            except StoreError as error:
                return json_response({"error": str(error)}, 503)

        return change

    async def _members(self, _request: web.Request) -> web.Response:
        return json_response({"members": self._source.members()})

    async def _alarms(self, _request: web.Request) -> web.Response:
        return json_response({"alarms": self._source.alarms()})

    async def _policies(self, request: web.Request) -> web.Response:
        limit, before = _number(request, "limit", 100, 1, MAX_PAGE), None
        if "before" in request.query:
            before = _number(request, "before", 0, 0, 2**53)
        return json_response(self._source.policies_page(limit, _application(request), before))

    async def _policy(self, request: web.Request) -> web.Response:
        application = _application(request)
        try:
            return json_response(
                self._source.policy(int(request.match_info["number"]), application)
            )
        except InputError as error:
            return json_response({"error": str(error)}, 404)

    async def _domains(self, _request: web.Request) -> web.Response:
        return json_response(self._source.domains_page())

    async def _flows(self, request: web.Request) -> web.Response:
        return json_response(self._source.flows_page(request.query.get("domain")))

    async def _jobs(self, _request: web.Request) -> web.Response:
        return json_response(self._source.jobs_page())

    async def _prompts(self, _request: web.Request) -> web.Response:
        return json_response(self._source.prompts_page())

    async def _front(self, _request: web.Request) -> web.Response:
        try:
            return json_response(self._source.front_page())
        except InputError as error:
            return json_response({"error": str(error)}, 404)

    async def _audit(self, request: web.Request) -> web.Response:
        limit = _number(request, "limit", 100, 1, MAX_PAGE)
        return json_response(
            self._source.audit_page(limit, _number(request, "before", 0, 0, 2**53))
        )

    async def _openapi(self, _request: web.Request) -> web.Response:
        told = "Members, policies and what they are computed from; changes by token."
        operations = (*READS, *CHANGES)
        return json_response(document("intentd-controller", intentd.__version__, told, operations))


def _application(request: web.Request) -> str:
    name = request.query.get("application", "flows")
    if name not in APPLICATIONS:
        raise InputError("application", name[:40], "flows, jobs or prompts")
    return name


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or not low <= int(text[:20]) <= high:
        raise InputError(name, text[:20], f"{low} to {high}")
    return int(text)
