"""Whether the proxy's books are what its receipts say; for ``intentctl doctor``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from intentd.core.prompts.budgets import period_name
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.store import Storage, Store

ACCOUNTS = "SELECT id, unit, spent, reserved FROM accounts ORDER BY id"
RESERVATIONS = "SELECT accounts, amounts FROM reservations"
SPEND = (
    "SELECT coalesce(sum(cost_nano), 0), coalesce(sum(estimated_nano), 0) FROM spend WHERE day >= ?"
)
# Added up where they are: two days of documents would not fit into memory.
RECEIPTS = (
    "SELECT count(*), coalesce(sum(json_extract(document, '$.cost_nano')), 0) "
    "FROM requests WHERE wall_s >= ?"
)


def since(wall_s: float) -> tuple[str, float]:
    """The day before this moment's, and its first second (UTC)."""
    first_s = (wall_s // 86400 - 1) * 86400.0
    return period_name("day", first_s), first_s


async def prove_books(store: Store, day: str, since_wall_s: float) -> list[Claim]:
    """day, since_wall_s: the day, and its first second, from which spending is compared."""

    def look(opened: Storage) -> list[Claim]:
        with opened.transaction() as db:  # one moment for all four
            return claims_of(
                db.execute(ACCOUNTS).fetchall(),
                db.execute(RESERVATIONS).fetchall(),
                db.execute(SPEND, (day,)).fetchone(),
                db.execute(RECEIPTS, (since_wall_s,)).fetchone(),
            )

    return await store.run(look)


def claims_of(
    accounts: Sequence[Any], reservations: Sequence[Any], spend: Any, receipts: Any
) -> list[Claim]:
    """Rows as ACCOUNTS, RESERVATIONS, SPEND and RECEIPTS select them."""
    units = {row[0]: row[1] for row in accounts}
    held = dict.fromkeys(units, 0)
    for names, amounts in reservations:
        of = json.loads(amounts)
        for name in json.loads(names) if isinstance(names, str) else names:
            if name in held:
                held[name] += of.get(units[name], 0)
    wrong = [
        f"{name}: {reserved} reserved, {held[name]} in open reservations"
        for name, _, _, reserved in accounts
        if reserved != held[name]
    ]
    count, told = int(receipts[0]), int(receipts[1])
    booked, estimated = int(spend[0]), int(spend[1])
    over = told - booked
    return [
        Claim(
            "ledger-reserved",
            "what accounts hold reserved is what is open",
            not wrong,
            "; ".join(wrong[:5]) or f"{len(accounts)} accounts, {len(reservations)} open",
            "restart intentd-proxy: it settles what is open" if wrong else "",
        ),
        Claim(
            "ledger-receipts",
            "every receipt since yesterday is in the books",
            over <= 0,
            f"{told} nano-dollars on {count} receipts, {booked} booked "
            f"({estimated} of them estimated)",
            "the books were changed from outside, or restored: compare with the provider's bill"
            if over > 0
            else "",
        ),
    ]
