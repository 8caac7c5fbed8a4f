"""Commands of the controller's admin socket, API and console: what each takes, and its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from intentd.controller import flows_app, jobs_app, prompts_app
from intentd.controller.jobs_admin import JobsAdmin, author_of, integer, only
from intentd.controller.jobs_app import JobsApplication
from intentd.core.errors import InputError
from intentd.daemons.kit.admin import AdminRefusedError

if TYPE_CHECKING:
    from intentd.controller.daemon import Controller

APPLICATIONS: Final = (flows_app.APPLICATION, jobs_app.APPLICATION, prompts_app.APPLICATION)
# what goes into the audit log: command -> what of its arguments says what it was about
CHANGES: Final = {
    "policy_set": "document",
    "policy_rollback": "number",
    "policy_release": "application",
    "pareto_set": "objectives",
    "pareto_update": "evaluations",
    "pareto_cancel": "",
    "pareto_apply": "choice",
}
SIGNED: Final = frozenset({"policy_set", "policy_rollback", "pareto_apply"})  # name an author


async def answer(controller: Controller, command: str, args: dict[str, Any]) -> dict[str, Any]:
    """One command. Raises IntentdError."""
    match command:
        case "members":
            only(args)
            return {"members": controller.members()}
        case "domains":
            only(args)
            return controller.domains_page()
        case "flows":
            only(args, "domain")
            return controller.flows_page(args.get("domain"))
        case "policy_list":
            only(args, "limit", "application")
            return controller.policies_page(integer(args, "limit", 20), _application(args))
        case "policy_show":
            only(args, "number", "application")
            number = args.get("number")
            return controller.policy(
                None if number is None else integer(args, "number", 0), _application(args)
            )
        case "policy_set":
            only(args, "document", "author", "application")
            application, timers = controller.applied(_application(args))
            if isinstance(application, JobsApplication):
                raise InputError("application", application.name, "flows or prompts")
            async with timers.lock:
                issued = await application.set_policy(args.get("document"), author=author_of(args))
            return {"issued": None if issued is None else issued.to_plain(whole=False)}
        case "policy_rollback":
            only(args, "number", "author", "application")
            number = integer(args, "number", None)
            application, timers = controller.applied(_application(args))
            async with timers.lock:
                issued = await application.rollback(number, author=author_of(args))
            return {"issued": issued.to_plain(whole=False)}
        case "policy_release":
            only(args, "application")
            application, timers = controller.applied(_application(args))
            async with timers.lock:
                released = await application.release()
            timers.wake()
            return {"released": released}
        case "prompts":
            only(args)
            return controller.prompts.describe()
        case "alarms":
            only(args)
            return {"alarms": controller.alarms()}
        case "audit":
            only(args, "limit", "before")
            return controller.audit_page(integer(args, "limit", 100), integer(args, "before", 0))
    if command.startswith("pareto_"):
        return await JobsAdmin(controller.jobs).answer(command, args)
    raise AdminRefusedError(f"command {command!r:.80}: unknown to controller", "unknown_command")


def _application(args: dict[str, Any]) -> str:
    name = args.get("application", flows_app.APPLICATION)
    if name not in APPLICATIONS:
        raise InputError("application", f"{name!r:.60}", f"one of {', '.join(APPLICATIONS)}")
    return str(name)
