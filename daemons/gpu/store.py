"""Jobs, their events and predictions on disk. What was committed survives kill -9."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from intentd.core.jobs.job import OVER, Event, Job, job_from_plain, job_to_plain
from intentd.core.jobs.predictor import Prediction
from intentd.core.jobs.spec import MAX_ARRAY
from intentd.daemons.kit.store import Store

MIGRATIONS: Final = (
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, state TEXT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL,
        over INTEGER NOT NULL, body TEXT NOT NULL
    );
    CREATE INDEX jobs_over ON jobs (over, id);
    CREATE INDEX jobs_owner ON jobs (owner, id);
    CREATE TABLE events (
        number INTEGER PRIMARY KEY, job INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        at_s REAL NOT NULL, state TEXT NOT NULL, epoch INTEGER NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX events_job ON events (job, number);
    CREATE TABLE predictions (
        number INTEGER PRIMARY KEY, job INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        at_s REAL NOT NULL, p50_s REAL NOT NULL, p90_s REAL NOT NULL, cause TEXT NOT NULL
    );
    CREATE INDEX predictions_job ON predictions (job, number);
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)
    """,
)
PAGE_JOBS: Final = 50
PREDICTIONS_KEPT: Final = 50  # of a job: the first, and the last so many


class JobStore:
    """Blocking; the scheduler calls it on the store's own thread."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path, MIGRATIONS)

    def commit(
        self,
        jobs: Sequence[tuple[Job, dict[str, Any]]],
        events: Sequence[Event],
        facts: dict[str, Any],
    ) -> None:
        """All of it or nothing. jobs: with their plain form, taken when they stood like that."""
        with self.store.transaction() as db:
            db.executemany(
                "INSERT INTO jobs (id, state, owner, name, over, body) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET state = excluded.state, over = excluded.over, "
                "body = excluded.body",
                [
                    (
                        job.id,
                        plain["state"],
                        job.spec.owner,
                        job.spec.name,
                        plain["state"] in _OVER,
                        json.dumps(plain),
                    )
                    for job, plain in jobs
                ],
            )
            db.executemany(
                "INSERT INTO events (job, at_s, state, epoch, text) VALUES (?, ?, ?, ?, ?)",
                [(e.job, e.at_s, e.state, e.epoch, e.text) for e in events],
            )
            for name, value in facts.items():
                db.execute(
                    "INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)",
                    (name, json.dumps(value)),
                )

    def predicted(self, predictions: Iterable[Prediction]) -> None:
        """Appends predictions; a job keeps its first and its last ones."""
        rows = [(int(str(p.job)), p.at_s, p.p50_s, p.p90_s, p.cause) for p in predictions]
        with self.store.transaction() as db:
            db.executemany(
                "INSERT INTO predictions (job, at_s, p50_s, p90_s, cause) "
                "SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM jobs WHERE id = ?1)",
                rows,
            )
            db.executemany(
                "DELETE FROM predictions WHERE job = ?1 AND number NOT IN (SELECT number FROM "
                "predictions WHERE job = ?1 ORDER BY number DESC LIMIT ?2) AND number > (SELECT "
                "min(number) FROM predictions WHERE job = ?1)",
                [(job, PREDICTIONS_KEPT) for job, *_ in rows],
            )

    def unfinished(self) -> list[Job]:
        rows = self.store.read("SELECT body FROM jobs WHERE over = 0 ORDER BY id")
        return [job_from_plain(json.loads(row["body"])) for row in rows]

    def finished_sizes(self, limit: int) -> list[tuple[str, str, float]]:
        """(owner, name, GPU seconds worked) of the last finished jobs, oldest first."""
        rows = self.store.read(
            "SELECT owner, name, json_extract(body, '$.worked_gpu_s') AS size FROM jobs "
            "WHERE state = 'finished' ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [(row["owner"], row["name"], float(row["size"])) for row in reversed(rows)]

    def newest(self, limit: int) -> Iterator[Job]:
        """The last jobs that came, oldest first; a page at a time, for each is some kilobytes that
        its caller forgets."""
        rows = self.store.read("SELECT id FROM jobs ORDER BY id DESC LIMIT ?", (limit,))
        ids = [row["id"] for row in reversed(rows)]
        sql = "SELECT body FROM jobs WHERE id BETWEEN ? AND ? ORDER BY id"
        for at in range(0, len(ids), PAGE_JOBS):
            page = ids[at : at + PAGE_JOBS]
            for row in self.store.read(sql, (page[0], page[-1])):
                yield job_from_plain(json.loads(row["body"]))

    def highest_id(self) -> int:
        kept = self.facts().get("highest_id", 0)
        row = self.store.read("SELECT coalesce(max(id), 0) AS id FROM jobs")[0]
        return max(int(row["id"]), int(kept))

    def facts(self) -> dict[str, Any]:
        rows = self.store.read("SELECT name, value FROM facts")
        return {row["name"]: json.loads(row["value"]) for row in rows}

    def job(self, job_id: int) -> dict[str, Any] | None:
        rows = self.store.read("SELECT body FROM jobs WHERE id = ?", (job_id,))
        return json.loads(rows[0]["body"]) if rows else None

    def page(
        self,
        *,
        states: Sequence[str],
        owner: str = "",
        name: str = "",
        label: str = "",
        array: int = 0,
        before: int = 0,
        limit: int,
    ) -> list[dict[str, Any]]:
        """Newest first. label: "name=value", or "name" for any value. array: jobs of the array that
        this job is of (numbered one after the other, in one submission), none if it is of none."""
        marks = ", ".join("?" * len(states))
        where: list[tuple[str, list[Any]]] = [
            (f"state IN ({marks})", list(states)) if states else ("1", []),
            ("owner = ?", [owner]) if owner else ("1", []),
            ("name = ?", [name]) if name else ("1", []),
            ("id < ?", [before]) if before else ("1", []),
            _labelled(label) if label else ("1", []),
            _with(array) if array else ("1", []),
        ]
        clause = " AND ".join(text for text, _ in where)
        values: list[Any] = [value for _, given in where for value in given]
        rows = self.store.read(
            f"SELECT body FROM jobs WHERE {clause} ORDER BY id DESC LIMIT ?",  # noqa: S608  only marks
            [*values, limit],
        )
        return [json.loads(row["body"]) for row in rows]

    def events(self, job_id: int, after: int, limit: int) -> list[dict[str, Any]]:
        rows = self.store.read(
            "SELECT number, job, at_s, state, epoch, text FROM events "
            "WHERE number > ? AND (? = 0 OR job = ?) ORDER BY number LIMIT ?",
            (after, job_id, job_id, limit),
        )
        return [dict(row) for row in rows]

    def first_predictions(self, job_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """job -> what was foretold when it was submitted."""
        marks = ", ".join("?" * len(job_ids))
        sql = (
            "SELECT job, at_s, p50_s, p90_s FROM predictions WHERE number IN "  # noqa: S608  only marks
            f"(SELECT min(number) FROM predictions WHERE job IN ({marks}) GROUP BY job)"
        )
        names = ("at_s", "p50_s", "p90_s")
        rows = self.store.read(sql, list(job_ids))
        return {row["job"]: {name: row[name] for name in names} for row in rows}

    def predictions(self, job_id: int) -> list[dict[str, Any]]:
        rows = self.store.read(
            "SELECT at_s, p50_s, p90_s, cause FROM predictions WHERE job = ? ORDER BY number",
            (job_id,),
        )
        return [dict(row) for row in rows]

    def counts(self) -> dict[str, int]:
        rows = self.store.read("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        return {row["state"]: int(row["n"]) for row in rows}

    def prune(self, keep: int) -> list[int]:
        """Forgets the oldest jobs that are over, beyond keep; returns their ids."""
        rows = self.store.read(
            "SELECT id FROM jobs WHERE over = 1 ORDER BY id DESC LIMIT 500 OFFSET ?", (keep,)
        )
        gone = [int(row["id"]) for row in rows]
        if gone:
            with self.store.transaction() as db:
                db.execute(
                    "INSERT OR REPLACE INTO facts (name, value) VALUES ('highest_id', ?)",
                    (str(self.highest_id()),),
                )
                db.executemany("DELETE FROM jobs WHERE id = ?", [(job,) for job in gone])
        return gone


def _labelled(label: str) -> tuple[str, list[Any]]:
    name, equals, value = label.partition("=")
    found = "json_extract(body, '$.spec.labels.\"' || ? || '\"')"
    return (f"{found} = ?", [name, value]) if equals else (f"{found} IS NOT NULL", [name])


def _with(job: int) -> tuple[str, list[Any]]:
    """Neighbours have other first numbers: an array's index counts from 0 again."""
    index = "json_extract(body, '$.spec.array_index')"
    first = f"(SELECT id - {index} FROM jobs WHERE id = ? AND {index} >= 0)"  # noqa: S608  no values
    return f"id >= {first} AND id < {first} + ? AND id - {index} = {first} AND {index} >= 0", [
        job,
        job,
        MAX_ARRAY,
        job,
    ]


_OVER: Final = frozenset(state.value for state in OVER)


def plain_of(jobs: Iterable[Job]) -> list[tuple[Job, dict[str, Any]]]:
    return [(job, job_to_plain(job)) for job in jobs]
