"""The book of numbered policies: what was issued, from which inputs, why, and what it changed.

Numbers only grow; (era, number) orders policies everywhere. An era is named by the second it
began, and a new one begins when the book may not know all that was issued: a new store, a store
that does not match the witness in the run directory (restored, copied, or the machine restarted),
or a member that runs a larger number than the book holds. See docs/adr on eras.

States of an application: *automatic* -> (rollback) -> *held* -> (release) -> *automatic*. While
held, automatic policies are refused; an operator's own are not.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from intentd.controller import audit
from intentd.core.errors import InputError, IntentdError
from intentd.core.messages import NumberedPolicy
from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.store import Connection, Storage

HISTORY: Final = 1000  # policies kept of each application
MAX_ERA: Final = 2**40
AUTOMATIC: Final = "automatic"

MIGRATIONS: Final = (
    """
    CREATE TABLE policies (
        application TEXT NOT NULL, number INTEGER NOT NULL, era INTEGER NOT NULL,
        issued_wall_s REAL NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL,
        copy_of INTEGER, changes TEXT NOT NULL, inputs TEXT NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (application, number)
    ) STRICT;
    CREATE TABLE holds (
        application TEXT PRIMARY KEY, number INTEGER NOT NULL, since_wall_s REAL NOT NULL,
        author TEXT NOT NULL
    ) STRICT;
    CREATE TABLE eras (
        era INTEGER PRIMARY KEY, began_wall_s REAL NOT NULL, why TEXT NOT NULL,
        number INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE settings (name TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;
    """,
    """
    CREATE TABLE fronts (
        number INTEGER PRIMARY KEY AUTOINCREMENT, made_wall_s REAL NOT NULL, reason TEXT NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE chosen (name TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;
    """,
    "CREATE TABLE intents (name TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;",
    audit.MIGRATION,
    audit.MEMBERS_MIGRATION,
    """
    CREATE TABLE sessions (
        cookie_hash TEXT PRIMARY KEY, token_hash TEXT NOT NULL, began_wall_s REAL NOT NULL,
        used_wall_s REAL NOT NULL
    ) STRICT;
    """,
)


class HeldError(IntentdError):
    """Automatic policies are held after a rollback, until released."""


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy as issued. changes: against the one before, in words. copy_of: a rollback's number.

    inputs: what it was computed from. author: "automatic" or the operator's account.
    """

    application: str
    era: int
    number: int
    issued_wall_s: float
    author: str
    reason: str
    copy_of: int | None
    changes: tuple[str, ...]
    inputs: Mapping[str, Any]
    body: Mapping[str, Any]

    def message(self) -> NumberedPolicy:
        return NumberedPolicy(
            self.application, self.era, self.number, self.issued_wall_s, dict(self.body)
        )

    def to_plain(self, *, whole: bool) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "application": self.application,
            "era": self.era,
            "number": self.number,
            "issued_wall_s": self.issued_wall_s,
            "author": self.author,
            "reason": self.reason,
            "copy_of": self.copy_of,
            "changes": list(self.changes),
        }
        if whole:
            plain["inputs"] = dict(self.inputs)
            plain["body"] = dict(self.body)
        return plain


@dataclass(frozen=True, slots=True)
class Hold:
    """Automatic policies of an application rest since a rollback to number."""

    number: int
    since_wall_s: float
    author: str


_COLUMNS: Final = (
    "application, era, number, issued_wall_s, author, reason, copy_of, changes, inputs, body"
)
Differences = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]


class PolicyBook:
    """Opened once at start; what a method returned is on disk. Methods that write may run in the
    store's thread, one at a time.

    witness: file in the run directory with "era number" of the newest policy, written before the
    policy is; it outlives the process but not the machine, and no backup contains it.
    shared: other controllers write to the store too, so it may be ahead of the witness.
    differences: application -> what a policy changes, in words.
    """

    def __init__(
        self,
        store: Storage,
        *,
        witness: Path,
        wall: Callable[[], float],
        differences: Mapping[str, Differences],
        shared: bool = False,
    ) -> None:
        self._store = store
        self._shared = shared
        self._lock = threading.RLock()  # numbers are taken in the store's thread and in the loop
        self._witness = witness
        self._wall = wall
        self._differences = differences
        self._era, self._number = self._stored()
        self._continue_or_begin()

    @property
    def era(self) -> int:
        return self._era

    def newest(self, application: str) -> StoredPolicy | None:
        rows = self._select("WHERE application = ? ORDER BY number DESC LIMIT 1", application)
        return rows[0] if rows else None

    def get(self, application: str, number: int) -> StoredPolicy:
        """Raises InputError for a number that was never issued or is no longer kept."""
        rows = self._select("WHERE application = ? AND number = ?", application, number)
        if not rows:
            raise InputError("number", number, f"a policy of {application} that is kept")
        return rows[0]

    def history(
        self, application: str, limit: int = HISTORY, before: int | None = None
    ) -> list[StoredPolicy]:
        """Newest first; before: only smaller numbers."""
        tail = "WHERE application = ? AND number < ? ORDER BY number DESC LIMIT ?"
        return self._select(tail, application, 2**62 if before is None else before, limit)

    def hold(self, application: str) -> Hold | None:
        rows = self._store.read(
            "SELECT number, since_wall_s, author FROM holds WHERE application = ?", (application,)
        )
        return Hold(*rows[0]) if rows else None

    def eras(self) -> list[dict[str, Any]]:
        """Newest first."""
        rows = self._store.read(
            "SELECT era, began_wall_s, why FROM eras ORDER BY era DESC LIMIT 20"
        )
        return [{"era": era, "began_wall_s": began, "why": why} for era, began, why in rows]

    def issue(
        self,
        application: str,
        body: Mapping[str, Any],
        *,
        inputs: Mapping[str, Any],
        reason: str,
        author: str = AUTOMATIC,
    ) -> StoredPolicy:
        """Number and store a policy. Raises HeldError for an automatic one while held."""
        with self._lock:
            if author == AUTOMATIC and self.hold(application) is not None:
                raise HeldError(f"{application}: automatic policies are held until released")
            return self._issue(application, body, inputs=inputs, reason=reason, author=author)

    def rollback(self, application: str, number: int, *, author: str) -> StoredPolicy:
        """Issue the content of an old policy under a new number and hold the automatic ones."""
        with self._lock:
            old = self.get(application, number)
            with self._store.transaction() as db:
                db.execute(
                    "INSERT INTO holds VALUES (?, ?, ?, ?) ON CONFLICT (application) DO UPDATE SET "
                    "number = excluded.number, since_wall_s = excluded.since_wall_s, "
                    "author = excluded.author",
                    (application, number, self._wall(), author),
                )
            return self._issue(
                application,
                old.body,
                inputs={"rolled_back_to": [old.era, old.number]},
                reason=f"rollback to {old.number}",
                author=author,
                copy_of=old.copy_of or old.number,
            )

    def release(self, application: str) -> bool:
        """Let automatic policies go on. False if none were held."""
        with self._store.transaction() as db:
            gone = db.execute("DELETE FROM holds WHERE application = ?", (application,))
        return gone.rowcount > 0

    def seen(self, application: str, era: int, number: int, member: str) -> StoredPolicy | None:
        """A member runs (era, number). If the book never issued that, a new era begins.

        Returns the newest policy issued again in the new era, None if nothing is amiss.
        """
        with self._lock:
            if (era, number) <= (self._era, self._number) or era >= MAX_ERA:
                return None
            self._number = max(self._number, min(number, MAX_ERA))
            why = f"{member} runs {era}.{number} of {application}, newer than this store"
            self._begin(why, era)
            return self._issue_again(application)

    def settings(self) -> dict[str, dict[str, Any]]:
        """name -> the operator's settings stored by put_settings."""
        rows = self._store.read("SELECT name, body FROM settings ORDER BY name")
        return {name: json.loads(body) for name, body in rows}

    def put_settings(self, settings: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Store settings under their names, all or none; None removes them."""
        with self._store.transaction() as db:
            for name, body in settings.items():
                if body is None:
                    db.execute("DELETE FROM settings WHERE name = ?", (name,))
                else:
                    db.execute(
                        "INSERT INTO settings VALUES (?, ?) "
                        "ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                        (name, json.dumps(body)),
                    )

    def _issue(
        self,
        application: str,
        body: Mapping[str, Any],
        *,
        inputs: Mapping[str, Any],
        reason: str,
        author: str,
        copy_of: int | None = None,
    ) -> StoredPolicy:
        before = self.newest(application)
        changes = tuple(self._differences[application](before.body if before else {}, body))
        with self._store.transaction() as db:
            # Counted in the transaction: a commit that seemed to fail may have happened.
            number = max(self._number, self._highest(db)) + 1
            policy = StoredPolicy(
                application,
                self._era,
                number,
                self._wall(),
                author,
                reason,
                copy_of,
                changes,
                dict(inputs),
                dict(body),
            )
            self._testify(number)
            self._insert(db, policy)
        self._number = number
        return policy

    @staticmethod
    def _highest(db: Connection) -> int:
        row = db.execute(
            "SELECT coalesce(max(number), 0) FROM "
            "(SELECT number FROM policies UNION ALL SELECT number FROM eras) AS known"
        ).fetchone()
        return int(row[0])

    @staticmethod
    def _insert(db: Connection, policy: StoredPolicy) -> None:
        db.execute(
            "INSERT INTO policies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                policy.application,
                policy.number,
                policy.era,
                policy.issued_wall_s,
                policy.author,
                policy.reason,
                policy.copy_of,
                json.dumps(policy.changes),
                json.dumps(policy.inputs),
                json.dumps(policy.body),
            ),
        )
        db.execute(
            "DELETE FROM policies WHERE application = ? AND number <= ("
            "SELECT number FROM policies WHERE application = ? "
            "ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (policy.application, policy.application, HISTORY),
        )

    def _select(self, tail: str, *values: object) -> list[StoredPolicy]:
        rows = self._store.read(f"SELECT {_COLUMNS} FROM policies {tail}", values)  # noqa: S608  tail is written in this class
        return [
            StoredPolicy(
                application=row["application"],
                era=row["era"],
                number=row["number"],
                issued_wall_s=row["issued_wall_s"],
                author=row["author"],
                reason=row["reason"],
                copy_of=row["copy_of"],
                changes=tuple(json.loads(row["changes"])),
                inputs=json.loads(row["inputs"]),
                body=json.loads(row["body"]),
            )
            for row in rows
        ]

    def _stored(self) -> tuple[int, int]:
        era = self._store.read("SELECT coalesce(max(era), 0) FROM eras")[0][0]
        with self._store.transaction() as db:
            return int(era), self._highest(db)

    def _continue_or_begin(self) -> None:
        testimony = self._read_witness()
        # The witness is written first: one number ahead is a crash between the two writes.
        if self._era and testimony in ((self._era, self._number), (self._era, self._number + 1)):
            self._number = testimony[1]
            return
        if self._shared and self._era and (testimony or (0, 0)) < (self._era, self._number):
            self._testify(self._number)
            return
        if not self._era:
            why = "new store"
        elif testimony is None:
            why = "no witness in the run directory: the machine or the store's place changed"
        else:
            why = f"the store holds {self._era}.{self._number}, the witness saw {testimony}"
        if testimony is not None:
            self._number = max(self._number, testimony[1])
        self._begin(why, testimony[0] if testimony else 0)
        for row in self._store.read("SELECT DISTINCT application FROM policies"):
            self._issue_again(row[0])

    def _issue_again(self, application: str) -> StoredPolicy | None:
        """The newest policy under the era that just began, so that members take it."""
        newest = self.newest(application)
        if newest is None:
            return None
        return self._issue(
            application,
            newest.body,
            inputs=newest.inputs,
            reason="new era: " + newest.reason.removeprefix("new era: "),
            author=newest.author,
            copy_of=newest.copy_of or newest.number,
        )

    def _begin(self, why: str, beyond: int) -> None:
        self._era = max(self._era + 1, beyond + 1, int(self._wall()))
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO eras VALUES (?, ?, ?, ?)", (self._era, self._wall(), why, self._number)
            )
            db.execute(
                "DELETE FROM eras WHERE era NOT IN (SELECT era FROM eras ORDER BY 1 DESC LIMIT 100)"
            )
        self._testify(self._number)

    def _read_witness(self) -> tuple[int, int] | None:
        try:
            era, number = self._witness.read_text(encoding="ascii").split()
            return int(era), int(number)
        except (OSError, ValueError):
            return None

    def _testify(self, number: int) -> None:
        try:
            write_atomically(self._witness, f"{self._era} {number}\n".encode())
        except OSError as error:
            raise IntentdError(f"cannot write {self._witness}: {error.strerror}") from None
