"""API keys of the proxy: who may ask what, and how much. Only their hashes are stored."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.prompts.budgets import BudgetRule
from intentd.core.prompts.limits import Rate
from intentd.daemons.kit.clock import Clock
from intentd.proxy.config import budget_limit
from intentd.proxy.errors import ApiError
from intentd.proxy.store.base import KeyRow, KeyTable

_log = logging.getLogger(__name__)

PREFIX: Final = "sk-intentd-"
MAX_KEYS: Final = 100_000
MAX_BUDGETS: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Grants:
    """What a key may do. Empty models or service_types: all of them."""

    models: tuple[str, ...] = ()
    service_types: tuple[str, ...] = ()
    rate: Rate | None = None
    budgets: tuple[BudgetRule, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "service_types": list(self.service_types),
            "rate": None
            if self.rate is None
            else {"per_second": self.rate.per_second, "burst": self.rate.burst},
            "budgets": [
                {"unit": rule.unit, "limit": rule.limit, "period": rule.period}
                for rule in self.budgets
            ],
        }


@dataclass(frozen=True, slots=True)
class Key:
    """One key, without its secret. key_id names it in accounts and logs."""

    key_id: str
    name: str
    tenant: str
    grants: Grants = Grants()
    created_wall_s: float = 0.0
    expires_wall_s: float | None = None
    revoked: bool = False

    def to_plain(self) -> dict[str, Any]:
        return {
            "id": self.key_id,
            "name": self.name,
            "tenant": self.tenant,
            "created_wall_s": self.created_wall_s,
            "expires_wall_s": self.expires_wall_s,
            "revoked": self.revoked,
            **self.grants.to_plain(),
        }


ANONYMOUS: Final = Key("anonymous", "anonymous", "default")
# Whose the prompts of the controller's console are.
CONSOLE: Final = Key("console", "console", "default")
# Who pays for what no request asked for, such as vectors of what was stored before.
CACHE_KEY: Final = Key("cache", "cache", "default")
# Nobody may hold these: what is kept under them is not an application's to read.
RESERVED: Final = frozenset(key.name for key in (ANONYMOUS, CONSOLE, CACHE_KEY))


def key_hash(token: str) -> str:
    # Keys carry 256 random bits: a plain digest cannot be guessed back, and costs a microsecond.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_grants(plain: Mapping[str, Any], scope: str) -> Grants:
    """Grants as intentctl and the database spell them. Raises InputError naming the field."""
    known = {"models", "service_types", "rate", "budgets"}
    for name in plain:
        if name not in known:
            raise InputError(name, plain[name], f"one of {', '.join(sorted(known))}")
    rate = plain.get("rate")
    if rate is not None:
        if not isinstance(rate, Mapping) or set(rate) != {"per_second", "burst"}:
            raise InputError("rate", rate, "per_second and burst")
        rate = Rate(_number(rate, "per_second"), _number(rate, "burst"))
    budgets = plain.get("budgets", [])
    if not isinstance(budgets, (list, tuple)) or len(budgets) > MAX_BUDGETS:
        raise InputError("budgets", budgets, f"a list of at most {MAX_BUDGETS}")
    return Grants(
        _names(plain, "models"),
        _names(plain, "service_types"),
        rate,
        tuple(_budget(item, index, scope) for index, item in enumerate(budgets)),
    )


def _budget(item: object, index: int, scope: str) -> BudgetRule:
    where = f"budgets[{index}]"
    if not isinstance(item, Mapping) or not {"unit", "limit"} <= set(item) <= {
        "unit",
        "limit",
        "period",
    }:
        raise InputError(where, item, "unit, limit and period")
    unit, limit = item["unit"], item["limit"]
    if unit == "nano_dollars" and type(limit) is int and limit >= 0:
        return BudgetRule(scope, unit, limit, str(item.get("period", "total")))
    unit, limit = budget_limit(str(unit), limit)
    return BudgetRule(scope, unit, limit, str(item.get("period", "total")))


def _names(plain: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = plain.get(field, [])
    if (
        not isinstance(value, (list, tuple))
        or len(value) > 1000
        or not all(isinstance(item, str) and 0 < len(item) <= 128 for item in value)
    ):
        raise InputError(field, value, "a list of names")
    return tuple(value)


def _number(plain: Mapping[str, Any], field: str) -> float:
    value = plain[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"rate.{field}", value, "a number")
    return float(value)


class Keys:
    """All keys, in memory by hash; load() before use, and again when others may change them."""

    def __init__(self, table: KeyTable, clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self._by_hash: dict[str, Key] = {}
        self._hash_of: dict[str, str] = {}

    async def load(self) -> None:
        """Take the table as it is now. Raises StoreError.

        A key of an earlier version with a name that is the proxy's own is refused from here on.
        """
        by_hash: dict[str, Key] = {}
        for row in await self._table.load():
            if row.name in RESERVED and not row.revoked and row.hashed not in self._by_hash:
                _log.error(
                    "key refused: its name is the proxy's own; revoke it and make another",
                    extra={"key": row.name},
                )
            grants = read_grants(json.loads(row.grants), f"key:{row.key_id}")
            by_hash[row.hashed] = Key(
                row.key_id, row.name, row.tenant, grants, row.created_wall_s, row.expires_wall_s,
                row.revoked,
            )  # fmt: skip
        self._by_hash = by_hash
        self._hash_of = {key.key_id: hashed for hashed, key in by_hash.items()}

    def find(self, token: str, *, required: bool) -> Key:
        """The key a request carries. Raises ApiError 401.

        Not required: clients must send something, so what is no key of ours is anonymous.
        """
        if not token:
            if required:
                raise ApiError(401, "expected Authorization: Bearer KEY", code="missing_api_key")
            return ANONYMOUS
        key = self._by_hash.get(key_hash(token))
        if key is None:
            if required or token.startswith(PREFIX):
                raise ApiError(401, "this API key is not known", code="invalid_api_key")
            return ANONYMOUS
        if key.name in RESERVED:
            raise ApiError(
                401,
                f"this API key is refused: the name {key.name} is the proxy's own; ask for a key "
                "with another name",
                code="invalid_api_key",
            )
        if key.revoked:
            raise ApiError(401, "this API key was revoked", code="invalid_api_key")
        if key.expires_wall_s is not None and self._clock.wall() >= key.expires_wall_s:
            raise ApiError(401, "this API key has expired", code="invalid_api_key")
        return key

    async def new(
        self, name: str, tenant: str, grants: Mapping[str, Any], expires_wall_s: float | None
    ) -> tuple[Key, str]:
        """A new key and its secret, which is shown once. Raises InputError, StoreError."""
        if not _NAME.match(name):
            raise InputError("name", name, "letters, digits and ._@-, at most 64")
        if not _NAME.match(tenant):
            raise InputError("tenant", tenant, "letters, digits and ._@-, at most 64")
        if name in RESERVED:
            raise InputError("name", name, f"none of {', '.join(sorted(RESERVED))}")
        if any(key.name == name for key in self._by_hash.values()):
            raise InputError("name", name, "a name no key has (revoked ones keep theirs)")
        if len(self._by_hash) >= MAX_KEYS:
            raise InputError("keys", len(self._by_hash), f"fewer than {MAX_KEYS}")
        token = PREFIX + secrets.token_urlsafe(32)
        key = Key(
            name, name, tenant, read_grants(grants, f"key:{name}"), self._clock.wall(),
            expires_wall_s,
        )  # fmt: skip
        await self._write(key, key_hash(token))
        return key, token

    async def change(self, name: str, grants: Mapping[str, Any], **more: str | float | None) -> Key:
        """Replace the grants that are named, keep the others. more: tenant, expires_wall_s (None:
        never). Raises InputError, StoreError."""
        key = replace(self.get(name), **more)  # type: ignore[arg-type]  # fields of Key
        if not _NAME.match(key.tenant):
            raise InputError("tenant", key.tenant, "letters, digits and ._@-, at most 64")
        plain = {**key.grants.to_plain(), **grants}
        changed = replace(key, grants=read_grants(plain, f"key:{key.key_id}"))
        await self._write(changed, self._hash_of[key.key_id])
        return changed

    async def revoke(self, name: str) -> Key:
        """From now on it is refused. Raises InputError, StoreError."""
        key = replace(self.get(name), revoked=True)
        await self._write(key, self._hash_of[key.key_id])
        return key

    def get(self, name: str) -> Key:
        for key in self._by_hash.values():
            if key.name == name:
                return key
        raise InputError("name", name, "the name of a key")

    def all(self) -> list[Key]:
        return sorted(self._by_hash.values(), key=lambda key: key.name)

    def __len__(self) -> int:
        return len(self._by_hash)

    async def _write(self, key: Key, hashed: str) -> None:
        row = KeyRow(
            key.key_id, hashed, key.name, key.tenant, key.created_wall_s, key.expires_wall_s,
            key.revoked, json.dumps(key.grants.to_plain()),
        )  # fmt: skip
        await self._table.write(row)
        self._by_hash[hashed] = key
        self._hash_of[key.key_id] = hashed
