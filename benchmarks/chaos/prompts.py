"""Users of the two proxies: conversations, streams under budgets, and what they were promised."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from aiohttp import AddrInfoType

from benchmarks.chaos.members import drawn
from benchmarks.chaos.provider import Asked, Providers
from benchmarks.chaos.world import CAP_TOKENS, PRICE_IN_NANO, PRICE_OUT_NANO, World
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError

TURNS: Final = 25  # of a conversation, then its user begins another
REQUEST_TIMEOUT_S: Final = 20.0
THINK_S: Final = 0.5
BUDGET_CALLS: Final = 60
RESERVATION_NANO: Final = CAP_TOKENS * PRICE_OUT_NANO + 400 * PRICE_IN_NANO
# Never spent; but without a budget nothing is reserved, and a kill -9 leaves what is under way
# unbooked.
TALKER_BUDGET_NANO: Final = 10**12
SETTLE_S: Final = 60.0
KEY_KNOWN_S: Final = 90.0


@dataclass
class Key:
    """One key. busy: requests under way."""

    name: str
    secret: str
    budget_nano: int
    made_s: float
    busy: int = 0
    refused: int = 0


@dataclass(eq=False)
class Users:
    """conversations users talk, streamers stream; each waits for its answer before the next.

    newest: so many conversations are judged at the end, where the proxies are set to forget older
    ones; 0: all.
    """

    world: World
    providers: Providers
    seed: int
    acked: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    last_ok_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    newest: int = 0
    _session: aiohttp.ClientSession | None = None
    _made: int = 0

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if what in ("turn", "stream", "plain"):
            self.last_ok_s = self.world.clock.now()

    def _socket(self, info: AddrInfoType) -> socket.socket:
        return self.world.spaces["users"].socket(info[0], info[1])

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, socket_factory=self._socket)
            timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def start(self, tasks: asyncio.TaskGroup, talkers: int, streamers: int) -> None:
        self.last_ok_s = self.world.clock.now()
        for number in range(talkers):
            tasks.create_task(self._talk(number), name=f"talker {number}")
        for number in range(streamers):
            tasks.create_task(self._stream(number), name=f"streamer {number}")

    async def new_key(self, budget_nano: int) -> Key:
        """From whichever proxy answers."""
        while True:
            self._made += 1
            name = f"k{self._made}"
            grants = {"budgets": [{"unit": "dollars", "limit": f"{budget_nano / 1e9:.9f}"}]}
            for member in self.world.of("proxy"):
                if not member.pid or member.frozen:
                    continue
                with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
                    made = await member.ask("keys.new", name=name, grants=grants)
                    key = Key(name, made["secret"], budget_nano, self.world.clock.now())
                    self.keys.append(key)
                    return key
            await asyncio.sleep(0.5)

    # -- conversations --------------------------------------------------------------------------

    async def _talk(self, number: int) -> None:
        """Every attempt is a prompt of its own; what was answered must be kept, in its place."""
        rng = drawn(self.seed, "talker", number)
        key = await self.new_key(TALKER_BUDGET_NANO)
        part = 0
        while not self.over.is_set():
            conversation = f"conversation-{number}-{part}"
            self.acked[conversation] = []
            for turn in range(TURNS):
                if self.over.is_set():
                    return
                prompt = f"{key.name} {rng.randrange(1, 6)} {turn} {conversation}"
                await self._turn(key, conversation, prompt, rng)
                await asyncio.sleep(rng.uniform(0.5, 1.5) * THINK_S)
            part += 1

    async def _turn(self, key: Key, conversation: str, prompt: str, rng: random.Random) -> None:
        body = {
            "prompt": prompt, "service_type": "fixed", "options": {"model": "alpha"},
            "conversation": conversation,
        }  # fmt: skip
        url = self.world.url(rng.choice(self.world.of("proxy")).name)
        headers = {"Authorization": f"Bearer {key.secret}"}
        try:
            async with self.session.post(
                f"{url}/v1/request", json=body, headers=headers
            ) as response:
                answer = await response.json()
                if response.status != 200:
                    self._failed("turn", key, response.status, answer)
                    return
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._failed("turn", key, 0, repr(error))
            return
        self.acked[conversation].append((answer["metadata"]["context"]["sequence"], prompt))
        self._count("turn")

    def _failed(self, kind: str, key: Key, status: int, answer: object) -> None:
        self._count(f"{kind}: {status or 'no answer'}")
        # The other proxy hears of a new key from the database, if it has one.
        fresh = status == 401 and self.world.clock.now() - key.made_s < KEY_KNOWN_S
        if status in (400, 401, 403, 404) and not fresh:
            self.wrong.append(f"{kind}: {status} {json.dumps(answer)[:300]}")
        if len(self.errors) < 2000:
            self.errors.append(f"{self.world.clock.now():.1f} {kind} {status} {str(answer)[:200]}")

    # -- streams under a budget -----------------------------------------------------------------

    async def _stream(self, number: int) -> None:
        rng = drawn(self.seed, "streamer", number)
        key = await self.new_key(BUDGET_CALLS * RESERVATION_NANO)
        while not self.over.is_set():
            if key.refused > 3 and not key.busy:
                key = await self.new_key(BUDGET_CALLS * RESERVATION_NANO)
            burst = [self._ask(key, rng) for _ in range(rng.choice((1, 1, 1, 4)))]
            await asyncio.gather(*burst)
            await asyncio.sleep(rng.uniform(0.5, 1.5) * THINK_S)

    async def _ask(self, key: Key, rng: random.Random) -> None:
        words, stream = rng.randrange(3, CAP_TOKENS), rng.random() < 0.8
        prompt = f"{key.name} {words} go on"
        body = {
            "model": rng.choice(("alpha", "beta")), "stream": stream,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        url = self.world.url(rng.choice(self.world.of("proxy")).name)
        headers = {"Authorization": f"Bearer {key.secret}"}
        leaves = rng.random() < 0.05
        key.busy += 1
        try:
            async with self.session.post(
                f"{url}/v1/chat/completions", json=body, headers=headers
            ) as response:
                if leaves:
                    self._count("left")
                    return
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._failed("stream", key, 0, repr(error))
            return
        finally:
            key.busy -= 1
        if response.status == 429 and "insufficient_quota" in text:
            key.refused += 1
            self._count("over budget")
        elif response.status != 200:
            self._failed("stream", key, response.status, text)
        elif stream:
            self._judge_stream(text, words)
        else:
            got = json.loads(text)["choices"][0]["message"]["content"].split()
            self._count("plain")
            if len(got) != words:
                self.wrong.append(f"an answer of {len(got)} words for one of {words}")

    def _judge_stream(self, text: str, words: int) -> None:
        got = text.count('"w ')
        if "data: [DONE]" not in text:
            self._count("stream: cut, and said so" if "error" in text else "stream: cut")
        elif got != words:
            self.wrong.append(f"a stream of {got} words that looks whole, expected {words}")
        else:
            self._count("stream")

    # -- judgement ------------------------------------------------------------------------------

    async def judge_conversations(self) -> list[str]:
        """What was lost or is out of order, by what a proxy says it keeps."""
        wrong = []
        for conversation, acked in list(self.acked.items())[-self.newest :]:
            owner = next((p for _, p in acked), None)
            if owner is None:
                continue
            key = next(key for key in self.keys if key.name == owner.split(" ")[0])
            url = self.world.url("p1" if len(wrong) % 2 else "p2")
            headers = {"Authorization": f"Bearer {key.secret}"}
            async with self.session.get(
                f"{url}/v1/conversations/{conversation}", headers=headers
            ) as response:
                if response.status != 200:
                    wrong.append(f"{conversation}: {response.status} {await response.text()}")
                    continue
                stored = [one["prompt"] for one in (await response.json())["messages"]]
            problem = judge(acked, stored, self.providers.calls.get(conversation, []))
            if problem:
                wrong.append(f"{conversation}: {problem}")
        return wrong

    async def books(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Accounts by key, and what was estimated of each. Raises AdminUnreachableError."""
        page = await self.world.member("p1").ask("spend", timeout_s=20.0)
        accounts = {}
        for row in page["accounts"]:
            if row["account"].startswith("key:"):
                accounts[row["account"].removeprefix("key:").partition("/")[0]] = row
        page = await self.world.member("p1").ask("spend", timeout_s=20.0)
        estimated: dict[str, int] = {}
        spent: dict[str, int] = {}
        for row in page["rows"]:
            name = row["key"]
            estimated[name] = estimated.get(name, 0) + row["estimated_nano"]
            spent[name] = spent.get(name, 0) + row["cost_nano"]
        for name, nano in spent.items():
            accounts.setdefault(name, {"spent": nano, "reserved": 0})
        return accounts, estimated

    async def judge_money(self) -> list[str]:
        """Once nothing is reserved any more."""
        until_s = self.world.clock.now() + SETTLE_S
        while True:
            accounts, estimated = await self.books()
            if not any(row["reserved"] for row in accounts.values()):
                break
            if self.world.clock.now() > until_s:
                held = {name: row for name, row in accounts.items() if row["reserved"]}
                return [f"reservations are never settled: {held}"]
            await asyncio.sleep(0.5)
        wrong = []
        for key in self.keys:
            bill = self.providers.nano[key.name]
            spent = accounts.get(key.name, {"spent": 0})["spent"]
            if bill > key.budget_nano:
                wrong.append(f"{key.name}: billed {bill} of a budget of {key.budget_nano}")
            if spent < bill:
                wrong.append(f"{key.name}: the ledger has {spent}, the bill is {bill}")
            if spent - bill > estimated.get(key.name, 0):
                wrong.append(
                    f"{key.name}: the ledger has {spent}, the bill is {bill}, "
                    f"and only {estimated.get(key.name, 0)} was estimated"
                )
        return wrong

    def over_budget(self) -> list[str]:
        """Holds at any moment: no bill above its budget."""
        return [
            f"{key.name}: billed {self.providers.nano[key.name]} of {key.budget_nano}"
            for key in self.keys
            if self.providers.nano[key.name] > key.budget_nano
        ]


def judge(acked: list[tuple[int, str]], stored: list[str], calls: list[Asked]) -> str:
    """What is wrong with one conversation; "" when nothing is.

    acked: sequence numbers and prompts that were answered, by the time of the answer; its user asks
    one at a time, so that is their order. Others may be stored: answered, but nobody heard.
    """
    numbers = [number for number, _ in acked]
    if numbers != sorted(set(numbers)):
        return f"sequence numbers {numbers}, expected growing"
    if len(set(stored)) != len(stored):
        return f"stored twice: {sorted(p for p in set(stored) if stored.count(p) > 1)[:3]}"
    place = {prompt: index for index, prompt in enumerate(stored)}
    lost = [prompt for _, prompt in acked if prompt not in place]
    if lost:
        return f"{len(lost)} of {len(acked)} answered turns are not stored: {lost[:3]}"
    order = [place[prompt] for _, prompt in acked]
    if order != sorted(order):
        return f"stored in another order than answered: {order}"
    last = {call.prompt: call for call in calls}
    for index, (_, prompt) in enumerate(acked):
        missing = [p for _, p in acked[:index] if p not in last[prompt].before]
        if missing:
            return f"{prompt!r} was asked without the turns before it: {missing[:3]}"
    return ""
