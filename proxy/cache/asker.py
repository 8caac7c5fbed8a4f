"""Whose items a request may see, where its answer goes, and what that answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.prompts.cache.keys import scope_hash
from intentd.core.prompts.request import Request
from intentd.proxy.keys import Key

EVERYBODY: Final = "all"
# of a request's parameters these say nothing about its answer
_UNIMPORTANT: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)


@dataclass(frozen=True, slots=True)
class Asker:
    """owner: whose its answers are. readable: owners whose put objects it sees, its own first.

    ranks: price order of the pool's models. by: the exchange that pays for embeddings.
    """

    tenant: str
    owner: str
    readable: tuple[str, ...]
    system: str = ""
    response_format: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    by: Any = None

    def scope(self, context_hash: str) -> str:
        return scope_hash(
            tenant=self.owner,
            system=self.system,
            context=context_hash,
            response_format=self.response_format,
            params=self.params or None,
        )


def tenant_owner(tenant: str) -> str:
    return f"tenant:{tenant}"


def key_owner(key: Key, user: object = None) -> str:
    """An application that names its users (OpenAI's `user`) has one owner for each of them."""
    if not isinstance(user, str) or not user:
        return f"key:{key.key_id}"
    digest = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=12)
    return f"key:{key.key_id}/user:{digest.hexdigest()}"


def asker_of(
    key: Key,
    sharing: str,
    *,
    request: Request | None = None,
    user: object = None,
    ranks: Mapping[str, int] | None = None,
    by: Any = None,
) -> Asker:
    """sharing: off (each user alone), tenant or all. request: whose answer the scope is for."""
    params = request.params if request is not None else {}
    user = params.get("user", user)
    owner = {"tenant": tenant_owner(key.tenant), "all": EVERYBODY}.get(sharing)
    owner = owner or key_owner(key, user)
    readable = (owner, key_owner(key, user), key_owner(key), tenant_owner(key.tenant), EVERYBODY)
    system = ""
    if request is not None and request.system:
        system = json.dumps(request.system, sort_keys=True, default=str)
    return Asker(
        key.tenant,
        owner,
        tuple(dict.fromkeys(readable)),
        system,
        params.get("response_format"),
        {
            name: value
            for name, value in params.items()
            if name not in _UNIMPORTANT and name != "response_format" and value is not None
        },
        ranks or {},
        by,
    )
