"""The Pareto fronts that were found, and what the operator chose; on disk.

The tables are made by controller.policies.MIGRATIONS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from intentd.core.jobs.choice import Choice, choice_from_plain
from intentd.core.jobs.history import Basis
from intentd.core.jobs.policy import JobsPolicy, from_plain
from intentd.daemons.kit.store import Storage

KEPT: Final = 20  # fronts


@dataclass(frozen=True, slots=True)
class Front:
    """One search's result as stored. document: see controller.search.worker."""

    number: int
    made_wall_s: float
    reason: str
    document: Mapping[str, Any]

    @property
    def points(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.document["front"]
        return rows

    @property
    def objectives(self) -> list[dict[str, float]]:
        """What the points are judged by: the held-out half."""
        return [point["test"] or point["train"] for point in self.points]

    @property
    def basis(self) -> Basis:
        basis = self.document["basis"]
        return Basis(basis["jobs"], basis["load"])

    def policy(self, index: int) -> JobsPolicy:
        return from_plain(self.points[index]["config"])


class FrontBook:
    """Blocking; writes belong on the store's own thread."""

    def __init__(self, store: Storage) -> None:
        self._store = store

    def add(self, made_wall_s: float, reason: str, document: Mapping[str, Any]) -> Front:
        with self._store.transaction() as db:
            newest = db.execute("SELECT coalesce(max(number), 0) FROM fronts").fetchone()[0]
            number = int(newest) + 1  # the newest is always kept, so none comes twice
            db.execute(
                "INSERT INTO fronts (number, made_wall_s, reason, document) VALUES (?, ?, ?, ?)",
                (number, made_wall_s, reason, json.dumps(document)),
            )
            db.execute("DELETE FROM fronts WHERE number <= ?", (number - KEPT,))
        return Front(number, made_wall_s, reason, document)

    def newest(self) -> Front | None:
        rows = self._store.read("SELECT * FROM fronts ORDER BY number DESC LIMIT 1")
        if not rows:
            return None
        number, made, reason, document = rows[0]
        return Front(number, made, reason, json.loads(document))

    def preference(self) -> list[str]:
        """Objectives the operator set; empty: the configuration's."""
        return list(self._chosen("objectives") or ())

    def set_preference(self, objectives: list[str]) -> None:
        self._choose("objectives", objectives)

    def choice(self) -> Choice | None:
        plain = self._chosen("choice")
        return None if plain is None else choice_from_plain(plain)

    def set_choice(self, choice: Choice | None) -> None:
        self._choose("choice", None if choice is None else choice.to_plain())

    def _chosen(self, name: str) -> Any:
        rows = self._store.read("SELECT body FROM chosen WHERE name = ?", (name,))
        return json.loads(rows[0]["body"]) if rows else None

    def _choose(self, name: str, value: Any) -> None:
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO chosen VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                (name, json.dumps(value)),
            )
