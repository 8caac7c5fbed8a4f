"""Console sessions and the bound on guesses at the login.

A session is opened with a token and lives in memory: a restart of the controller asks for the
token again. It ends after a time without use, after a longer time anyway, at logout, and with its
token. The cookie is one random value, of which only the hash is kept.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from intentd.daemons.kit.tokens import Token, TokenBook, token_hash

MAX_SESSIONS: Final = 256
IDLE_S: Final = 8 * 3600.0
LIFETIME_S: Final = 24 * 3600.0
GUESSES: Final = 10  # wrong tokens from one address in WINDOW_S
WINDOW_S: Final = 300.0
MAX_ADDRESSES: Final = 1024
ALL_GUESSES: Final = 200  # from all addresses together


@dataclass(slots=True)
class Session:
    """csrf: what each form of this session carries."""

    token_hash: str
    csrf: str
    began_s: float
    used_s: float


class Sessions:
    """Bounded: beyond MAX_SESSIONS the one unused longest is closed."""

    def __init__(self, book: TokenBook, now: Callable[[], float]) -> None:
        self._book = book
        self._now = now
        self._open: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, token: Token) -> str:
        """The cookie's value of a new session."""
        cookie, now = secrets.token_urlsafe(32), self._now()
        self._open[token_hash(cookie)] = Session(token.hashed, secrets.token_urlsafe(24), now, now)
        if len(self._open) > MAX_SESSIONS:
            self._open.popitem(last=False)
        return cookie

    def find(self, cookie: str) -> tuple[Session, Token] | None:
        """The session and its token, if both are in force."""
        key = token_hash(cookie)
        session = self._open.get(key)
        if session is None:
            return None
        now, token = self._now(), self._book.valid(session.token_hash)
        if token is None or now - session.used_s > IDLE_S or now - session.began_s > LIFETIME_S:
            del self._open[key]
            return None
        session.used_s = now
        self._open.move_to_end(key)
        return session, token

    def close(self, cookie: str) -> None:
        self._open.pop(token_hash(cookie), None)

    @staticmethod
    def same(session: Session, given: str) -> bool:
        """Whether a form carries the session's own value."""
        return hmac.compare_digest(session.csrf.encode(), given.encode("utf-8", "surrogatepass"))


class Guesses:
    """How often an address was wrong lately. States of an address: free -> shut out -> free."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()
        self._all: list[float] = []

    def wait_s(self, address: str) -> float:
        """0 when this address may try."""
        now = self._now()
        times = [at for at in self._wrong.get(address, ()) if now - at < WINDOW_S]
        self._all = [at for at in self._all if now - at < WINDOW_S]
        waits = [0.0]
        if len(times) >= GUESSES:
            waits.append(times[0] + WINDOW_S - now)
        if len(self._all) >= ALL_GUESSES:
            waits.append(self._all[0] + WINDOW_S - now)
        return max(waits)

    def wrong(self, address: str) -> None:
        now = self._now()
        times = self._wrong.pop(address, [])
        self._wrong[address] = [*times, now][-GUESSES:]
        self._all = [*self._all, now][-ALL_GUESSES:]
        if len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)

    def right(self, address: str) -> None:
        self._wrong.pop(address, None)
