"""The controller's HTTP routes, read only, beside the kit's on the status endpoint.

/api/members, /api/policies, /api/policies/{number}, /api/domains, /api/flows, /api/jobs,
/api/jobs/front, /api/prompts: JSON for programs. Policies take application=jobs or prompts.
/console/... belongs to the operator's console; nothing else may be mounted there.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from aiohttp import web

from intentd.core.errors import InputError
from intentd.daemons.kit.status import json_response

MAX_PAGE: Final = 1000


class Source(Protocol):
    """What the routes show; the controller daemon."""

    def members(self) -> list[dict[str, Any]]: ...

    def policies_page(self, limit: int, application: str = ...) -> dict[str, Any]: ...

    def policy(self, number: int | None, application: str = ...) -> dict[str, Any]: ...

    def jobs_page(self) -> dict[str, Any]: ...

    def front_page(self) -> dict[str, Any]: ...

    def prompts_page(self) -> dict[str, Any]: ...

    def domains_page(self) -> dict[str, Any]: ...

    def flows_page(self, domain: str | None) -> dict[str, Any]: ...


class Api:
    """An InputError becomes 400 by the kit's guard, an unknown policy 404."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/api/members", self._members)
        app.router.add_get("/api/policies", self._policies)
        app.router.add_get("/api/policies/{number:[0-9]{1,15}}", self._policy)
        app.router.add_get("/api/domains", self._domains)
        app.router.add_get("/api/flows", self._flows)
        app.router.add_get("/api/jobs", self._jobs)
        app.router.add_get("/api/jobs/front", self._front)
        app.router.add_get("/api/prompts", self._prompts)

    async def _members(self, _request: web.Request) -> web.Response:
        return json_response({"members": self._source.members()})

    async def _policies(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", "100")
        if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_PAGE:
            raise InputError("limit", text[:20], f"1 to {MAX_PAGE}")
        return json_response(self._source.policies_page(int(text), _application(request)))

    async def _policy(self, request: web.Request) -> web.Response:
        try:
            number = int(request.match_info["number"])
            return json_response(self._source.policy(number, _application(request)))
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


def _application(request: web.Request) -> str:
    name = request.query.get("application", "flows")
    if name not in ("flows", "jobs", "prompts"):
        raise InputError("application", name[:40], "flows, jobs or prompts")
    return name
