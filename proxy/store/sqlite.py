"""Schema of the proxy's SQLite database and the statements on it; kit.store runs them."""

from __future__ import annotations

import sqlite3
from typing import Final

from intentd.core.errors import InputError
from intentd.daemons.kit.store import Store
from intentd.proxy.store import cache_sqlite
from intentd.proxy.store.base import FeedbackRow, KeyRow

MIGRATIONS: Final = (
    """
    CREATE TABLE keys(
        id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL, created_wall_s REAL NOT NULL, expires_wall_s REAL,
        revoked INTEGER NOT NULL DEFAULT 0, grants TEXT NOT NULL
    ) STRICT;
    CREATE TABLE accounts(
        id TEXT PRIMARY KEY, unit TEXT NOT NULL, bound INTEGER NOT NULL,
        spent INTEGER NOT NULL, reserved INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE reservations(
        id TEXT PRIMARY KEY, accounts TEXT NOT NULL, amounts TEXT NOT NULL,
        key TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, service_type TEXT NOT NULL,
        wall_s REAL NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE spend(
        day TEXT NOT NULL, key TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
        service_type TEXT NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL,
        in_tokens INTEGER NOT NULL, out_tokens INTEGER NOT NULL, cost_nano INTEGER NOT NULL,
        estimated_nano INTEGER NOT NULL,
        PRIMARY KEY(day, key, model, service_type)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE requests(
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, key TEXT NOT NULL, wall_s REAL NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE INDEX requests_id ON requests(id);
    """,
    """
    CREATE TABLE messages(
        number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, conversation TEXT NOT NULL,
        message_id TEXT NOT NULL, prompt TEXT NOT NULL, response TEXT NOT NULL, chat TEXT NOT NULL,
        wall_s REAL NOT NULL
    ) STRICT;
    CREATE INDEX messages_conversation ON messages(key, conversation, number);
    """,
    cache_sqlite.MIGRATION,
    """
    CREATE TABLE conversations(
        key TEXT NOT NULL, conversation TEXT NOT NULL, last INTEGER NOT NULL,
        wall_s REAL NOT NULL, PRIMARY KEY(key, conversation)
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE messages ADD COLUMN sequence INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE feedback(
        key TEXT NOT NULL, id TEXT NOT NULL, good INTEGER NOT NULL, comment TEXT NOT NULL,
        wall_s REAL NOT NULL, PRIMARY KEY(key, id)
    ) STRICT;
    CREATE INDEX feedback_wall ON feedback(wall_s);
    """,
    """
    ALTER TABLE requests ADD COLUMN client_id TEXT NOT NULL DEFAULT '';
    CREATE INDEX requests_client ON requests(client_id, key) WHERE client_id <> '';
    """,
    # Sizes beside the order: a message of megabytes is not read to be counted.
    """
    ALTER TABLE messages ADD COLUMN size_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE messages SET size_bytes = length(prompt) + length(response) + length(chat);
    CREATE INDEX messages_order ON messages(key, conversation, sequence, number, size_bytes);
    CREATE INDEX messages_wall ON messages(wall_s);
    """,
)

FIND_REQUEST: Final = (
    "SELECT document FROM requests WHERE id = ?1 AND (?2 IS NULL OR key = ?2) "
    "ORDER BY number DESC LIMIT 1"
)
FIND_NAMED: Final = (
    "SELECT document FROM requests WHERE client_id = ?1 AND client_id <> '' "
    "AND (?2 IS NULL OR key = ?2) ORDER BY number DESC LIMIT 8"
)

WRITE_ACCOUNT: Final = (
    "INSERT INTO accounts(id, unit, bound, spent, reserved) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT(id) DO UPDATE SET bound=excluded.bound, spent=excluded.spent, "
    "reserved=excluded.reserved"
)
WRITE_RESERVATION: Final = (
    "INSERT INTO reservations(id, accounts, amounts, key, tenant, model, service_type, wall_s) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
END_RESERVATION: Final = "DELETE FROM reservations WHERE id = ?"
ADD_SPEND: Final = (
    "INSERT INTO spend(day, key, tenant, model, service_type, requests, failed, in_tokens, "
    "out_tokens, cost_nano, estimated_nano) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT(day, key, model, service_type) DO UPDATE SET "
    "requests=requests+excluded.requests, failed=failed+excluded.failed, "
    "in_tokens=in_tokens+excluded.in_tokens, out_tokens=out_tokens+excluded.out_tokens, "
    "cost_nano=cost_nano+excluded.cost_nano, "
    "estimated_nano=estimated_nano+excluded.estimated_nano"
)
ADD_REQUEST: Final = (
    "INSERT INTO requests(id, key, wall_s, document, client_id) VALUES (?, ?, ?, ?, ?)"
)
PRUNE_REQUESTS: Final = (
    "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - ?"
)
WRITE_KEY: Final = (
    "INSERT INTO keys(id, hash, name, tenant, created_wall_s, expires_wall_s, revoked, grants) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
    "expires_wall_s=excluded.expires_wall_s, revoked=excluded.revoked, grants=excluded.grants"
)
ACCEPT: Final = (
    "INSERT INTO conversations(key, conversation, last, wall_s) VALUES (?, ?, 1, ?) "
    "ON CONFLICT(key, conversation) DO UPDATE SET last=last+1, wall_s=excluded.wall_s "
    "RETURNING last"
)
ADD_MESSAGE: Final = (
    "INSERT INTO messages(key, conversation, sequence, message_id, prompt, response, chat, wall_s, "
    "size_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
REMOVE_MESSAGE: Final = "DELETE FROM messages WHERE key = ? AND conversation = ? AND message_id = ?"
FIND_MESSAGE: Final = (
    "SELECT number FROM messages WHERE key = ? AND conversation = ? AND message_id = ?"
)
REPLACE_MESSAGE: Final = (
    "UPDATE messages SET message_id = ?, prompt = ?, response = ?, chat = ?, wall_s = ?, "
    "size_bytes = ? WHERE number = ?"
)
LOAD_MESSAGES: Final = (
    "SELECT message_id, prompt, response, chat FROM messages WHERE key = ?1 AND conversation = ?2 "
    "AND (?3 = 0 OR sequence < ?3) AND wall_s >= ?5 "
    "ORDER BY sequence DESC, number DESC LIMIT ?4"
)
COUNT_MESSAGES: Final = "SELECT count(*) FROM messages WHERE key = ? AND conversation = ?"
PRUNE_BYTES: Final = (
    "DELETE FROM messages WHERE number IN (SELECT number FROM (SELECT number, "
    "sum(size_bytes) OVER w AS held, row_number() OVER w AS place FROM messages "
    "WHERE key = ? AND conversation = ? WINDOW w AS (ORDER BY sequence DESC, number DESC)) "
    "WHERE held > ? AND place > 1)"
)
PRUNE_OLD: Final = "DELETE FROM messages WHERE wall_s < ?"
NAMES: Final = (
    "SELECT conversation, count(*) AS messages, min(wall_s) AS first_wall_s, "
    "max(wall_s) AS last_wall_s FROM messages WHERE key = ? AND conversation > ? "
    "GROUP BY conversation ORDER BY conversation LIMIT ?"
)
ADD_FEEDBACK: Final = (
    "INSERT INTO feedback(key, id, good, comment, wall_s) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT(key, id) DO UPDATE SET good=excluded.good, comment=excluded.comment, "
    "wall_s=excluded.wall_s"
)
PRUNE_FEEDBACK: Final = (
    "DELETE FROM feedback WHERE wall_s < "
    "(SELECT wall_s FROM feedback ORDER BY wall_s DESC LIMIT 1 OFFSET ?)"
)
PRUNE_CONVERSATION: Final = (
    "DELETE FROM messages WHERE key = ? AND conversation = ? AND number <= ("
    "SELECT number FROM messages WHERE key = ? AND conversation = ? "
    "ORDER BY sequence DESC, number DESC LIMIT 1 OFFSET ?)"
)
PRUNE_MESSAGES: Final = (
    "DELETE FROM messages WHERE number <= (SELECT max(number) FROM messages) - ?"
)
# A number is never given twice while anybody may remember it: not within a day of its use.
PRUNE_CONVERSATIONS: Final = (
    "DELETE FROM conversations WHERE wall_s < ? AND NOT EXISTS (SELECT 1 FROM messages "
    "WHERE messages.key = conversations.key AND messages.conversation = conversations.conversation)"
)


class SqliteKeys:
    """The table of keys in SQLite; a store.base.KeyTable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def load(self) -> list[KeyRow]:
        rows = await self._store.run(lambda store: store.read("SELECT * FROM keys"))
        return [
            KeyRow(
                row["id"], row["hash"], row["name"], row["tenant"], row["created_wall_s"],
                row["expires_wall_s"], bool(row["revoked"]), row["grants"],
            )
            for row in rows
        ]  # fmt: skip

    async def write(self, row: KeyRow) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                db.execute(
                    WRITE_KEY,
                    (
                        row.key_id, row.hashed, row.name, row.tenant, row.created_wall_s,
                        row.expires_wall_s, int(row.revoked), row.grants,
                    ),
                )  # fmt: skip

        try:
            await self._store.run(write)
        except sqlite3.IntegrityError:
            raise InputError("name", row.name, "a name no key has") from None


class SqliteFeedback:
    """What users said of answers, in SQLite; a store.base.FeedbackTable."""

    def __init__(self, store: Store, max_rows: int) -> None:
        self.max_rows = max_rows
        self._store = store

    async def write(self, row: FeedbackRow) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                db.execute(
                    ADD_FEEDBACK,
                    (row.key_id, row.request_id, int(row.good), row.comment, row.wall_s),
                )
                db.execute(PRUNE_FEEDBACK, (self.max_rows,))

        await self._store.run(write)

    async def find(self, key_id: str, request_id: str) -> FeedbackRow | None:
        sql = "SELECT good, comment, wall_s FROM feedback WHERE key = ? AND id = ?"
        rows = await self._store.run(lambda store: store.read(sql, (key_id, request_id)))
        if not rows:
            return None
        (row,) = rows
        return FeedbackRow(key_id, request_id, bool(row["good"]), row["comment"], row["wall_s"])
