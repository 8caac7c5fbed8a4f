"""Schema of the proxies' shared state in PostgreSQL; kit.postgres runs the migrations."""

from __future__ import annotations

from typing import Final

from intentd.proxy.postgres import cache, feedback

MIGRATIONS: Final = (
    """
    CREATE TABLE proxies(
        owner TEXT PRIMARY KEY, name TEXT NOT NULL, seen TIMESTAMPTZ NOT NULL,
        batch BIGINT NOT NULL DEFAULT 0
    );
    CREATE TABLE keys(
        id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL, created_wall_s DOUBLE PRECISION NOT NULL,
        expires_wall_s DOUBLE PRECISION, revoked BOOLEAN NOT NULL, grants TEXT NOT NULL,
        version BIGINT NOT NULL
    );
    CREATE TABLE accounts(
        id TEXT PRIMARY KEY, unit TEXT NOT NULL, bound BIGINT NOT NULL,
        spent BIGINT NOT NULL, reserved BIGINT NOT NULL
    ) WITH (fillfactor = 50);
    CREATE TABLE reservations(
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, accounts TEXT[] NOT NULL, amounts TEXT NOT NULL,
        key TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, service_type TEXT NOT NULL,
        wall_s DOUBLE PRECISION NOT NULL
    );
    CREATE INDEX reservations_owner ON reservations(owner);
    CREATE TABLE spend(
        day TEXT NOT NULL, key TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
        service_type TEXT NOT NULL, requests BIGINT NOT NULL, failed BIGINT NOT NULL,
        in_tokens BIGINT NOT NULL, out_tokens BIGINT NOT NULL, cost_nano BIGINT NOT NULL,
        estimated_nano BIGINT NOT NULL,
        PRIMARY KEY(day, key, model, service_type)
    ) WITH (fillfactor = 50);
    CREATE TABLE requests(
        number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id TEXT NOT NULL,
        key TEXT NOT NULL, wall_s DOUBLE PRECISION NOT NULL, document TEXT NOT NULL
    );
    CREATE INDEX requests_id ON requests(id);
    -- Rates start full again after a crash of the database: not worth a log record each.
    CREATE UNLOGGED TABLE rates(
        scope TEXT PRIMARY KEY, level DOUBLE PRECISION NOT NULL, since_s DOUBLE PRECISION NOT NULL
    ) WITH (fillfactor = 50);
    CREATE TABLE conversations(
        key TEXT NOT NULL, conversation TEXT NOT NULL, last BIGINT NOT NULL,
        wall_s DOUBLE PRECISION NOT NULL, PRIMARY KEY(key, conversation)
    ) WITH (fillfactor = 50);
    CREATE TABLE tickets(
        key TEXT NOT NULL, conversation TEXT NOT NULL, sequence BIGINT NOT NULL,
        owner TEXT NOT NULL, PRIMARY KEY(key, conversation, sequence)
    );
    CREATE INDEX tickets_owner ON tickets(owner);
    CREATE TABLE messages(
        number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key TEXT NOT NULL,
        conversation TEXT NOT NULL, sequence BIGINT NOT NULL, message_id TEXT NOT NULL,
        prompt TEXT NOT NULL, response TEXT NOT NULL, chat TEXT NOT NULL,
        wall_s DOUBLE PRECISION NOT NULL
    );
    CREATE INDEX messages_conversation ON messages(key, conversation, sequence);
    """,
    cache.MIGRATION,
    feedback.MIGRATION,
    """
    ALTER TABLE requests ADD COLUMN client_id TEXT NOT NULL DEFAULT '';
    CREATE INDEX requests_client ON requests(client_id, key) WHERE client_id <> '';
    """,
    """
    ALTER TABLE messages ADD COLUMN size_bytes BIGINT NOT NULL DEFAULT 0;
    UPDATE messages SET size_bytes = length(prompt) + length(response) + length(chat);
    CREATE INDEX messages_order ON messages(key, conversation, sequence, number, size_bytes);
    CREATE INDEX messages_wall ON messages(wall_s);
    """,
)
