"""Schema of the proxy's SQLite database and the statements on it; kit.store runs them."""

from __future__ import annotations

from typing import Final

from intentd.proxy.store import cache_sqlite

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
ADD_REQUEST: Final = "INSERT INTO requests(id, key, wall_s, document) VALUES (?, ?, ?, ?)"
PRUNE_REQUESTS: Final = (
    "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - ?"
)
WRITE_KEY: Final = (
    "INSERT INTO keys(id, hash, name, tenant, created_wall_s, expires_wall_s, revoked, grants) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
    "expires_wall_s=excluded.expires_wall_s, revoked=excluded.revoked, grants=excluded.grants"
)
