"""What users say of answers: good or bad, one word a request, kept and passed on.

Whoever learns from it (the cache's gate, the router, the controller) subscribes; an answer that is
regenerated counts as a word against it, but is not kept as one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import StoreError
from intentd.proxy.dialects.openai_chat import read_object
from intentd.proxy.errors import ApiError, bad_field
from intentd.proxy.store.base import FeedbackRow, FeedbackTable

_log = logging.getLogger(__name__)

MAX_COMMENT: Final = 2000
_FIELDS: Final = frozenset({"id", "rating", "comment"})


@dataclass(frozen=True, slots=True)
class Feedback:
    """A word on one answer.

    kind: ``rated`` by a user or ``regenerated``. document: the request's entry in the log, with
    service type, models, selection and cache item; {} when it is gone.
    """

    request_id: str
    key_id: str
    good: bool
    kind: str
    document: dict[str, Any]


Subscriber = Callable[[Feedback], None]


def read_feedback(raw: bytes) -> tuple[str, bool, str]:
    """(request id, good, comment). Raises ApiError."""
    body = read_object(raw)
    for name in sorted(body):
        if name not in _FIELDS:
            raise bad_field(name[:64], body[name], "id, rating and comment", code="unknown_field")
    request_id, rating, comment = body.get("id"), body.get("rating"), body.get("comment", "")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= 256:
        raise bad_field("id", request_id, "the id of a request")
    if rating not in ("good", "bad"):
        raise bad_field("rating", rating, "good or bad")
    if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
        raise bad_field("comment", comment, f"text of at most {MAX_COMMENT} characters")
    return request_id, rating == "good", comment


class FeedbackBook:
    """Keeps the last word on each request; tells subscribers of every word.

    counts: by (model, service type, rating), counted up here.
    """

    def __init__(
        self, rows: FeedbackTable, clock: Clock, counts: dict[tuple[str, str, str], int]
    ) -> None:
        self.subscribers: list[Subscriber] = []
        self._rows = rows
        self._clock = clock
        self._counts = counts

    async def give(self, feedback: Feedback, comment: str) -> None:
        """Durable when it returns; a later word replaces it. Raises ApiError 503."""
        row = FeedbackRow(
            feedback.key_id, feedback.request_id, feedback.good, comment, self._clock.wall()
        )
        try:
            await self._rows.write(row)
        except StoreError as error:
            raise _away(error) from None
        self.tell(feedback)

    def tell(self, feedback: Feedback) -> None:
        """Count it and pass it on; who fails to take it does not keep it from the others."""
        document = feedback.document
        rating = feedback.kind if feedback.kind != "rated" else ("good" if feedback.good else "bad")
        name = (str(document.get("model", "")), str(document.get("service_type", "")), rating)
        self._counts[name] = self._counts.get(name, 0) + 1
        for subscriber in self.subscribers:
            try:
                subscriber(feedback)
            except Exception:  # noqa: BLE001  learning must not take answering down
                _log.exception("feedback was not taken", extra={"request": feedback.request_id})

    async def find(self, request_id: str, key_id: str) -> dict[str, Any] | None:
        """The word on a request. Raises ApiError 503."""
        try:
            row = await self._rows.find(key_id, request_id)
        except StoreError as error:
            raise _away(error) from None
        if row is None:
            return None
        rating = "good" if row.good else "bad"
        return {"rating": rating, "comment": row.comment, "wall_s": row.wall_s}


def _away(error: StoreError) -> ApiError:
    return ApiError(503, f"feedback: {error}", retry_after_s=1)
