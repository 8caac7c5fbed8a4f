"""What the service does, whoever talks to it: answers, better answers, buttons, points, pushes.

Section 4.5.1 of the dissertation: a short answer by a fast model at once, a better one prefetched
behind it and shown when asked for; likely follow-ups answered before they are asked, offered as
buttons; questions of wide appeal found by a cheap model and chosen by a dear one; points.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from examples.qa_service.proxy import Proxy, ProxyError, Reply
from examples.qa_service.store import DAY_S, Store

log = logging.getLogger(__name__)

MAX_QUESTION_CHARS = 1000
QUESTIONS_A_MINUTE = 20
POINTS_TYPED, POINTS_TAPPED = 10, 2
CANDIDATES = 60  # questions looked through for recommendations
LISTED = 20  # of them in one prompt
TRENDING = 3
PUSH_HOUR_UTC = 9
DAILY, TREND = "question of the day", "trending"


class RefusedError(Exception):
    """The text is for the user."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a user sees. id: the question's, for its buttons."""

    id: int
    text: str
    model: str
    cost: str
    cached: bool


class Limiter:
    """At most so many questions of a user in a minute; remembers a bounded number of users."""

    def __init__(self, most: int, users: int = 10_000) -> None:
        self._most = most
        self._users = users
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()

    def admits(self, user: str, now: float) -> bool:
        asked = self._asked.pop(user, deque())
        while asked and asked[0] <= now - 60:
            asked.popleft()
        self._asked[user] = asked
        if len(self._asked) > self._users:
            self._asked.popitem(last=False)
        if len(asked) >= self._most:
            return False
        asked.append(now)
        return True


class QaService:
    """proxy: answers. store: remembers. now: wall seconds."""

    def __init__(self, proxy: Proxy, store: Store, *, now: Callable[[], float] = time.time) -> None:
        self.store = store
        self._proxy = proxy
        self._now = now
        self._limiter = Limiter(QUESTIONS_A_MINUTE)

    async def ask(self, user: str, text: str, *, name: str = "", typed: bool = True) -> Answer:
        """Answer a question in the user's conversation. Raises RefusedError."""
        question = self._admit(user, name, text)
        reply = await self._tried(self._proxy.ask(question, "qa", f"qa-{user}"))
        return self._told(user, question, reply, typed)

    async def open_recommendation(self, user: str, number: int, *, name: str = "") -> Answer:
        """A recommended question: answered alike for everybody, hence stored already."""
        text = self.store.recommendation(number)
        if text is None:
            raise RefusedError("That question is not recommended any more.")
        question = self._admit(user, name, text)
        reply = await self._tried(self._proxy.ask(question, "qa_recommended"))
        return self._told(user, question, reply, typed=False)

    async def better(self, user: str, question: int) -> Answer:
        """The same question by a better model, in place of the answer so far."""
        known = self.store.question(question, user)
        if known is None:
            raise RefusedError("I do not remember that question.")
        if not self._limiter.admits(user, self._now()):
            raise RefusedError("That was fast! Give me a minute.")
        reply = await self._tried(self._proxy.better(known.request_id))
        self.store.replace(question, reply.text, reply.id)
        return Answer(question, reply.text, reply.model, reply.cost, reply.cached)

    async def followups(self, user: str, question: int) -> list[str]:
        """Buttons to show under an answer: only questions that are answered already."""
        known = self.store.question(question, user)
        if known is None:
            return []
        try:
            return (await self._proxy.followups(known.request_id))[:3]
        except ProxyError as error:
            log.warning("no follow-ups: %s", error)
            return []

    def leaders(self) -> dict[str, list[tuple[str, int]]]:
        """The ten with most points, today (UTC) and overall."""
        today = int(self._now() // DAY_S)
        return {"today": self.store.leaders(10, day=today), "overall": self.store.leaders(10)}

    def push_is_due(self) -> bool:
        """True once a day, in the morning; a restart does not make it true again."""
        day, second = divmod(self._now(), DAY_S)
        return second >= PUSH_HOUR_UTC * 3600 and self.store.first_push(int(day))

    async def recommend(self) -> list[str]:
        """Choose the question of the day and what is trending; then have them answered.

        A cheap model filters what people typed since yesterday, a dear one chooses. Whatever the
        models say, only questions that were really asked are recommended; without a usable word
        from them, the most asked.
        """
        now = self._now()
        asked = [text for text, _ in self.store.typed_since(now - DAY_S, CANDIDATES)]
        if not asked:
            return []
        wide: list[str] = []
        for start in range(0, len(asked), LISTED):
            page = asked[start : start + LISTED]
            wide += await self._picked(
                page, "cost", "Which of these questions would interest many people and name "
                "nobody's private matters? Answer with their numbers only.", len(page),
            )  # fmt: skip
        wide = (wide or asked)[:LISTED]
        best = await self._picked(
            wide, "quality", f"Choose the {TRENDING + 1} questions that most people would like to "
            "have answered, the best first. Answer with their numbers only.", TRENDING + 1,
        )  # fmt: skip
        chosen = list(dict.fromkeys([*best, *wide, *asked]))[: TRENDING + 1]
        self.store.recommend(DAILY, chosen[:1], now)
        self.store.recommend(TREND, chosen[1:], now)
        for text in chosen:
            try:
                await self._proxy.ask(text, "qa_recommended")
            except ProxyError as error:
                log.warning("recommended but not answered yet: %s", error)
        return chosen

    async def _picked(
        self, questions: list[str], service_type: str, order: str, most: int
    ) -> list[str]:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(questions, 1))
        try:
            reply = await self._proxy.ask(f"{order}\n\n{listed}", service_type)
        except ProxyError as error:
            log.warning("nobody chose: %s", error)
            return []
        numbers = [int(found) for found in re.findall(r"\d+", reply.text)[: 4 * most]]
        named = dict.fromkeys(n for n in numbers if 1 <= n <= len(questions))
        return [questions[number - 1] for number in named][:most]

    def _admit(self, user: str, name: str, text: str) -> str:
        question = " ".join(text.split())
        if not question:
            raise RefusedError("Ask me something.")
        if len(question) > MAX_QUESTION_CHARS:
            raise RefusedError(f"Please ask in at most {MAX_QUESTION_CHARS} characters.")
        now = self._now()
        if not self._limiter.admits(user, now):
            raise RefusedError("That was fast! Give me a minute.")
        self.store.meet(user, name, now)
        return question

    def _told(self, user: str, question: str, reply: Reply, typed: bool) -> Answer:
        now = self._now()
        number = self.store.add(user, question, reply.text, reply.id, typed=typed, now=now)
        self.store.reward(user, POINTS_TYPED if typed else POINTS_TAPPED, now)
        return Answer(number, reply.text, reply.model, reply.cost, reply.cached)

    async def _tried(self, call: Awaitable[Reply]) -> Reply:
        try:
            return await call
        except ProxyError as error:
            log.warning("no answer: %s", error)
            text = "Everybody is asking at once. Please try again in a minute."
            raise RefusedError(text if error.busy else "I cannot answer that.") from None
