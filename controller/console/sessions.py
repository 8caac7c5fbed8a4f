"""Console sessions and the bound on guesses at the login.

A session is opened with a token. It ends after a time without use, after a longer time anyway, at
logout, and with its token. The cookie is one random value, of which only the hash is kept; what the
forms carry follows from it. Sessions are kept in the controller's store, so that one outlives a
restart, and a takeover by another controller whose token book knows its token.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from intentd.daemons.kit.store import Storage
from intentd.daemons.kit.tokens import Token, TokenBook, token_hash

MAX_SESSIONS: Final = 256
IDLE_S: Final = 8 * 3600.0
LIFETIME_S: Final = 24 * 3600.0
GUESSES: Final = 10  # wrong tokens from one address in WINDOW_S
WINDOW_S: Final = 300.0
MAX_ADDRESSES: Final = 1024
ALL_GUESSES: Final = 200  # from all addresses together
WRITTEN_S: Final = 60.0  # a use is written down when the last one written is so old
AHEAD_S: Final = 300.0  # a session from the future: the clock was set back


@dataclass(slots=True)
class Session:
    """csrf: what each form of this session carries. Times are of the wall clock."""

    token_hash: str
    csrf: str
    began_s: float
    used_s: float


class Sessions:
    """Bounded: beyond MAX_SESSIONS the one unused longest is closed. wall: the time of day, which
    goes on over a restart."""

    def __init__(self, book: TokenBook, wall: Callable[[], float]) -> None:
        self._book = book
        self._wall = wall
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._written: dict[str, float] = {}  # used_s as the store has it
        self._gone: set[str] = set()  # not deleted from the store yet

    def __len__(self) -> int:
        return len(self._open)

    def open(self, token: Token) -> str:
        """The cookie's value of a new session."""
        cookie, now = secrets.token_urlsafe(32), self._wall()
        self._open[token_hash(cookie)] = Session(token.hashed, _csrf(cookie), now, now)
        if len(self._open) > MAX_SESSIONS:
            self._end(next(iter(self._open)))
        return cookie

    def find(self, cookie: str) -> tuple[Session, Token] | None:
        """The session and its token, if both are in force."""
        key = token_hash(cookie)
        session = self._open.get(key)
        if session is None:
            return None
        now, token = self._wall(), self._book.valid(session.token_hash)
        if token is None or not _in_time(session, now):
            self._end(key)
            return None
        session.used_s = now
        session.csrf = session.csrf or _csrf(cookie)
        self._open.move_to_end(key)
        return session, token

    def close(self, cookie: str) -> None:
        self._end(token_hash(cookie))

    def _end(self, key: str) -> None:
        if self._open.pop(key, None) is not None:
            self._gone.add(key)

    async def load(self, store: Storage) -> None:
        """Take up what is kept; sessions opened here meanwhile stay. Raises StoreError."""
        rows = await store.run(
            lambda kept: kept.read("SELECT * FROM sessions ORDER BY used_wall_s", ())
        )
        now = self._wall()
        found: OrderedDict[str, Session] = OrderedDict()
        self._written = {}
        for row in rows:
            key, used_s = row["cookie_hash"], row["used_wall_s"]
            session = Session(row["token_hash"], "", row["began_wall_s"], used_s)
            self._written[key] = used_s
            if key not in self._gone and _in_time(session, now):
                found[key] = session
            else:
                self._gone.add(key)
        self._open = OrderedDict([*found.items(), *self._open.items()])
        while len(self._open) > MAX_SESSIONS:
            self._end(next(iter(self._open)))

    async def keep(self, store: Storage) -> None:
        """Write down what has changed. Raises StoreError; then it is tried again."""
        fresh = [
            (key, one.token_hash, one.began_s, one.used_s)
            for key, one in self._open.items()
            if one.used_s - self._written.get(key, -WRITTEN_S) >= WRITTEN_S
        ]
        gone = set(self._gone)
        if not fresh and not gone:
            return

        def write(kept: Storage) -> None:
            with kept.transaction() as db:
                for key in [*gone, *(row[0] for row in fresh)]:
                    db.execute("DELETE FROM sessions WHERE cookie_hash = ?", (key,))
                for row in fresh:
                    db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", row)

        await store.run(write)
        self._gone -= gone
        for key in gone:
            self._written.pop(key, None)
        self._written |= {row[0]: row[3] for row in fresh}

    @staticmethod
    def same(session: Session, given: str) -> bool:
        """Whether a form carries the session's own value."""
        return hmac.compare_digest(session.csrf.encode(), given.encode("utf-8", "surrogatepass"))


def _in_time(session: Session, now: float) -> bool:
    idle_s, age_s = now - session.used_s, now - session.began_s
    return -AHEAD_S <= idle_s <= IDLE_S and -AHEAD_S <= age_s <= LIFETIME_S


def _csrf(cookie: str) -> str:
    """Follows from the cookie, so that it needs no keeping; the cookie does not follow from it."""
    return hashlib.sha256(f"csrf {cookie}".encode("utf-8", "surrogatepass")).hexdigest()


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
