"""Request rates of several proxies: one token bucket each, decided on the database's clock."""

from __future__ import annotations

from typing import Final

from intentd.core.prompts.limits import Rate, take
from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError
from intentd.proxy.errors import ApiError
from intentd.proxy.store.grouped import Grouped

_MAKE: Final = (
    "INSERT INTO rates(scope, level, since_s) "
    "SELECT scope, level, 0 FROM unnest($1::text[], $2::float8[]) AS u(scope, level) "
    "ORDER BY scope ON CONFLICT DO NOTHING"
)
_LOCK: Final = (
    "SELECT scope, level, since_s FROM rates WHERE scope = ANY($1::text[]) "
    "ORDER BY scope FOR UPDATE"
)
_WRITE: Final = (
    "UPDATE rates r SET level = u.level, since_s = u.since_s "
    "FROM unnest($1::text[], $2::float8[], $3::float8[]) AS u(scope, level, since_s) "
    "WHERE r.scope = u.scope"
)


class SharedRates:
    """A store.base.Rates; grouped.run() must be running."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.grouped: Grouped[tuple[str, Rate], float] = Grouped(self._take)

    async def take(self, scope: str, rate: Rate) -> float:
        try:
            return await self.grouped.ask((scope, rate))
        except StoreError as error:
            raise ApiError(
                503, f"the request rate cannot be checked: {error}", retry_after_s=1
            ) from None

    async def _take(self, asked: list[tuple[str, Rate]]) -> list[float]:
        """In the order asked; a scope's requests of one group one after the other."""
        rates = dict(asked)
        scopes = sorted(rates)
        async with self._database.transaction() as db:
            await db.execute("SET LOCAL synchronous_commit = off")  # see the schema
            await db.execute(_MAKE, scopes, [rates[scope].burst for scope in scopes])
            rows = await db.fetch(_LOCK, scopes)
            # Read with the rows locked: never before another proxy's last use of them.
            now = float(await db.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))
            levels = {row["scope"]: (row["level"], row["since_s"]) for row in rows}
            waits = []
            for scope, rate in asked:
                level, since, wait_s = take(rate, *levels[scope], now=now)
                levels[scope] = (level, since)
                waits.append(wait_s)
            await db.execute(
                _WRITE,
                scopes,
                [levels[scope][0] for scope in scopes],
                [levels[scope][1] for scope in scopes],
            )
        return waits
