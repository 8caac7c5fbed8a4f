"""The HTTP endpoint of every daemon: /livez, /readyz, /status and /metrics; roles add routes.

On loopback reading is free; changing anything needs a token of role operate (see ``tokens``), and
off loopback reading needs one too. A request to a loopback address must also name one in its Host
header: a web page elsewhere whose name is made to point here would otherwise read it (DNS
rebinding).
"""

from __future__ import annotations

import errno
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from intentd.core.errors import IntentdError, NotLeadingError
from intentd.daemons.kit.config import StatusSection, is_loopback, split_address
from intentd.daemons.kit.held import Held
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.systemd import Notifier
from intentd.daemons.kit.tokens import Role, TokenBook

_log = logging.getLogger(__name__)

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})  # for probes that carry no token
MAX_BODY_BYTES: Final = 4 << 20
SOCKET_NAME: Final = "status"

_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. name: of the token; "" when reading is free. via: api or console."""

    name: str
    role: Role
    via: str = "api"


class Door:
    """Who is let in, for the guard and for roles that serve more (the console).

    identify: a role's own way to know a request that carries no token (a session), tried before
    reading on loopback is granted. on_refused: its own answer in place of 401 and 403. open_path:
    paths that need nobody.
    """

    def __init__(self, book: TokenBook, section: StatusSection, host: str) -> None:
        self.book = book
        self.section = section
        self.loopback = is_loopback(host)
        self.open_path: Callable[[str], bool] = lambda _path: False
        self.identify: Callable[[web.Request], Awaitable[Caller | None]] | None = None
        self.on_refused: Callable[[web.Request, web.Response], web.StreamResponse | None] = (
            lambda _request, _answer: None
        )

    @property
    def secure(self) -> bool:
        """Whether browsers come by TLS: ours, or that of a reverse proxy."""
        return bool(self.section.tls_cert_file) or self.section.origin.startswith("https://")

    def origins(self, request: web.Request) -> tuple[str, ...]:
        """What a browser on one of our pages gives as Origin."""
        own = f"{'https' if self.section.tls_cert_file else 'http'}://{request.host}"
        return (own, self.section.origin) if self.section.origin else (own,)

    def misdirected(self, request: web.Request) -> bool:
        host = request.host
        if not self.loopback or host == self.section.origin.partition("://")[2]:
            return False
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return not is_loopback(name.removeprefix("[").removesuffix("]").lower())

    async def caller(self, request: web.Request) -> Caller:
        header = request.headers.get("Authorization", "")
        if header:
            token = self.book.from_header(header)
            if token is not None:
                return Caller(token.name, token.role)
        elif self.identify is not None:
            known = await self.identify(request)
            if known is not None:
                return known
        return Caller("", Role.READ if self.loopback else Role.NONE)


DOOR: Final = web.AppKey("door", Door)
CALLER: Final = web.RequestKey("caller", Caller)


def require(request: web.Request, role: Role) -> Caller:
    """The caller, who has this role. Raises HTTPForbidden."""
    caller = request[CALLER]
    if caller.role < role:
        raise web.HTTPForbidden(reason=f"a token of role {role.word} is needed")
    return caller


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(value, default=str) + "\n", content_type="application/json", status=status
    )


class StatusServer:
    """status: the whole document. unready: reasons, empty when ready. book: the tokens. held:
    keeps the socket."""

    def __init__(
        self,
        bind: str,
        book: TokenBook,
        metrics: Metrics,
        *,
        status: Callable[[], dict[str, Any]],
        unready: Callable[[], list[str]],
        section: StatusSection | None = None,
        held: Held | None = None,
    ) -> None:
        self._held = held or Held(Notifier())
        self._host, self._port = split_address(bind, "status.bind")
        self._bind = bind
        self._metrics = metrics
        self._status = status
        self._unready = unready
        self.door = Door(book, section or StatusSection(), self._host)
        if not self.door.loopback and not len(book):
            raise IntentdError(
                f"status.bind: got {bind}, expected a loopback address, or status.tokens set"
            )
        self.app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        self.app[DOOR] = self.door
        self.app.router.add_get("/livez", self._livez)
        self.app.router.add_get("/readyz", self._readyz)
        self.app.router.add_get("/status", self._status_document)
        self.app.router.add_get("/metrics", self._render_metrics)
        self._runner: web.AppRunner | None = None
        self.address = ""

    def set_tokens(self, tokens: Sequence[str]) -> None:
        """Replace the configuration's tokens (reload)."""
        if not self.door.loopback and not tokens:
            raise IntentdError("status.tokens: got none, expected at least one off loopback")
        self.door.book.set_configured(tokens)

    async def start(self) -> None:
        """Listen; ``address`` then says where (port 0 takes a free one)."""
        self._runner = web.AppRunner(
            self.app, handle_signals=False, access_log=None, shutdown_timeout=2.0
        )
        await self._runner.setup()
        tls = tls_context(self.door.section)
        try:
            listener = self._held.listen(SOCKET_NAME, self._host, self._port)
            await web.SockSite(self._runner, listener, ssl_context=tls).start()
        except OSError as error:
            await self._runner.cleanup()
            reason = (
                "in use by another process"
                if error.errno == errno.EADDRINUSE
                else error.strerror or str(error)
            )
            raise IntentdError(f"status.bind: {self._bind} is not available: {reason}") from None
        host, port = self._runner.addresses[0][:2]
        self.address = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Next) -> web.StreamResponse:
        """Authorisation, and the one place where a handler's error becomes an answer."""
        refused = await self._refusal(request)
        if refused is not None:
            return self.door.on_refused(request, refused) or refused
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return json_response({"error": error.reason}, error.status)
        except NotLeadingError as error:
            return json_response({"error": str(error)}, 503)
        except IntentdError as error:
            return json_response({"error": str(error)}, 400)
        except Exception as error:  # noqa: BLE001  one bad request must not end the daemon
            self._metrics.errors.labels("http").inc()
            _log.exception("request failed", extra={"path": request.path})
            return json_response({"error": f"internal error: {type(error).__name__}"}, 500)

    async def _refusal(self, request: web.Request) -> web.Response | None:
        """Why this caller may not; None when they may."""
        door = self.door
        if door.misdirected(request):
            text = "Host: expected a loopback address, or status.origin set to that name"
            return json_response({"error": text}, 421)
        caller = request[CALLER] = await door.caller(request)
        path = request.path
        if path in OPEN_PATHS or door.open_path(path):
            return None
        needed = Role.READ if request.method in SAFE_METHODS else Role.OPERATE
        if caller.role >= needed:
            return None
        if not len(door.book):
            text = "no token configured: status.tokens is empty (intentctl tokens new makes one)"
            return json_response({"error": text}, 403)
        if caller.name:
            text = f"token {caller.name}: has role {caller.role.word}, needs {needed.word}"
            return json_response({"error": text}, 403)
        refused = json_response({"error": "expected Authorization: Bearer TOKEN"}, 401)
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused

    async def _livez(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._unready()
        return json_response({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _status_document(self, _request: web.Request) -> web.Response:
        return json_response(self._status())

    async def _render_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": self._metrics.content_type}
        )


def tls_context(section: StatusSection) -> ssl.SSLContext | None:
    """None without a certificate. Raises IntentdError."""
    if not section.tls_cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(Path(section.tls_cert_file), Path(section.tls_key_file))
    except OSError as error:  # ssl.SSLError too
        text = f"status.tls_cert_file: got {section.tls_cert_file}, {error.strerror or error}"
        raise IntentdError(text) from None
    return context
