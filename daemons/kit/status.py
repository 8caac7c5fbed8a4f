"""The HTTP endpoint of every daemon: /livez, /readyz, /status and /metrics; roles add routes.

On loopback reading is free; changing anything needs a bearer token, and off loopback reading too.
The configuration holds only SHA-256 hashes of tokens.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from aiohttp import web

from intentd.core.errors import IntentdError
from intentd.daemons.kit.config import is_loopback, split_address
from intentd.daemons.kit.metrics import Metrics

_log = logging.getLogger(__name__)

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})  # for probes that carry no token
MAX_BODY_BYTES: Final = 4 << 20

_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


def token_hash(token: str) -> str:
    # Headers may hold any bytes; aiohttp gives the undecodable ones as lone surrogates.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def token_accepted(header: str, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of the tokens; takes the same time for all."""
    scheme, _, token = header.partition(" ")
    given = token_hash(token.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]
    return scheme.lower() == "bearer" and any(matches)


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(value, default=str) + "\n", content_type="application/json", status=status
    )


class StatusServer:
    """status: the whole document. unready: reasons, empty when ready."""

    def __init__(
        self,
        bind: str,
        tokens: Sequence[str],
        metrics: Metrics,
        *,
        status: Callable[[], dict[str, Any]],
        unready: Callable[[], list[str]],
    ) -> None:
        self._host, self._port = split_address(bind, "status.bind")
        self._bind = bind
        self._tokens = tuple(tokens)
        self._metrics = metrics
        self._status = status
        self._unready = unready
        self._loopback = is_loopback(self._host)
        if not self._loopback and not self._tokens:
            raise IntentdError(
                f"status.bind: got {bind}, expected a loopback address, or status.tokens set"
            )
        self.app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        self.app.router.add_get("/livez", self._livez)
        self.app.router.add_get("/readyz", self._readyz)
        self.app.router.add_get("/status", self._status_document)
        self.app.router.add_get("/metrics", self._render_metrics)
        self._runner: web.AppRunner | None = None
        self.address = ""

    def set_tokens(self, tokens: Sequence[str]) -> None:
        """Replace the accepted tokens (reload)."""
        if not self._loopback and not tokens:
            raise IntentdError("status.tokens: got none, expected at least one off loopback")
        self._tokens = tuple(tokens)

    async def start(self) -> None:
        """Listen; ``address`` then says where (port 0 takes a free one)."""
        self._runner = web.AppRunner(
            self.app, handle_signals=False, access_log=None, shutdown_timeout=2.0
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, reuse_port=False)
        try:
            await site.start()
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
        if self._needs_token(request) and not token_accepted(
            request.headers.get("Authorization", ""), self._tokens
        ):
            if not self._tokens:
                return json_response({"error": "no token configured: status.tokens is empty"}, 403)
            refused = json_response({"error": "expected Authorization: Bearer TOKEN"}, 401)
            refused.headers["WWW-Authenticate"] = "Bearer"
            return refused
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return json_response({"error": error.reason}, error.status)
        except IntentdError as error:
            return json_response({"error": str(error)}, 400)
        except Exception as error:  # noqa: BLE001  one bad request must not end the daemon
            self._metrics.errors.labels("http").inc()
            _log.exception("request failed", extra={"path": request.path})
            return json_response({"error": f"internal error: {type(error).__name__}"}, 500)

    def _needs_token(self, request: web.Request) -> bool:
        if request.method not in SAFE_METHODS:
            return True
        if request.path in OPEN_PATHS:
            return False
        return not self._loopback

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
