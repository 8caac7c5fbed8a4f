"""/v1/cache: put objects with typed keys or leave the keys to the cache, find them, delete them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from typing import Any, Final

from aiohttp import web

from intentd.core.prompts.cache.chunking import KINDS
from intentd.core.prompts.cache.delegate import Delegated, delegate
from intentd.core.prompts.effects import Effect, Outcome
from intentd.core.prompts.models import ModelPool, named, ordered
from intentd.core.prompts.service_types import CACHED_TYPES
from intentd.daemons.kit.clock import Clock
from intentd.proxy.cache.asker import EVERYBODY, Asker, key_owner, tenant_owner
from intentd.proxy.cache.cache import Found, new_id
from intentd.proxy.cache.part import CachePart
from intentd.proxy.call import Exchange
from intentd.proxy.dialects.openai_chat import read_object
from intentd.proxy.errors import ApiError, bad_field, shown
from intentd.proxy.store.cache import ItemRow, KeyRow
from intentd.proxy.streams import json_response

MAX_KEYS: Final = 64
MAX_KEY_CHARS: Final = 20_000
MAX_ITEMS: Final = 1000
MAX_SOURCE: Final = 512
MAX_ASKED: Final = 16
RULES: Final = "rules"
_PUT_FIELDS: Final = frozenset(
    {"object", "keys", "source", "ttl_s", "kind", "model", "replace", "user", "share"}
)
_OBJECT_FIELDS: Final = frozenset({"prompt", "response", "context", "document"})
_GET_FIELDS: Final = frozenset(
    {"key", "type", "min_similarity", "limit", "source", "after", "user"}
)
_SEARCH_FIELDS: Final = frozenset({"keys", "min_similarity", "limit", "source", "user"})
_DELETE_FIELDS: Final = frozenset({"source", "all", "user"})

Drive = Callable[[Generator[Effect, Outcome, Delegated], Exchange], Awaitable[Delegated]]
Body = Callable[[web.BaseRequest], Awaitable[bytes]]


class CacheApi:
    """Handlers, for applications by HTTP and for operators by the admin socket.

    drive: performs a generator of effects with an exchange's money. body: reads a request's.
    """

    def __init__(
        self, part: CachePart, pool: Callable[[], ModelPool], drive: Drive, body: Body, clock: Clock
    ) -> None:
        self._part = part
        self._pool = pool
        self._drive = drive
        self._body = body
        self._clock = clock

    async def handle(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """/v1/cache by method."""
        if request.method == "PUT":
            document = await self.put(read_object(await self._body(request)), exchange)
        elif request.method == "DELETE":
            query = _query(request, _DELETE_FIELDS)
            document = await self.delete(query, exchange)
        elif request.method == "POST":
            document = await self.search(read_object(await self._body(request)), exchange)
        else:
            document = await self.get(_query(request, _GET_FIELDS), exchange)
        return json_response(document, exchange)

    async def item(
        self, name: str, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """/v1/cache/ID: one item the key may see; DELETE forgets its own."""
        asker = self._asker(exchange, request.query.get("user"))
        cache = self._part.cache
        entry = cache.hot.by_id(name)
        seen = entry is not None and (
            entry.owner == asker.owner or (entry.put and entry.owner in asker.readable)
        )
        row = await cache.row(entry) if entry is not None and seen else None
        if row is None or entry is None:
            raise ApiError(404, f"item: got {shown(name)}, expected one of this key's items")
        if request.method == "DELETE":
            if entry.owner != asker.owner:
                raise ApiError(403, "item: it is shared, and not this key's to delete")
            return json_response(
                {"deleted": await cache.delete(asker.owner, item_id=name)}, exchange
            )
        return json_response(self._plain(row), exchange)

    # -- put -----------------------------------------------------------------------------------

    async def put(
        self, body: Mapping[str, Any], exchange: Exchange, owner: str = ""
    ) -> dict[str, Any]:
        """owner: an operator's choice; else the key's own. Raises ApiError, InputError."""
        _known(body, _PUT_FIELDS)
        asker = self._asker(exchange, body.get("user"))
        owner = owner or self._owner(body.get("share"), exchange, asker)
        source = _text(body, "source", MAX_SOURCE, "")
        replaces = body.get("replace", "document" in _object(body))
        if not isinstance(replaces, bool):
            raise bad_field("replace", replaces, "true or false")
        expires = _ttl(body)
        wall_s = self._clock.wall()
        expires = wall_s + expires if expires else 0.0
        given = _object(body)
        keys = _keys(body.get("keys"))
        told: dict[str, Any] = {}
        pieces: list[tuple[str, str, tuple[tuple[str, str], ...]]]
        if "document" in given and not keys:
            made = await self._delegated(body, given["document"], source, exchange)
            pieces = [(one.chunk.question, one.chunk.text, one.keys) for one in made.pieces]
            told = {"kind": made.kind, "keys_by_model": made.by_model, "pieces": len(pieces)}
            if made.failure:
                told["failure"] = made.failure
        else:
            for field in ("kind", "model"):
                if body.get(field) is not None:
                    raise bad_field(field, body[field], "nothing: keys of this object are given")
            response = given.get("document") or given["response"]
            keys = keys or _own_keys(given)
            pieces = [(given.get("prompt", ""), response, keys)]
        rows = [
            ItemRow(
                new_id(), owner, response, tuple(KeyRow(kind, text) for kind, text in typed),
                "", prompt, source, "", True, 0, 0, wall_s, expires,
            )
            for prompt, response, typed in pieces
        ]  # fmt: skip
        await self._part.cache.put(rows, source=source if replaces else None, by=exchange)
        return {
            **told,
            "object": "list",
            "items": [
                {"id": row.item_id, "keys": [[key.kind, key.text] for key in row.keys]}
                for row in rows
            ],
            "cost_nano": exchange.cost_nano,
        }

    def _owner(self, share: object, exchange: Exchange, asker: Asker) -> str:
        """Whose a put object is. Only what the operator lets keys share can be put for others."""
        if share is None:
            return asker.owner
        shares = {"tenant": tenant_owner(exchange.key.tenant), "all": EVERYBODY}
        if share not in ("off", "tenant", "all"):
            raise bad_field("share", share, "off, tenant or all")
        if share == "off":
            return key_owner(exchange.key)
        allowed = {"off": (), "tenant": ("tenant",), "all": ("tenant", "all")}
        if share not in allowed[self._part.section.sharing]:
            raise ApiError(403, f"share: cache.sharing does not allow {share}", param="share")
        return shares[str(share)]

    async def _delegated(
        self, body: Mapping[str, Any], text: str, name: str, exchange: Exchange
    ) -> Delegated:
        kind = body.get("kind")
        if kind is not None and kind not in ("auto", *KINDS):
            raise bad_field("kind", kind, f"auto, {', '.join(KINDS)}")
        model = self._model(body.get("model"), exchange)
        exchange.service_type = "cache"
        exchange.model = model
        return await self._drive(
            delegate(
                text,
                kind="" if kind in (None, "auto") else str(kind),
                name=name,
                model=model,
                max_chunks=self._part.section.max_chunks,
            ),
            exchange,
        )

    def _model(self, asked: object, exchange: Exchange) -> str:
        """Who writes the keys; "" nobody."""
        if asked is None:
            asked = self._part.section.keys_model
        if asked == RULES:
            return ""
        allowed = exchange.key.grants.models
        models = tuple(self._pool())
        models = (
            named(*[m.name for m in models if m.name in allowed])(models) if allowed else models
        )
        if asked:
            if asked not in [model.name for model in models]:
                raise bad_field("model", asked, "a model this key may use, or rules")
            return str(asked)
        cheapest = ordered("cheapest")(models)
        return cheapest[0].name if cheapest else ""

    # -- get and delete ------------------------------------------------------------------------

    async def get(
        self, query: Mapping[str, Any], exchange: Exchange, owners: Sequence[str] = ()
    ) -> dict[str, Any]:
        """With a key: the nearest items. Without: a page of all, of one source if it is named."""
        asker = self._asker(exchange, query.get("user"), owners)
        limit = _number(query, "limit", 1, MAX_ITEMS, 10 if "key" in query else 100)
        source = query.get("source")
        if "key" in query:
            kinds = _kinds(query.get("type"), "type")
            found = await self._find(
                str(query["key"]), kinds, _similarity(query), int(limit), source, asker
            )
            return {"object": "list", "data": found}
        for field in ("type", "min_similarity"):
            if field in query:
                raise bad_field(field, query[field], "a key beside it")
        after = int(_number(query, "after", 0, 2**62, 0))
        rows = await self._part.cache.page(
            asker.readable, source=source, after=after, most=int(limit) + 1
        )
        shown_rows = [
            self._plain(row) for row in rows[: int(limit)] if row.put or row.owner == asker.owner
        ]
        more = len(rows) > limit
        page: dict[str, Any] = {"object": "list", "data": shown_rows, "has_more": more}
        if more:
            page["after"] = rows[int(limit) - 1].number
        return page

    async def search(self, body: Mapping[str, Any], exchange: Exchange) -> dict[str, Any]:
        """``GET([(key, filters)])``: a list of keys, each with its own filters."""
        _known(body, _SEARCH_FIELDS)
        asked = body.get("keys")
        if not isinstance(asked, list) or not 1 <= len(asked) <= MAX_ASKED:
            raise bad_field("keys", asked, f"a list of 1 to {MAX_ASKED} keys")
        asker = self._asker(exchange, body.get("user"))
        source = body.get("source")
        if source is not None and not isinstance(source, str):
            raise bad_field("source", source, "text")
        limit = int(_number(body, "limit", 1, MAX_ITEMS, 10))
        best: dict[str, dict[str, Any]] = {}
        for index, one in enumerate(asked):
            where = f"keys[{index}]"
            if not isinstance(one, dict) or set(one) - {"key", "type", "min_similarity"}:
                raise bad_field(where, one, "an object with key, type and min_similarity")
            if not isinstance(one.get("key"), str) or not one["key"]:
                raise bad_field(f"{where}.key", one.get("key"), "text")
            filters = {**body, **one}
            for item in await self._find(
                one["key"], _kinds(one.get("type"), f"{where}.type"), _similarity(filters), limit,
                source, asker,
            ):  # fmt: skip
                known = best.get(item["id"])
                if known is None or known["similarity"] < item["similarity"]:
                    best[item["id"]] = item
        ranked = sorted(best.values(), key=lambda item: -float(item["similarity"]))
        return {"object": "list", "data": ranked[:limit]}

    async def delete(
        self, query: Mapping[str, Any], exchange: Exchange, owner: str = ""
    ) -> dict[str, Any]:
        """By source, or everything the key has stored."""
        owner = owner or self._asker(exchange, query.get("user")).owner
        source, every = query.get("source", ""), query.get("all", "")
        if bool(source) == (every == "true"):
            raise bad_field("source", source, "a source, or all=true")
        return {"deleted": await self._part.cache.delete(owner, source=source)}

    async def _find(
        self,
        key: str,
        kinds: tuple[str, ...],
        min_similarity: float,
        limit: int,
        source: str | None,
        asker: Asker,
    ) -> list[dict[str, Any]]:
        cache = self._part.cache
        if not cache.has_semantic:
            raise ApiError(
                501, "key: this proxy has no embedder (cache.semantic)", param="key",
                code="no_embedder",
            )  # fmt: skip
        found = await cache.get(
            key, asker, kinds=kinds, min_similarity=min_similarity, limit=limit, source=source
        )
        return [{**self._plain(one.row), **_matched(one)} for one in found]

    def _asker(self, exchange: Exchange, user: object, owners: Sequence[str] = ()) -> Asker:
        if user is not None and not isinstance(user, str):
            raise bad_field("user", user, "text")
        if owners:
            return Asker(exchange.key.tenant, owners[0], tuple(owners), by=exchange)
        return self._part.asker(exchange, None, user)

    def _plain(self, row: ItemRow) -> dict[str, Any]:
        wall_s = self._clock.wall()
        return {
            "id": row.item_id,
            "owner": row.owner.partition(":")[0],
            "response": row.response,
            "prompt": row.prompt,
            "source": row.source,
            "model": row.model,
            "put": row.put,
            "cost_nano": row.cost_nano,
            "age_s": round(max(0.0, wall_s - row.wall_s), 1),
            "expires_in_s": round(row.expires_wall_s - wall_s, 1) if row.expires_wall_s else None,
            "keys": [[key.kind, key.text] for key in row.keys],
        }


def _matched(found: Found) -> dict[str, Any]:
    return {
        "type": found.kind, "key": found.key, "similarity": round(found.similarity, 4)
    }  # fmt: skip


def _query(request: web.BaseRequest, names: frozenset[str]) -> dict[str, str]:
    query = request.query
    for name in query:
        if name not in names or len(query.getall(name)) > 1:
            raise bad_field(name[:64], query[name], f"one each of {', '.join(sorted(names))}")
    return dict(query)


def _known(body: Mapping[str, Any], names: frozenset[str]) -> None:
    for name in sorted(body):
        if name not in names:
            raise bad_field(
                name[:64], body[name], f"one of {', '.join(sorted(names))}", code="unknown_field"
            )


def _object(body: Mapping[str, Any]) -> dict[str, str]:
    """The object as texts: an interaction (response, and prompt, context), or a document."""
    given = body.get("object")
    if isinstance(given, str):
        given = {"document": given}
    if not isinstance(given, dict):
        raise bad_field("object", given, "a text, or an object with response or document")
    for name, text in given.items():
        if name not in _OBJECT_FIELDS:
            names = ", ".join(sorted(_OBJECT_FIELDS))
            raise bad_field(f"object.{name[:64]}", text, f"one of {names}", code="unknown_field")
        if not isinstance(text, str) or not text.strip():
            raise bad_field(f"object.{name}", text, "text")
    if ("document" in given) == ("response" in given) or ("document" in given and len(given) > 1):
        raise bad_field("object", sorted(given), "document alone, or response with prompt, context")
    return given


def _own_keys(given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The keys an interaction has by itself."""
    return tuple((kind, given[kind]) for kind in ("prompt", "response", "context") if kind in given)


def _keys(given: object) -> tuple[tuple[str, str], ...]:
    """[[type, key], ...] or [{"type": ..., "key": ...}, ...]."""
    if given is None:
        return ()
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_KEYS:
        raise bad_field("keys", given, f"a list of 1 to {MAX_KEYS} typed keys")
    keys = []
    for index, one in enumerate(given):
        where = f"keys[{index}]"
        if isinstance(one, dict) and set(one) == {"type", "key"}:
            kind, text = one["type"], one["key"]
        elif isinstance(one, list) and len(one) == 2:
            kind, text = one
        else:
            raise bad_field(where, one, "[type, key]")
        if kind not in CACHED_TYPES:
            raise bad_field(f"{where}.type", kind, f"one of {', '.join(CACHED_TYPES)}")
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_KEY_CHARS:
            raise bad_field(f"{where}.key", text, f"text of at most {MAX_KEY_CHARS} characters")
        keys.append((str(kind), text))
    return tuple(dict.fromkeys(keys))


def _text(body: Mapping[str, Any], field: str, most: int, default: str) -> str:
    value = body.get(field, default)
    if not isinstance(value, str) or len(value) > most:
        raise bad_field(field, value, f"text of at most {most} characters")
    return value


def _ttl(body: Mapping[str, Any]) -> float:
    value = body.get("ttl_s", 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e10:
        raise bad_field("ttl_s", value, "seconds, 0 for ever")
    return float(value)


def _kinds(given: object, field: str) -> tuple[str, ...]:
    """Cached types, as a list or with commas; () all."""
    if given is None:
        return ()
    listed = given.split(",") if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or not set(listed) <= set(CACHED_TYPES):
        raise bad_field(field, given, f"one or more of {', '.join(CACHED_TYPES)}")
    return tuple(listed)


def _similarity(fields: Mapping[str, Any]) -> float:
    return _number(fields, "min_similarity", -1, 1, 0.0)


def _number(
    fields: Mapping[str, Any], field: str, low: float, high: float, default: float
) -> float:
    value = fields.get(field, default)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise bad_field(field, value, f"a number from {low} to {high}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise bad_field(field, value, f"a number from {low} to {high}")
    return value
