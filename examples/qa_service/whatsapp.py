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
from dataclasses import dataclass
from typing import Any

import aiohttp
from examples.qa_service.service import DAILY, Answer, QaService, RefusedError

log = logging.getLogger(__name__)

MAX_BODY_CHARS = 1024  # of a message with buttons
WINDOW_S = 23 * 3600.0
QUEUE = 1000
WORKERS = 8
OFFERED_USERS = 10_000  # whose last buttons are remembered
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


class WhatsApp:
    """Takes deliveries into a bounded queue at once, answers them in the background.

    Life: construct, ``run`` in a task; ``close`` at the end.
    """

    def __init__(self, settings: Settings, service: QaService) -> None:
        self.settings = settings
        self._service = service
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue(QUEUE)
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {settings.token}"},
            timeout=aiohttp.ClientTimeout(total=20),
        )
        self._offered: OrderedDict[str, dict[str, str]] = OrderedDict()  # user -> button, question

    async def close(self) -> None:
        await self._http.close()

    def take(self, incoming: Incoming) -> bool:
        """False: the queue is full; Meta delivers again."""
        if self._queue.full():
            return False
        if self._service.store.first_delivery(incoming.id, time.time()):
            self._queue.put_nowait(incoming)
        return True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(WORKERS):
                tasks.create_task(self._work(), name=f"whatsapp {number}")

    async def _work(self) -> None:
        while True:
            incoming = await self._queue.get()
            try:
                await self._answer(incoming)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("not delivered to WhatsApp: %s", error)

    async def _answer(self, incoming: Incoming) -> None:
        user = f"wa-{incoming.user}"
        kind, _, rest = incoming.button.partition(":")
        service = self._service
        try:
            if kind == "better" and rest.isdigit():
                answer = await service.better(user, int(rest))
                await self._say(incoming.user, answer.text)
                return
            if kind == "daily" and rest.isdigit():
                answer = await service.open_recommendation(user, int(rest), name=incoming.name)
            else:
                tapped = self._offered.get(incoming.user, {}).get(incoming.button, "")
                if incoming.button and not tapped:
                    await self._say(incoming.user, "That button is too old. Please type it.")
                    return
                answer = await service.ask(
                    user, tapped or incoming.text, name=incoming.name, typed=not tapped
                )
        except RefusedError as refused:
            await self._say(incoming.user, str(refused))
            return
        await self._say(incoming.user, answer.text, [(f"better:{answer.id}", "Get better answer")])
        await self._offer(incoming.user, user, answer)

    async def _offer(self, number: str, user: str, answer: Answer) -> None:
        """Follow-ups as buttons 1 to 3, when they have been answered; none after a while."""
        for wait in FOLLOWUP_WAITS_S:
            await asyncio.sleep(wait)
            questions = await self._service.followups(user, answer.id)
            if questions:
                break
        else:
            return
        offered = {f"ask:{answer.id}:{place}": text for place, text in enumerate(questions, 1)}
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
            if response.status >= 400:
                log.warning("WhatsApp refused a message: %s", (await response.text())[:300])
