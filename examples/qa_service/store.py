"""What the service remembers: people, questions, points, recommendations. SQLite, one writer."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS users(
    user TEXT PRIMARY KEY, name TEXT NOT NULL, seen_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS questions(
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, text TEXT NOT NULL, answer TEXT NOT NULL,
    request_id TEXT NOT NULL, asked_s REAL NOT NULL,
    typed INTEGER NOT NULL, better INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS questions_by_time ON questions(asked_s);
CREATE TABLE IF NOT EXISTS points(user TEXT NOT NULL, day INTEGER NOT NULL, points INTEGER NOT NULL,
    PRIMARY KEY(user, day));
CREATE TABLE IF NOT EXISTS recommended(
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, chosen_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries(id TEXT PRIMARY KEY, seen_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS pending(
    id TEXT PRIMARY KEY, message TEXT NOT NULL, reply TEXT NOT NULL,
    taken_s REAL NOT NULL, tries INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pushes(day INTEGER PRIMARY KEY);
"""
DAY_S = 86400
KEEP_DELIVERIES_S = 7 * DAY_S


@dataclass(frozen=True, slots=True)
class Question:
    """One question of one user, with the answer that stands now."""

    id: int
    user: str
    text: str
    answer: str
    request_id: str
    better: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A message taken and not answered yet. reply: what was to be sent, when that is known."""

    message: str
    reply: str
    tries: int


class Store:
    """Times are wall seconds, given by the caller. path ":memory:" keeps nothing."""

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path)
        self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + SCHEMA)

    def close(self) -> None:
        self._db.close()

    def meet(self, user: str, name: str, now: float) -> None:
        """A user is here; the name they give replaces the one before, an empty one does not."""
        with self._db:
            self._db.execute(
                "INSERT INTO users VALUES(?, ?, ?) ON CONFLICT(user) DO UPDATE SET "
                "seen_s = excluded.seen_s, name = COALESCE(NULLIF(excluded.name, ''), name)",
                (user, name, now),
            )

    def seen_since(self, since_s: float) -> list[str]:
        rows = self._db.execute(
            "SELECT user FROM users WHERE seen_s >= ? ORDER BY user", (since_s,)
        )
        return [row[0] for row in rows]

    def add(
        self, user: str, text: str, answer: str, request_id: str, *, typed: bool, now: float
    ) -> int:
        """A question with its answer; the number it is called by. typed: by hand, not tapped."""
        with self._db:
            cursor = self._db.execute(
                "INSERT INTO questions(user, text, answer, request_id, asked_s, typed, better) "
                "VALUES(?, ?, ?, ?, ?, ?, 0)",
                (user, text, answer, request_id, now, typed),
            )
        return int(cursor.lastrowid or 0)

    def replace(self, question: int, answer: str, request_id: str) -> None:
        """The answer was regenerated."""
        with self._db:
            self._db.execute(
                "UPDATE questions SET answer = ?, request_id = ?, better = better + 1 WHERE id = ?",
                (answer, request_id, question),
            )

    def question(self, question: int, user: str) -> Question | None:
        """One of this user's questions."""
        row = self._db.execute(
            "SELECT id, user, text, answer, request_id, better FROM questions "
            "WHERE id = ? AND user = ?",
            (question, user),
        ).fetchone()
        return None if row is None else Question(*row)

    def typed_since(self, since_s: float, most: int) -> list[tuple[str, int]]:
        """What people typed since then, with how often, most often and newest first."""
        rows = self._db.execute(
            "SELECT MAX(text), COUNT(*) AS n FROM questions WHERE typed AND asked_s >= ? "
            "GROUP BY LOWER(TRIM(text)) ORDER BY n DESC, MAX(asked_s) DESC LIMIT ?",
            (since_s, most),
        )
        return [(text, count) for text, count in rows]

    def reward(self, user: str, points: int, now: float) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO points VALUES(?, ?, ?) ON CONFLICT(user, day) DO UPDATE SET "
                "points = points + excluded.points",
                (user, int(now // DAY_S), points),
            )

    def leaders(self, most: int, *, day: int | None = None) -> list[tuple[str, int]]:
        """Names and points of those with most, of one day (UTC) or overall."""
        rows = self._db.execute(
            "SELECT COALESCE(NULLIF(users.name, ''), 'somebody'), SUM(points) AS total "
            "FROM points JOIN users USING(user) WHERE ? IS NULL OR day = ? "
            "GROUP BY user ORDER BY total DESC, user LIMIT ?",
            (day, day, most),
        )
        return [(name, total) for name, total in rows]

    def recommend(self, kind: str, texts: list[str], now: float) -> None:
        """These are recommended from now on, instead of those before."""
        with self._db:
            self._db.execute("DELETE FROM recommended WHERE kind = ?", (kind,))
            self._db.executemany(
                "INSERT INTO recommended(kind, text, chosen_s) VALUES(?, ?, ?)",
                [(kind, text, now) for text in texts],
            )

    def recommended(self, kind: str) -> list[tuple[int, str]]:
        rows = self._db.execute(
            "SELECT id, text FROM recommended WHERE kind = ? ORDER BY id", (kind,)
        )
        return [(number, text) for number, text in rows]

    def recommendation(self, number: int) -> str | None:
        row = self._db.execute("SELECT text FROM recommended WHERE id = ?", (number,)).fetchone()
        return None if row is None else str(row[0])

    def first_push(self, day: int) -> bool:
        """Whether nothing was pushed on this day yet; from now on something was."""
        with self._db:
            self._db.execute("DELETE FROM pushes WHERE day < ?", (day,))
            cursor = self._db.execute("INSERT OR IGNORE INTO pushes VALUES(?)", (day,))
        return cursor.rowcount == 1

    # -- messages that wait for their answer: on disk before they are acknowledged ----------------

    def delivered(self, message_id: str) -> bool:
        """Whether a message was taken before: WhatsApp repeats what it is unsure of."""
        row = self._db.execute("SELECT 1 FROM deliveries WHERE id = ?", (message_id,)).fetchone()
        return row is not None

    def accept(self, message_id: str, message: str, now: float) -> None:
        with self._db:
            self._db.execute("DELETE FROM deliveries WHERE seen_s < ?", (now - KEEP_DELIVERIES_S,))
            self._db.execute("INSERT INTO deliveries VALUES(?, ?)", (message_id, now))
            self._db.execute(
                "INSERT INTO pending VALUES(?, ?, '', ?, 0)", (message_id, message, now)
            )

    def waiting(self) -> list[str]:
        """Messages not answered yet, the oldest first."""
        return [row[0] for row in self._db.execute("SELECT id FROM pending ORDER BY taken_s, id")]

    def count_waiting(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM pending").fetchone()[0])

    def expire(self, before_s: float) -> int:
        """Forget what waits since earlier. How many."""
        with self._db:
            return self._db.execute("DELETE FROM pending WHERE taken_s < ?", (before_s,)).rowcount

    def begin(self, message_id: str) -> Pending | None:
        """Count one more try of a message; None: it waits no more."""
        with self._db:
            self._db.execute("UPDATE pending SET tries = tries + 1 WHERE id = ?", (message_id,))
        row = self._db.execute(
            "SELECT message, reply, tries FROM pending WHERE id = ?", (message_id,)
        ).fetchone()
        return None if row is None else Pending(*row)

    def replied(self, message_id: str, reply: str) -> None:
        """What will be sent: a further try sends this and asks nobody again."""
        with self._db:
            self._db.execute("UPDATE pending SET reply = ? WHERE id = ?", (reply, message_id))

    def done(self, message_id: str) -> None:
        with self._db:
            self._db.execute("DELETE FROM pending WHERE id = ?", (message_id,))
