"""The operator's console: pages under /console/, rendered here and readable without JavaScript.

Reading follows the rules of the endpoint (``daemons.kit.status``): free on loopback, else by token
or session. Changing takes a session of role operate, and each form its session's own value and the
Origin of this site.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from intentd.controller.audit import Entry
from intentd.controller.console.live import Live
from intentd.controller.console.pages import Pages
from intentd.controller.console.render import HEADERS, STATIC, VENDORED, environment
from intentd.controller.console.sessions import Guesses, Session, Sessions
from intentd.core.errors import InputError, IntentdError, NotLeadingError
from intentd.daemons.kit.hub import NoAnswerError
from intentd.daemons.kit.status import CALLER, DOOR, SAFE_METHODS, Caller, Door
from intentd.daemons.kit.tokens import Role

if TYPE_CHECKING:
    from intentd.controller.daemon import Controller

BASE: Final = "/console/"
COOKIE: Final = "intentd-session"
OPEN: Final = frozenset({BASE + "login", BASE + "logout"})
PAGES: Final = (
    ("", "Overview"),
    ("flows", "Flows"),
    ("jobs", "Jobs"),
    ("prompts", "Prompts"),
    ("policies", "Policies"),
    ("audit", "Audit"),
)
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MAX_TOKEN: Final = 256
MAX_PROMPT: Final = 20_000
PLAY_TIMEOUT_S: Final = 120.0

Page = Callable[[web.Request], Awaitable[tuple[str, dict[str, Any]]]]
Action = Callable[[Mapping[str, str], str], Awaitable[str]]


class Console:
    """One a controller. What it shows is the API's; what it changes goes the audited way."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._pages = Pages(controller)
        self._templates = environment()
        self._live = Live(self._pages.news)
        self._door: Door | None = None
        self.sessions: Sessions | None = None
        self._guesses = Guesses(controller.kit.clock.now)
        self._flash: dict[str, tuple[str, str]] = {}  # csrf value -> (kind, text) for the next page

    def add_routes(self, app: web.Application) -> None:
        door = self._door = app[DOOR]
        self.sessions = Sessions(door.book, self._controller.kit.clock.wall)
        self._controller.sessions = self.sessions
        door.identify = self._identify
        door.open_path = lambda path: path in OPEN or path.startswith(BASE + "static/")
        door.on_refused = self._refused
        app.on_shutdown.append(self._live.stop)
        router = app.router
        router.add_get("/", self._front_door)
        router.add_get("/console", self._front_door)
        pages = self._pages
        for path, page in (
            ("", pages.overview),
            ("flows", pages.flows),
            ("jobs", pages.jobs),
            ("prompts", pages.prompts),
            ("policies", pages.policies),
            ("policies/{application:flows|jobs|prompts}/{number:[0-9]{1,15}}", pages.policy),
            ("audit", pages.audit),
        ):
            router.add_get(BASE + path, self._page(page))
        router.add_get(BASE + "login", self._login_form)
        router.add_post(BASE + "login", self._login)
        router.add_post(BASE + "logout", self._logout)
        router.add_get(BASE + "events", self._events)
        router.add_get(BASE + "static/{name:[A-Za-z.-]+}", self._static)
        router.add_get(BASE + "static/vendor/{name:[A-Za-z.-]+}", self._static)
        for path, back, action in (
            ("policies/rollback", "policies", self._rollback),
            ("policies/release", "policies", self._release),
            ("jobs/apply", "jobs", self._apply),
            ("jobs/search", "jobs", self._search),
            ("jobs/cancel", "jobs", self._cancel),
            ("prompts/intent", "prompts", self._intent),
        ):
            router.add_post(BASE + path, self._form(action, back))
        router.add_post(BASE + "prompts", self._play)

    # -- who -----------------------------------------------------------------------------------

    def _session(self, request: web.Request) -> tuple[Session, Role, str] | None:
        cookie = request.cookies.get(COOKIE, "")
        if not cookie or self.sessions is None:
            return None
        found = self.sessions.find(cookie)
        return None if found is None else (found[0], found[1].role, found[1].name)

    async def _identify(self, request: web.Request) -> Caller | None:
        """By session; one changes things by the console's forms alone, which are checked there."""
        if request.method not in SAFE_METHODS and not request.path.startswith(BASE):
            return None
        found = self._session(request)
        return None if found is None else Caller(found[2], found[1], "console")

    def _refused(self, request: web.Request, answer: web.Response) -> web.StreamResponse | None:
        """A browser is sent to the login; one that is logged in is told why not."""
        if not request.path.startswith(BASE) or answer.status not in (401, 403):
            return None
        if self._session(request) is not None:
            return self._render(request, "error.html", {"text": "Your token may not do that."}, 403)
        if request.path == BASE + "events":
            return answer
        wanted = request.path_qs if request.method in SAFE_METHODS else BASE
        where = BASE + "login?" + urllib.parse.urlencode({"next": wanted})
        return web.Response(status=303, headers={"Location": where})

    def _checked_origin(self, request: web.Request) -> bool:
        assert self._door is not None
        origin = request.headers.get("Origin", "")
        return origin in self._door.origins(request)

    # -- pages ---------------------------------------------------------------------------------

    def _page(self, page: Page) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def show(request: web.Request) -> web.StreamResponse:
            try:
                template, context = await page(request)
            except NotLeadingError as error:  # a standby of the pair
                return self._render(request, "error.html", {"text": str(error)}, 503)
            except InputError as error:
                return self._render(request, "error.html", {"text": str(error)}, 400)
            return self._render(request, template, context)

        return show

    def _render(
        self, request: web.Request, template: str, context: dict[str, Any], status: int = 200
    ) -> web.Response:
        found = self._session(request)
        role = found[1] if found is not None else request[CALLER].role
        csrf = found[0].csrf if found is not None else ""
        text = self._templates.get_template(template).render(
            base=BASE,
            pages=PAGES,
            here=request.path.removeprefix(BASE).partition("/")[0],
            name=self._controller.config.name,
            user=found[2] if found is not None else "",
            role=role.word,
            operates=found is not None and role >= Role.OPERATE,
            csrf=csrf,
            flash=self._flash.pop(csrf, None) if csrf else None,
            now_s=self._controller.kit.clock.wall(),
            charts=(VENDORED / "uPlot.iife.min.js").exists(),
            **context,
        )
        return web.Response(
            text=text,
            status=status,
            content_type="text/html",
            headers={**HEADERS, "Cache-Control": "no-store"},
        )

    async def _front_door(self, _request: web.Request) -> web.Response:
        return web.Response(status=303, headers={"Location": BASE})

    async def _static(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        folder = VENDORED if "/vendor/" in request.path else STATIC
        path = folder / name
        kind = _TYPES.get(path.suffix)
        if kind is None or name.startswith(".") or not path.is_file():
            raise web.HTTPNotFound(reason="no such file")
        headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"}
        return web.FileResponse(path, headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        door = self._door
        assert door is not None

        async def permitted(request: web.Request) -> bool:
            return (await door.caller(request)).role >= Role.READ

        return await self._live.serve(request, permitted)

    # -- login ---------------------------------------------------------------------------------

    async def _login_form(self, request: web.Request) -> web.Response:
        wanted = _own_path(request.query.get("next", BASE))
        return self._render(request, "login.html", {"wanted": wanted, "error": ""})

    async def _login(self, request: web.Request) -> web.Response:
        assert self.sessions is not None
        assert self._door is not None
        if not self._checked_origin(request):
            return self._render(request, "error.html", {"text": "Origin: not this site."}, 403)
        address = request.remote or ""
        form = await request.post()
        wanted = _own_path(str(form.get("next", BASE)))
        wait_s = self._guesses.wait_s(address)
        if wait_s:
            text = f"Too many wrong tokens: try again in {wait_s:.0f} s."
            answer = self._render(request, "login.html", {"wanted": wanted, "error": text}, 429)
            answer.headers["Retry-After"] = str(int(wait_s) + 1)
            return answer
        token = self._door.book.find(str(form.get("token", ""))[:MAX_TOKEN].strip())
        if token is None:
            self._guesses.wrong(address)
            await self._controller.record(
                Entry("?", "console", "login", address, result="refused: unknown token")
            )
            text = "This token is not known, was revoked or has expired."
            return self._render(request, "login.html", {"wanted": wanted, "error": text}, 403)
        self._guesses.right(address)
        await self._controller.record(Entry(token.name, "console", "login", address))
        cookie = self.sessions.open(token)
        await self._controller.keep_sessions()
        answer = web.Response(status=303, headers={"Location": wanted})
        answer.set_cookie(
            COOKIE, cookie, path=BASE, httponly=True, samesite="Strict",
            secure=self._door.secure,
        )  # fmt: skip
        return answer

    async def _logout(self, request: web.Request) -> web.Response:
        found = self._session(request)
        form = await request.post()
        if found is not None:
            genuine = Sessions.same(found[0], str(form.get("csrf", "")))
            if not genuine or not self._checked_origin(request):
                return self._render(request, "error.html", {"text": "Not a form of ours."}, 403)
            assert self.sessions is not None
            self.sessions.close(request.cookies.get(COOKIE, ""))
            await self._controller.keep_sessions()
        answer = web.Response(status=303, headers={"Location": BASE})
        answer.del_cookie(COOKIE, path=BASE)
        return answer

    # -- changes -------------------------------------------------------------------------------

    def _form(
        self, action: Action, back: str
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """One change by a form: checked, made, told on the page that follows."""

        async def handle(request: web.Request) -> web.StreamResponse:
            checked = await self._checked_form(request)
            if isinstance(checked, web.Response):
                return checked
            form, session, who = checked
            try:
                self._flash[session.csrf] = ("done", await action(form, who))
            except IntentdError as error:
                self._flash[session.csrf] = ("error", str(error))
            if len(self._flash) > 1024:
                self._flash.clear()
            where = _own_path(form.get("back", BASE + back))
            return web.Response(status=303, headers={"Location": where})

        return handle

    async def _checked_form(
        self, request: web.Request
    ) -> web.Response | tuple[dict[str, str], Session, str]:
        """The form's fields, its session, and the name of the session's token; else a refusal."""
        found = self._session(request)
        if found is None:  # a bearer token uses the API
            return web.Response(status=303, headers={"Location": BASE + "login"})
        form = {key: str(value) for key, value in (await request.post()).items()}
        genuine = Sessions.same(found[0], form.pop("csrf", ""))
        if not genuine or not self._checked_origin(request):
            return self._render(request, "error.html", {"text": "Not a form of ours."}, 403)
        return form, found[0], found[2]

    async def _rollback(self, form: Mapping[str, str], who: str) -> str:
        args = {"application": form.get("application", ""), "number": _integer(form, "number")}
        answer = await self._controller.change("policy_rollback", args, who=who, via="console")
        issued = answer["issued"]
        return (
            f"Issued policy {issued['era']}.{issued['number']}: {issued['reason']}. "
            "Automatic policies rest until they are released."
        )

    async def _release(self, form: Mapping[str, str], who: str) -> str:
        args = {"application": form.get("application", "")}
        answer = await self._controller.change("policy_release", args, who=who, via="console")
        return "Automatic policies go on." if answer["released"] else "Nothing was held."

    async def _apply(self, form: Mapping[str, str], who: str) -> str:
        front = self._controller.jobs.front
        if front is None or str(front.number) != form.get("front"):
            raise InputError("front", form.get("front", ""), "the present front: look again")
        choice = {"index": _integer(form, "point")}
        answer = await self._controller.change(
            "pareto_apply", {"choice": choice}, who=who, via="console"
        )
        issued = answer["issued"]
        return f"Issued policy {issued['era']}.{issued['number']}: {issued['reason']}."

    async def _search(self, _form: Mapping[str, str], who: str) -> str:
        await self._controller.change("pareto_update", {}, who=who, via="console")
        return "A search began."

    async def _cancel(self, _form: Mapping[str, str], who: str) -> str:
        answer = await self._controller.change("pareto_cancel", {}, who=who, via="console")
        return "The search ends with what it found." if answer["cancelled"] else "No search runs."

    async def _intent(self, form: Mapping[str, str], who: str) -> str:
        document: dict[str, Any] = {"service_type": form.get("service_type", "")}
        if form.get("quality"):
            document["quality"] = _decimal(form, "quality")
        if form.get("daily"):
            document["daily"] = form["daily"][:40]
        if len(document) == 1:
            document["reset"] = True
        args = {"document": document, "application": "prompts"}
        answer = await self._controller.change("policy_set", args, who=who, via="console")
        issued = answer["issued"]
        return "Taken; nothing changes yet." if issued is None else f"Issued {issued['number']}."

    async def _play(self, request: web.Request) -> web.StreamResponse:
        """The playground: a prompt by a service type, or a better answer to it."""
        checked = await self._checked_form(request)
        if isinstance(checked, web.Response):
            return checked
        form, _, who = checked
        again = bool(form.get("regenerate"))
        played: dict[str, Any] = {
            "prompt": form.get("prompt", "")[:MAX_PROMPT],
            "service_type": form.get("service_type", "")[:128],
            "proxy": form.get("proxy", "")[:128],
            "answer": None,
            "error": "",
        }
        body = (
            {"id": form["regenerate"][:128]}
            if again
            else {"prompt": played["prompt"], "service_type": played["service_type"]}
        )
        subject = "prompts.regenerate" if again else "prompts.ask"
        try:
            played["answer"] = await self._controller.hub.ask(
                ("proxy", played["proxy"]), subject, body, timeout_s=PLAY_TIMEOUT_S
            )
        except (NoAnswerError, NotLeadingError) as error:
            played["error"] = str(error)
        about = f"{played['proxy']}: {played['service_type']}"
        result = f"refused: {played['error']}" if played["error"] else "done"
        await self._controller.record(Entry(who, "console", subject, about, result=result))
        try:
            template, context = await self._pages.prompts(request, played)
        except NotLeadingError as error:
            return self._render(request, "error.html", {"text": str(error)}, 503)
        return self._render(request, template, context, 200 if played["answer"] else 502)


def _decimal(form: Mapping[str, str], name: str) -> float:
    try:
        value = float(form[name])
    except ValueError:
        raise InputError(name, form[name][:40], "a number") from None
    if not math.isfinite(value):
        raise InputError(name, form[name][:40], "a number")
    return value


def _integer(form: Mapping[str, str], name: str) -> int:
    text = form.get(name, "")
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise InputError(name, text[:40], "a whole number")
    return int(text)


def _own_path(text: str) -> str:
    """Where to go next: a page of the console, whatever was asked."""
    ours = text.startswith(BASE) and text.isprintable() and text.isascii() and len(text) < 2000
    return text if ours and "\\" not in text else BASE
