"""What the console's pages show: the API's documents, shaped for the templates."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from intentd.controller.console.render import pretty
from intentd.core.errors import InputError

if TYPE_CHECKING:
    from intentd.controller.daemon import Controller

APPLICATIONS: Final = ("flows", "jobs", "prompts")
PAGE: Final = 25
MAX_MEMBERS: Final = 500
MAX_DIFF_LINES: Final = 400

Shown = tuple[str, dict[str, Any]]


class Pages:
    """Each method: (template, what it shows)."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def news(self) -> dict[str, Any]:
        """What an open page is told: enough to say whether something is amiss."""
        controller = self._controller
        members = controller.hub.members()
        return {
            "connected": sum(member.connected for member in members),
            "members": len(members),
            "alarms": len(controller.alarms()),
            "policies": controller.hub.policies(),
        }

    async def overview(self, _request: web.Request) -> Shown:
        controller = self._controller
        members = controller.members()
        return "overview.html", {
            "title": "Overview",
            "alarms": controller.alarms(),
            "members": members[:MAX_MEMBERS],
            "more_members": max(0, len(members) - MAX_MEMBERS),
            "policies": [self._newest(name) for name in APPLICATIONS],
            "started_s": controller.kit.clock.wall(),
            "era": controller.book.era,
            "recent": controller.audit.page(5),
        }

    def _newest(self, application: str) -> dict[str, Any]:
        page = self._controller.policies_page(1, application)
        newest = page["policies"][0] if page["policies"] else None
        members = self._controller.hub.members()
        run_by = 0
        if newest is not None:
            pair = [newest["era"], newest["number"]]
            run_by = sum(member.policies.get(application) == pair for member in members)
        return {
            "application": application,
            "newest": newest,
            "held": page["held"],
            "run_by": run_by,
        }

    async def flows(self, _request: web.Request) -> Shown:
        return "flows.html", {"title": "Flows"}

    async def jobs(self, _request: web.Request) -> Shown:
        return "jobs.html", {"title": "Jobs"}

    async def prompts(self, _request: web.Request) -> Shown:
        return "prompts.html", {"title": "Prompts"}

    async def policies(self, request: web.Request) -> Shown:
        name = _application(request.query.get("application", "flows"))
        before = _number(request, "before")
        page = self._controller.policies_page(PAGE + 1, name, before)
        rows = page["policies"]
        return "policies.html", {
            "title": "Policies",
            "application": name,
            "applications": APPLICATIONS,
            "held": page["held"],
            "rows": rows[:PAGE],
            "newest": before is None,
            "older": rows[PAGE - 1]["number"] if len(rows) > PAGE else None,
        }

    async def policy(self, request: web.Request) -> Shown:
        name = _application(request.match_info["application"])
        number = int(request.match_info["number"])
        shown = self._controller.policy(number, name)
        against = _number(request, "against")
        if against is None:
            earlier = self._controller.policies_page(1, name, number)["policies"]
            against = earlier[0]["number"] if earlier else None
        other = None if against is None else self._controller.policy(against, name)
        return "policy.html", {
            "title": f"Policy {shown['era']}.{number} of {name}",
            "application": name,
            "policy": shown,
            "against": against,
            "diff": _difference({} if other is None else other["body"], shown["body"]),
            "in_force": self._controller.policy(None, name)["number"] == number,
        }

    async def audit(self, request: web.Request) -> Shown:
        rows = self._controller.audit.page(PAGE + 1, _number(request, "before") or 0)
        return "audit.html", {
            "title": "Audit",
            "rows": rows[:PAGE],
            "older": rows[PAGE - 1]["id"] if len(rows) > PAGE else None,
        }


def _difference(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of a unified difference: (added, removed, where or same; the line)."""
    lines = difflib.unified_diff(
        pretty(old).splitlines(), pretty(new).splitlines(), "before", "after", lineterm="", n=2
    )
    kinds = {"+": "added", "-": "removed", "@": "where"}
    rows = [(kinds.get(line[:1], "same"), line) for line in list(lines)[2:]]
    if len(rows) > MAX_DIFF_LINES:
        rows = [*rows[:MAX_DIFF_LINES], ("where", f"... {len(rows) - MAX_DIFF_LINES} more lines")]
    return rows


def _application(name: str) -> str:
    if name not in APPLICATIONS:
        raise InputError("application", name[:40], ", ".join(APPLICATIONS))
    return name


def _number(request: web.Request, name: str) -> int | None:
    text = request.query.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise InputError(name, text[:40], "a whole number")
    return int(text)
