"""The preference interface of section 3.3.2 on the controller's admin socket.

pareto_set: SetPreference. pareto_update, pareto_cancel: UpdateParetoFront. pareto_show: the present
front. pareto_apply: SetWFQConfig. pareto_status: where a search stands.
"""

from __future__ import annotations

from typing import Any

from intentd.controller.config import SEARCH_SETTINGS
from intentd.controller.jobs_app import JobsApplication
from intentd.core.errors import InputError
from intentd.daemons.kit.admin import AdminRefusedError


class JobsAdmin:
    """Commands to calls; an InputError is the caller's fault."""

    def __init__(self, jobs: JobsApplication) -> None:
        self._jobs = jobs

    async def answer(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """One command. Raises InputError, AdminRefusedError for an unknown one."""
        jobs = self._jobs
        match command:
            case "pareto_status":
                only(args)
                return jobs.describe()
            case "pareto_show":
                only(args)
                return jobs.show_front()
            case "pareto_set":
                only(args, "objectives")
                return {"objectives": await jobs.set_preference(args.get("objectives"))}
            case "pareto_update":
                only(args, *SEARCH_SETTINGS)
                return jobs.update_front(args)
            case "pareto_cancel":
                only(args)
                return {"cancelled": jobs.cancel_search()}
            case "pareto_apply":
                only(args, "choice", "config", "preview", "why", "author")
                return await jobs.apply(args, author=author_of(args))
        raise AdminRefusedError(
            f"command {command!r:.80}: unknown to controller", "unknown_command"
        )


def only(args: dict[str, Any], *names: str) -> None:
    for name in args:
        if name not in names:
            raise InputError(f"args.{name:.40}", f"{args[name]!r:.60}", f"one of {list(names)}")


def integer(args: dict[str, Any], name: str, default: int | None) -> int:
    value = args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise InputError(name, value, "a number >= 0")
    return value


def author_of(args: dict[str, Any]) -> str:
    author = args.get("author", "operator")
    if not isinstance(author, str) or not author or len(author) > 128 or author == "automatic":
        raise InputError("author", f"{author!r:.60}", "a name of 1-128 characters")
    return author
