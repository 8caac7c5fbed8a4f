"""What applications may read: models, their conversations, stored responses, their requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from intentd.core.errors import InputError
from intentd.proxy import native
from intentd.proxy.call import Exchange
from intentd.proxy.dialects.openai_responses import ResponseId
from intentd.proxy.engine import Engine
from intentd.proxy.errors import ApiError, bad_field, shown
from intentd.proxy.feedback import Feedback, FeedbackBook, read_feedback
from intentd.proxy.keys import Key
from intentd.proxy.responses import find, input_items, stored_document
from intentd.proxy.service import FIXED
from intentd.proxy.store.base import Books, Turns
from intentd.proxy.streams import json_response

if TYPE_CHECKING:
    from intentd.proxy.answers import Answers

MAX_PAGE: Final = 1000
OWNER: Final = "intentd"


class RequestLog:
    """The documents of answered requests: the last ones in memory, the others in the ledger."""

    def __init__(self, ledger: Books, most: int) -> None:
        self.most = most
        self._ledger = ledger
        # Bytes, not objects: thousands of live objects would slow every collection down.
        self._recent: OrderedDict[str, tuple[str, bytes, str]] = OrderedDict()
        # the newest request by (key, the client's own id)
        self._by_client: dict[tuple[str, str], str] = {}

    def keep(self, exchange: Exchange) -> None:
        document = exchange.encode_log()
        key_id, client_id = exchange.key.key_id, exchange.client_request_id
        self._recent[exchange.request_id] = (key_id, document, client_id)
        if client_id:
            self._by_client[key_id, client_id] = exchange.request_id
        while len(self._recent) > self.most:
            name, (owner, _, known_as) = self._recent.popitem(last=False)
            if known_as and self._by_client.get((owner, known_as)) == name:
                del self._by_client[owner, known_as]
        self._ledger.log_request(exchange.request_id, key_id, exchange.wall_s, document, client_id)

    async def find(self, request_id: str, key_id: str) -> dict[str, Any] | None:
        """A request of this key; None when there is none. Raises ApiError 503."""
        found = self._recent.get(request_id)
        if found is not None:
            return _read(found[1]) if found[0] == key_id else None
        rows = await self._ledger.find_request(request_id, key_id)
        return _read(rows[0]) if rows else None

    async def search(self, wanted: str, key_id: str) -> dict[str, Any] | None:
        """A request of this key by its id, else the newest that the client called so. Raises
        ApiError 503."""
        document = await self.find(wanted, key_id)
        if document is not None:
            return document
        name = self._by_client.get((key_id, wanted))
        if name is not None:
            return _read(self._recent[name][1])
        rows = await self._ledger.find_named(wanted, key_id)
        return _read(rows[0]) if rows else None

    async def find_any(self, wanted: str) -> dict[str, Any] | None:
        """A request of whatever key, for operators; by a client's id where only one has it.

        Raises ApiError 503, and InputError naming the requests of one client's id.
        """
        found = self._recent.get(wanted)
        if found is not None:
            return _read(found[1])
        rows = await self._ledger.find_request(wanted, None)
        if rows:
            return _read(rows[0])
        await self._ledger.flush()
        named = {one["request_id"]: one for one in map(_read, await self._find_named(wanted))}
        if len(named) > 1:
            which = ", ".join(f"{name} (key {one['key']})" for name, one in named.items())
            raise InputError(
                "id", wanted[:80], f"one of the requests that clients call so: {which}"
            )
        return next(iter(named.values()), None)

    async def _find_named(self, wanted: str) -> list[str | bytes]:
        recent = [
            self._recent[name][1] for (_, known_as), name in self._by_client.items()
            if known_as == wanted
        ]  # fmt: skip
        return [*recent, *await self._ledger.find_named(wanted, None)]


def no_such_request(request_id: str, field: str) -> ApiError:
    return ApiError(
        404,
        f"{field}: got {shown(request_id)}, expected the id of one of this key's requests "
        "(intentd.request_id)",
        param=field,
    )


def _read(raw: str | bytes) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(raw)
    return document


class Reading:
    """The handlers of GET, and of DELETE for what is kept of an application."""

    def __init__(
        self,
        engine: Engine,
        answers: Answers,
        conversations: Turns,
        log: RequestLog,
        feedback: FeedbackBook,
    ) -> None:
        self._engine = engine
        self._answers = answers
        self._conversations = conversations
        self._log = log
        self._feedback = feedback
        # what was prefetched behind an answer, by (key, request id)
        self.followups: Callable[[str, str], list[str]] | None = None

    async def models(self, _request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        data = [_model_object(*row) for row in self._nameable(exchange.key).items()]
        return json_response({"object": "list", "data": data}, exchange)

    def _nameable(self, key: Key) -> dict[str, str]:
        """What this key may say in ``model``: models, then service types; by whom it is owned."""
        models, types = key.grants.models, key.grants.service_types
        found = {name: OWNER for name in self._engine.models if not models or name in models}
        for name in sorted(self._answers.types):
            if name != FIXED and (not types or name in types):  # that one needs a model besides
                found.setdefault(name, f"{OWNER}:service_type")
        return found

    async def model(
        self, name: str, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        owner = self._nameable(exchange.key).get(name)
        if owner is None:
            raise ApiError(
                404, f"model: got {shown(name)}, expected a model of the pool or a service type",
                param="model", code="model_not_found",
            )  # fmt: skip
        return json_response(_model_object(name, owner), exchange)

    async def conversations(
        self, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """This key's conversations by name, a page at a time."""
        limit_text = request.query.get("limit", "100")
        limit = int(limit_text) if limit_text.isascii() and limit_text.isdecimal() else 0
        if not 1 <= limit <= MAX_PAGE:
            raise bad_field("limit", limit_text, f"a count of 1 to {MAX_PAGE}")
        after = request.query.get("after", "")
        rows = await self._conversations.names(exchange.key.key_id, limit + 1, after)
        more = len(rows) > limit
        return json_response({"object": "list", "data": rows[:limit], "has_more": more}, exchange)

    async def conversation(
        self, name: str, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """The messages of this key's conversation; DELETE forgets them."""
        name = native.conversation_name(name, "conversation")
        conversations, key_id = self._conversations, exchange.key.key_id
        if request.method == "DELETE":
            async with conversations.turn(key_id, name) as turn:
                forgotten = await conversations.forget(turn)
            return json_response({"forgotten": forgotten}, exchange)
        messages = await conversations.load(key_id, name)
        data = [
            {"id": one.message_id, "prompt": one.prompt, "response": one.response}
            for one in messages
        ]
        return json_response({"conversation": name, "messages": data}, exchange)

    async def response(
        self, path: str, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """A stored response, or what it answered; DELETE forgets it."""
        name, _, part = path.partition("/")
        wanted = ResponseId.read(name, "response_id")
        conversations, key_id = self._conversations, exchange.key.key_id
        if part not in ("", "input_items") or (part and request.method == "DELETE"):
            raise ApiError(404, f"no such path: {shown(request.path)}", code="unknown_path")
        messages = await conversations.load(key_id, wanted.conversation)
        message = messages[find(messages, wanted, "response_id")]
        if request.method == "DELETE":
            await conversations.remove(key_id, wanted.conversation, wanted.request_id)
            gone = {"id": name, "object": "response", "deleted": True}
            return json_response(gone, exchange)
        if part:
            items = input_items(message)
            return json_response({"object": "list", "data": items, "has_more": False}, exchange)
        log = await self._log.find(wanted.request_id, key_id)
        return json_response(stored_document(name, message, log or {}), exchange)

    async def request(
        self, name: str, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """All there is to a request, for the key that made it: metadata, how it ended, feedback."""
        document = await self._log.search(name, exchange.key.key_id)
        if document is None:
            raise no_such_request(name, "request")
        own = document.get("request_id", name)
        document["feedback"] = await self._feedback.find(own, exchange.key.key_id)
        if self.followups is not None:
            document["followups"] = self.followups(exchange.key.key_id, own)
        return json_response(document, exchange)

    async def rate(self, raw: bytes, exchange: Exchange) -> web.StreamResponse:
        """A word on an answer of this key."""
        request_id, good, comment = read_feedback(raw)
        key_id = exchange.key.key_id
        document = await self._log.find(request_id, key_id)
        if document is None:
            raise no_such_request(request_id, "id")
        await self._feedback.give(Feedback(request_id, key_id, good, "rated", document), comment)
        return json_response({"id": request_id, "rating": "good" if good else "bad"}, exchange)


def _model_object(name: str, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
