"""What the console's pages show: the API's documents, shaped for the templates."""

from __future__ import annotations

import asyncio
import difflib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from intentd.controller.console import shapes
from intentd.controller.console.render import pretty
from intentd.core.errors import InputError
from intentd.daemons.kit.hub import Member, NoAnswerError

if TYPE_CHECKING:
    from intentd.controller.daemon import Controller

APPLICATIONS: Final = ("flows", "jobs", "prompts")
PAGE: Final = 25
MAX_MEMBERS: Final = 500
MAX_DIFF_LINES: Final = 400
MAX_ASKED: Final = 8  # members asked for one page
JOB_ROWS: Final = 60
FRESH_S: Final = 1.0
MAX_KNOWN: Final = 64
STATES: Final = ("unfinished", "finished", "failed", "cancelled")

Shown = tuple[str, dict[str, Any]]


class Pages:
    """Each method: (template, what it shows)."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._known: dict[str, tuple[float, list[dict[str, Any]]]] = {}

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

    async def flows(self, request: web.Request) -> Shown:
        flows = self._controller.flows
        names = sorted(flows.domains)
        name = request.query.get("domain", names[0] if names else "")
        if not name:
            return "flows.html", {"title": "Flows", "names": [], "domain": None}
        flows.describe(name)  # raises InputError for an unknown one
        return "flows.html", {
            "title": "Flows",
            "names": names[:MAX_MEMBERS],
            "domain": name,
            "about": flows.describe(name),
            "flows": flows.flows(name),
            "sizes": shapes.sizes(flows.domains[name]),
            "time": shapes.where_time_goes(flows.domains[name]),
        }

    async def jobs(self, request: web.Request) -> Shown:
        jobs = self._controller.jobs
        front = jobs.front
        point = _number(request, "point")
        context: dict[str, Any] = {
            "title": "Jobs",
            "jobs": jobs.describe(),
            "held": self._controller.book.hold("jobs"),
            "queues": await self._ask("gpu", "jobs.list", {"limit": JOB_ROWS, **_states(request)}),
            "state": request.query.get("state", ""),
            "front": None,
            "point": None,
        }
        if front is not None:
            shown = jobs.show_front()
            context["front"] = shapes.front(shown)
            if point is not None:
                if point >= len(front.points):
                    raise InputError("point", point, f"0 to {len(front.points) - 1}")
                context["point"] = context["front"]["points"][point]
                body = {"policy": front.points[point]["config"]}
                context["previews"] = await self._ask("gpu", "jobs.preview", body, 20.0)
        return "jobs.html", context

    async def prompts(self, request: web.Request, played: Mapping[str, Any] | None = None) -> Shown:
        """played: what the playground was asked and answered."""
        days = _number(request, "days") or 7
        if days > 366:
            raise InputError("days", days, "1 to 366")
        books = await self._ask("proxy", "prompts.books", {"days": days})
        own = shapes.own_books([row["answer"] for row in books])
        types = sorted({name for row in books for name in row["answer"].get("service_types", ())})
        return "prompts.html", {
            "title": "Prompts",
            "prompts": self._controller.prompts.describe(),
            "days": days,
            "books": books,
            "keepers": [row["member"] for row in books if any(row["answer"] is one for one in own)],
            "spend": shapes.spend(own),
            "types": types,
            "proxies": [row["member"] for row in books if not row["error"]],
            "played": dict(played or {}),
        }

    async def _ask(
        self, role: str, subject: str, body: dict[str, Any], timeout_s: float = 5.0
    ) -> list[dict[str, Any]]:
        """Of each connected member of a role: its name, and its answer or why there is none.

        Pages that many look at ask once in FRESH_S.
        """
        clock = self._controller.kit.clock
        key = json.dumps([role, subject, body], sort_keys=True, default=str)
        at_s, known = self._known.get(key, (-math.inf, []))
        if clock.now() - at_s < FRESH_S:
            return known
        members = [m for m in self._controller.hub.members(role) if m.connected][:MAX_ASKED]

        async def one(member: Member) -> dict[str, Any]:
            row: dict[str, Any] = {"member": member.name, "answer": {}, "error": ""}
            try:
                row["answer"] = await self._controller.hub.ask(
                    member.key, subject, body, timeout_s=timeout_s
                )
            except NoAnswerError as error:
                row["error"] = str(error)
            return row

        rows = list(await asyncio.gather(*(one(member) for member in members)))
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[key] = clock.now(), rows
        return rows

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


def _states(request: web.Request) -> dict[str, Any]:
    state = request.query.get("state", "")
    if state and state not in STATES:
        raise InputError("state", state[:40], ", ".join(STATES))
    return {"state": [state]} if state else {}


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
