"""The cache for operators, by the admin socket: anybody's items, and objects for many."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from intentd.core.errors import InputError
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.proxy.cache.api import CacheApi
from intentd.proxy.cache.asker import EVERYBODY, key_owner, tenant_owner
from intentd.proxy.cache.part import CachePart
from intentd.proxy.call import Exchange
from intentd.proxy.errors import shown
from intentd.proxy.keys import ANONYMOUS, Key, Keys

OPERATOR = Key("operator", "operator", "default")


async def cache_admin(
    api: CacheApi, part: CachePart | None, keys: Keys, command: str, args: Mapping[str, Any]
) -> dict[str, Any]:
    """cache.stats, cache.list, cache.get, cache.put, cache.delete. Raises what CacheApi raises."""
    if command == "cache.stats" and part is not None:
        return part.status()
    owner = _owner(args.get("owner", EVERYBODY), keys)
    exchange = Exchange(
        "admin_" + secrets.token_hex(6), OPERATOR, time.monotonic(), time.time(), "admin", "cache"
    )
    fields = args.get("fields", {})
    if not isinstance(fields, dict):
        raise InputError("fields", fields, "an object")
    match command:
        case "cache.list" | "cache.get":
            return await api.get(fields, exchange, (owner,))
        case "cache.put":
            return await api.put(fields, exchange, owner)
        case "cache.delete":
            if fields.get("id"):
                assert part is not None
                count = await part.cache.delete(owner, item_id=str(fields["id"]))
                return {"deleted": count}
            return await api.delete(fields, exchange, owner)
    raise AdminRefusedError(f"unknown command {shown(command)}", "unknown_command")


def _owner(text: object, keys: Keys) -> str:
    """all, tenant:NAME or key:NAME, the key by its name."""
    if text == EVERYBODY:
        return EVERYBODY
    kind, _, name = str(text).partition(":")
    if kind == "tenant" and name:
        return tenant_owner(name)
    if kind == "key" and name:
        found = [key for key in (ANONYMOUS, *keys.all()) if key.name == name]
        if found:
            return key_owner(found[0])
    raise InputError("owner", text, "all, tenant:NAME or key:NAME")
