"""WhatsApp's Cloud API: signed deliveries in, texts and buttons out.

Meta's rules that matter here: a delivery is signed with the app's secret (X-Hub-Signature-256) and
repeated until it is answered by 200; a message has at most three buttons of 20 characters; what is
not an answer may only be sent within 24 hours of the user's last message.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from examples.qa_service.service import DAILY, QaService, RefusedError

log = logging.getLogger(__name__)

MAX_BODY_CHARS = 1024  # of a message with buttons
WINDOW_S = 23 * 3600.0
QUEUE = 1000  # messages that wait for an answer, on disk
WAIT_S = 6 * 3600.0  # a message that waited longer is not answered any more
TRIES = 5
TRY_AGAIN_S = 60.0
WORKERS = 8
OFFERED_USERS = 10_000  # whose last buttons are remembered
OFFERS_AT_ONCE = 200  # answers whose follow-ups are waited for
FOLLOWUP_WAITS_S = (2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """What Meta's console shows of an app. graph: where its API is."""

    phone_number_id: str
    token: str
    app_secret: str
    verify_token: str
    graph: str = "https://graph.facebook.com/v21.0"


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message of a user. button: the id of the one that was tapped, else ""."""

    id: str
    user: str
    name: str
    text: str
    button: str = ""


def signed(body: bytes, header: str | None, secret: str) -> bool:
    """Whether the body comes from somebody who knows the app's secret."""
    want = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(want.encode(), (header or "").encode())


def messages(body: bytes) -> Iterator[Incoming]:
    """The messages of a delivery; statuses and kinds this service does not know are left out.

    Raises ValueError for what is no delivery.
    """
    try:
        for entry in json.loads(body)["entry"]:
            for change in entry.get("changes", ()):
                value = change.get("value") or {}
                names = {
                    one.get("wa_id"): str((one.get("profile") or {}).get("name", ""))
                    for one in value.get("contacts", ())
                }
                for one in value.get("messages", ()):
                    made = _incoming(one, names)
                    if made is not None:
                        yield made
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a delivery: {error!r}") from None


def _incoming(one: dict[str, Any], names: dict[Any, str]) -> Incoming | None:
    user = str(one["from"])
    name = names.get(user, "")
    if one.get("type") == "text":
        return Incoming(str(one["id"]), user, name, str(one["text"]["body"]))
    reply = (one.get("interactive") or {}).get("button_reply")
    if reply is None:
        return None
    return Incoming(str(one["id"]), user, name, str(reply.get("title", "")), str(reply["id"]))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The reply to a message. question: whose follow-ups come next; 0: none."""

    text: str
    question: int = 0

    @property
    def buttons(self) -> list[tuple[str, str]]:
        return [(f"better:{self.question}", "Get better answer")] if self.question else []


class WhatsApp:
    """Writes messages down before they are acknowledged, answers them in the background.

    A message is done when its answer was sent; what a crash or a failure leaves is tried again,
    so that an answer may come twice and is not lost. No failure ends a worker; ``failures`` counts
    them. Life: construct, ``run`` in a task; ``close`` at the end.
    """

    def __init__(self, settings: Settings, service: QaService) -> None:
        self.settings = settings
        self._service = service
        self._store = service.store
        self._queue: asyncio.Queue[str] = asyncio.Queue()  # ids; the store bounds their number
        self._held: set[str] = set()  # in the queue or at a worker
        self._sent: set[str] = set()  # answered, and the store does not know yet
        self._tasks: asyncio.TaskGroup | None = None  # None: nobody works
        self._offers = 0
        self.failures = 0
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {settings.token}"},
            timeout=aiohttp.ClientTimeout(total=20),
        )
        self._offered: OrderedDict[str, dict[str, str]] = OrderedDict()  # user -> button, question

    async def close(self) -> None:
        await self._http.close()

    def take(self, incoming: Incoming) -> bool:
        """Whether the message is written down; if not, Meta shall deliver it again."""
        if self._tasks is None:
            return False
        try:
            if self._store.delivered(incoming.id):
                return True
            if self._store.count_waiting() >= QUEUE:
                return False
            self._store.accept(incoming.id, json.dumps(asdict(incoming)), time.time())
        except Exception:  # noqa: BLE001  it is logged and counted
            self._failed("a message was not taken")
            return False
        self._enqueue(incoming.id)
        return True

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for number in range(WORKERS):
                    self._tasks.create_task(self._work(), name=f"whatsapp {number}")
                while True:
                    self.take_up(time.time())
                    await asyncio.sleep(TRY_AGAIN_S)
        finally:
            self._tasks = None

    def take_up(self, now: float) -> None:
        """Queue what waits and nobody works at: left by a crash, or failed before."""
        try:
            for message_id in list(self._sent):
                self._store.done(message_id)
                self._sent.discard(message_id)
            expired = self._store.expire(now - WAIT_S)
            if expired:
                log.warning("%d messages waited too long, not answered", expired)
            for message_id in self._store.waiting():
                self._enqueue(message_id)
        except Exception:  # noqa: BLE001  it is logged and counted
            self._failed("what waits cannot be read")

    def _enqueue(self, message_id: str) -> None:
        if message_id not in self._held:
            self._held.add(message_id)
            self._queue.put_nowait(message_id)

    def _failed(self, what: str) -> None:
        self.failures += 1
        log.exception("%s (failure %d)", what, self.failures)

    async def _work(self) -> None:
        while True:
            message_id = await self._queue.get()
            try:
                await self._answer(message_id)
            except Exception:  # noqa: BLE001  it is logged and counted
                self._failed("a message was not answered")
            finally:
                self._held.discard(message_id)

    async def _answer(self, message_id: str) -> None:
        pending = None if message_id in self._sent else self._store.begin(message_id)
        if pending is None:
            return
        if pending.tries > TRIES:
            log.warning("a message failed %d times, not answered", TRIES)
            self._store.done(message_id)
            return
        incoming = Incoming(**json.loads(pending.message))
        if pending.reply:
            outgoing = Outgoing(**json.loads(pending.reply))
        else:
            outgoing = await self._reply(incoming)
            self._store.replied(message_id, json.dumps(asdict(outgoing)))
        await self._say(incoming.user, outgoing.text, outgoing.buttons)
        self._sent.add(message_id)
        self._store.done(message_id)
        self._sent.discard(message_id)
        if outgoing.question and self._tasks is not None and self._offers < OFFERS_AT_ONCE:
            self._offers += 1
            self._tasks.create_task(self._offer(incoming.user, outgoing.question))

    async def _reply(self, incoming: Incoming) -> Outgoing:
        user = f"wa-{incoming.user}"
        kind, _, rest = incoming.button.partition(":")
        service = self._service
        try:
            if kind == "better" and rest.isdigit():
                return Outgoing((await service.better(user, int(rest))).text)
            if kind == "daily" and rest.isdigit():
                answer = await service.open_recommendation(user, int(rest), name=incoming.name)
            else:
                tapped = self._offered.get(incoming.user, {}).get(incoming.button, "")
                if incoming.button and not tapped:
                    return Outgoing("That button is too old. Please type it.")
                answer = await service.ask(
                    user, tapped or incoming.text, name=incoming.name, typed=not tapped
                )
        except RefusedError as refused:
            return Outgoing(str(refused))
        return Outgoing(answer.text, answer.id)

    async def _offer(self, number: str, question: int) -> None:
        try:
            await self._offer_followups(number, question)
        except Exception:  # noqa: BLE001  it is logged and counted
            self._failed("follow-ups were not offered")
        finally:
            self._offers -= 1

    async def _offer_followups(self, number: str, question: int) -> None:
        """Follow-ups as buttons 1 to 3, when they have been answered; none after a while."""
        for wait in FOLLOWUP_WAITS_S:
            await asyncio.sleep(wait)
            questions = await self._service.followups(f"wa-{number}", question)
            if questions:
                break
        else:
            return
        offered = {f"ask:{question}:{place}": text for place, text in enumerate(questions, 1)}
        self._offered[number] = offered
        self._offered.move_to_end(number)
        if len(self._offered) > OFFERED_USERS:
            self._offered.popitem(last=False)
        buttons = [(button, str(place)) for place, button in enumerate(offered, 1)]
        listed = "\n".join(f"{place}. {text}" for place, text in enumerate(questions, 1))
        await self._say(number, f"You may also ask:\n{listed}", buttons)

    async def push_daily(self, now: float) -> int:
        """The question of the day, to everybody who may be written to. How many got it."""
        chosen = self._service.store.recommended(DAILY)
        if not chosen:
            return 0
        number, text = chosen[0]
        sent = 0
        for user in self._service.store.seen_since(now - WINDOW_S):
            if not user.startswith("wa-"):
                continue
            try:
                await self._say(
                    user.removeprefix("wa-"), f"Question of the day: {text}",
                    [(f"daily:{number}", "Show the answer")],
                )  # fmt: skip
                sent += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("not pushed: %s", error)
        return sent

    async def _say(self, to: str, text: str, buttons: list[tuple[str, str]] | None = None) -> None:
        body: dict[str, Any] = {"messaging_product": "whatsapp", "to": to}
        while buttons and len(text) > MAX_BODY_CHARS:  # the buttons come with the last piece
            head, text = text[:MAX_BODY_CHARS], text[MAX_BODY_CHARS:]
            await self._say(to, head)
        if buttons:
            body |= {
                "type": "interactive",
                "interactive": {
                    "type": "button",
                    "body": {"text": text or "..."},
                    "action": {
                        "buttons": [
                            {"type": "reply", "reply": {"id": name, "title": title}}
                            for name, title in buttons[:3]
                        ]
                    },
                },
            }
        else:
            body |= {"type": "text", "text": {"body": text[:4096]}}
        url = f"{self.settings.graph}/{self.settings.phone_number_id}/messages"
        async with self._http.post(url, json=body) as response:
            if response.status == 429 or response.status >= 500:
                response.raise_for_status()
            if response.status >= 400:
                log.warning("WhatsApp refused a message: %s", (await response.text())[:300])
