"""Several proxies on one PostgreSQL: money, rates, keys and order exact across them; an outage."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import proxy_order
from benchmarks.local_postgres import Postgres
from tests.unit.proxy.conftest import Site
from tests.unit.proxy.provider import Script, running

from intentd.core.errors import ConfigError
from intentd.core.prompts.budgets import BudgetRule
from intentd.core.prompts.effects import Message
from intentd.core.prompts.limits import Rate
from intentd.daemons.kit.clock import ManualClock, SystemClock
from intentd.daemons.kit.config import validate
from intentd.daemons.kit.lifecycle import Tasks
from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError
from intentd.proxy.config import ProxyConfig
from intentd.proxy.errors import ApiError
from intentd.proxy.postgres.schema import MIGRATIONS
from intentd.proxy.postgres.state import SharedState
from intentd.proxy.store.base import FeedbackRow, Purpose, Sums
from intentd.proxy.store.cache import ItemRow, KeyRow, Page

pytestmark = pytest.mark.real

PURPOSE = Purpose("k", "t", "m", "fixed")
RULE = BudgetRule("key:k", "nano_dollars", 1000)


@pytest.fixture
def postgres(cluster: Postgres) -> Postgres:
    cluster.empty()
    return cluster


class Peer:
    """One proxy's hold of the shared state, without its HTTP."""

    def __init__(self, state: SharedState, clock: Any) -> None:
        self.state = state
        self.clock = clock
        self.tasks = Tasks()

    async def beat(self) -> None:
        """What its lease task does once in a while."""
        await self.state._tick(_no_reload)


async def _no_reload() -> None:
    pass


@contextlib.asynccontextmanager
async def peer(
    postgres: Postgres, name: str, *, clock: Any = None, **store: Any
) -> AsyncIterator[Peer]:
    clock = clock or SystemClock()
    section = {"url": postgres.url, "lease_s": 60, **store}
    directory = postgres.base / "states" / name
    directory.mkdir(parents=True, exist_ok=True)
    config = validate(ProxyConfig, {"name": name, "store": section, "state_dir": directory})
    state = await SharedState.open(config, clock, f"boot-{name}")
    made = Peer(state, clock)
    try:
        async with made.tasks:
            try:
                await state.start(made.tasks, _no_reload)
                yield made
            finally:
                await state.close()
                made.tasks.cancel_all()
    except* asyncio.CancelledError:
        pass


async def hold(one: Peer, name: str, nano: int) -> Any:
    return await one.state.books.reserve(name, [RULE], {"nano_dollars": nano}, PURPOSE)


async def account(one: Peer) -> tuple[int, int]:
    """(spent, reserved) of the only account."""
    (row,) = await one.state.books.accounts()
    return row.spent, row.reserved


def make_old(postgres: Postgres, owner: str) -> None:
    postgres.run(f"UPDATE proxies SET seen = seen - interval '1 hour' WHERE owner = 'boot-{owner}'")


# -- the database ------------------------------------------------------------------------------


async def test_two_that_start_at_once_migrate_once(postgres: Postgres) -> None:
    async def open_() -> None:
        database = await Database.open(
            postgres.url, password="", connections=2, timeout_s=20, migrations=MIGRATIONS
        )
        await database.close()

    await asyncio.gather(*(open_() for _ in range(4)))
    assert postgres.run("SELECT version FROM schema_version ORDER BY 1") == [
        [str(number + 1)] for number in range(len(MIGRATIONS))
    ]


async def test_a_newer_schema_and_an_unreachable_server_are_refused(postgres: Postgres) -> None:
    postgres.run("CREATE TABLE schema_version(version INT); INSERT INTO schema_version VALUES (99)")
    config = validate(ProxyConfig, {"store": {"url": postgres.url}})
    with pytest.raises(StoreError, match="schema version 99, newer than"):
        await SharedState.open(config, SystemClock(), "b")
    config = validate(ProxyConfig, {"store": {"url": "postgresql:///x?host=/nowhere"}})
    with pytest.raises(StoreError, match="cannot be reached"):
        await SharedState.open(config, SystemClock(), "b")


@pytest.mark.parametrize(
    "store",
    [{"url": "mysql://x"}, {"url": "postgresql://u:secret@h/d"}, {"password_env": "a b"}],
)
def test_bad_settings_are_named_and_hidden(store: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ProxyConfig, {"store": store})
    assert "store" in str(caught.value)
    assert "secret" not in str(caught.value)


# -- money -------------------------------------------------------------------------------------


async def test_a_budget_is_exact_across_proxies(postgres: Postgres) -> None:
    async with peer(postgres, "a") as one, peer(postgres, "b") as two:

        async def spend(number: int) -> int:
            which = (one, two)[number % 2]
            try:
                held = await hold(which, f"r{number}", 30)
            except ApiError as error:
                if error.code != "insufficient_quota":
                    raise
                return 0
            await asyncio.sleep(0)
            which.state.books.settle(held, {"nano_dollars": 29})
            which.state.books.book(PURPOSE, Sums(requests=1, cost_nano=29))
            return 29

        spent = sum(await asyncio.gather(*(spend(number) for number in range(120))))
        assert await one.state.books.flush()
        assert await two.state.books.flush()
        assert 900 < spent <= 1000
        assert await account(one) == (spent, 0)
        (row,) = await two.state.books.spend(1)
        assert (row["requests"] * 29, row["cost_nano"]) == (spent, spent)
        assert await one.state.books.identity() == await two.state.books.identity() != ""


async def test_what_a_dead_proxy_held_is_settled_in_full(postgres: Postgres) -> None:
    clock = ManualClock()
    async with peer(postgres, "a") as dead:
        held = await hold(dead, "r1", 400)
        released = await hold(dead, "r2", 300)
        dead.state.books.release(released)
        await dead.state.books.flush()
        make_old(postgres, "a")
        async with peer(postgres, "b", clock=clock) as heir:
            await heir.beat()  # not yet: it has only just come itself
            assert await account(heir) == (0, 400)
            for _ in range(4):
                clock.advance(20)
                await heir.beat()
                make_old(postgres, "a")
            assert await account(heir) == (400, 0)
            assert heir.state.books.recovered == 1
            (row,) = await heir.state.books.spend(1)
            assert (row["estimated_nano"], row["failed"]) == (400, 1)
            # It was only asleep: what it says now changes nothing.
            dead.state.books.settle(held, {"nano_dollars": 5})
            assert await dead.state.books.flush()
            assert await account(heir) == (400, 0)
            assert dead.state.books.late == 1


async def test_a_commit_that_was_cut_off_takes_effect_once(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with peer(postgres, "a") as one:
        books = one.state.books
        first = await hold(one, "r1", 100)
        transaction = Database.transaction

        @contextlib.asynccontextmanager
        async def cut(self: Database) -> AsyncIterator[Any]:
            async with transaction(self) as connection:
                yield connection
            self.failure = "store: cut after the commit"
            raise StoreError(self.failure)

        with monkeypatch.context() as patch:
            patch.setattr(Database, "transaction", cut)
            books.settle(first, {"nano_dollars": 70})
            books.book(PURPOSE, Sums(requests=1, cost_nano=70))
            with pytest.raises(ApiError, match="cut after the commit"):
                await hold(one, "r2", 200)
        assert await books.flush()
        assert await books.flush()
        assert await account(one) == (70, 0)
        (row,) = await books.spend(1)
        assert (row["requests"], row["cost_nano"]) == (1, 70)


async def test_what_a_stop_without_the_database_left_is_written_later(postgres: Postgres) -> None:
    async with peer(postgres, "a", timeout_s=2) as one:
        first = await hold(one, "r1", 100)
        await one.state.books.flush()
        await asyncio.to_thread(postgres.stop)
        try:
            one.state.books.settle(first, {"nano_dollars": 60})
            one.state.books.book(PURPOSE, Sums(requests=1, cost_nano=60))
            assert not await one.state.books.flush()  # this one may have happened
            one.state.books.book(PURPOSE, Sums(requests=1, cost_nano=7))
            one.state.books.log_request("r1", "k", 1.0, b"{}")
            await one.state.close()
        finally:
            await asyncio.to_thread(postgres.start)
    left = postgres.base / "states" / "a" / "unwritten.json"
    kept = left.read_bytes()
    for _ in range(2):  # the second time as if it had been killed before the file was gone
        async with peer(postgres, "a") as again:
            assert await account(again) == (60, 0)
            (row,) = await again.state.books.spend(1)
            assert (row["requests"], row["cost_nano"]) == (2, 67)
            assert await again.state.books.find_request("r1", "k") == ["{}"]
            assert not left.exists()
        left.write_bytes(kept)
    left.write_bytes(b"{")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with peer(postgres, "a"):
            pass
    assert "move it away" in str(caught.value.exceptions[0])
    left.unlink()


async def test_who_leaves_while_money_is_held_gets_none(postgres: Postgres) -> None:
    async with peer(postgres, "a") as one, asyncio.TaskGroup() as group:
        asking = group.create_task(hold(one, "r1", 100))
        await asyncio.sleep(0)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await one.state.books.flush()
        await one.state.books.flush()
        assert (
            postgres.run("SELECT count(*), coalesce(sum(reserved), 0) FROM accounts")[0][1] == "0"
        )


async def test_rates_are_exact_across_proxies(postgres: Postgres) -> None:
    rate = Rate(0.01, 20)
    async with peer(postgres, "a") as one, peer(postgres, "b") as two:
        waits = await asyncio.gather(
            *((one, two)[number % 2].state.rates.take("alice", rate) for number in range(50))
        )
        assert sum(wait == 0 for wait in waits) == 20
        assert all(0 < wait <= 100 for wait in waits if wait)
        assert await two.state.rates.take("bob", rate) == 0


# -- conversations -----------------------------------------------------------------------------


def test_conversations_keep_their_order_over_two_processes(postgres: Postgres) -> None:
    given = proxy_order.arguments(["--conversations", "8", "--requests", "8"])
    assert isinstance(given, argparse.Namespace)
    result = asyncio.run(proxy_order.measure(given))
    assert result["bars"] == {"every_order_kept": True}, result
    assert min(result["answered"]) > 5


async def test_an_abandoned_turn_passes_on_and_its_holder_is_fenced(postgres: Postgres) -> None:
    clock = ManualClock(wall_s=time.time())  # of one day with the other proxy's
    async with peer(postgres, "a") as gone, peer(postgres, "b", clock=clock) as heir:
        async with contextlib.AsyncExitStack() as stack:
            turn = await stack.enter_async_context(gone.state.turns.turn("k", "c"))
            waiting = heir.tasks.create_task(_take_turn(heir))
            await _until(lambda: postgres.run("SELECT 1 FROM tickets WHERE owner = 'boot-b'"))
            for _ in range(5):
                make_old(postgres, "a")
                await heir.beat()
                clock.advance(20)
            async with asyncio.timeout(20):
                assert await waiting == turn.sequence + 1
            with pytest.raises(ApiError, match="the conversation went on"):
                await gone.state.turns.append(turn, Message("late", "late"), ())
        assert [one.prompt for one in await gone.state.turns.load("k", "c")] == ["mine"]


async def _take_turn(one: Peer) -> int:
    async with one.state.turns.turn("k", "c") as turn:
        await one.state.turns.append(turn, Message("mine", "answer"), ())
        return turn.sequence


async def test_a_ticket_nobody_waits_for_is_taken_out(postgres: Postgres) -> None:
    async with peer(postgres, "a") as one:
        postgres.run("INSERT INTO conversations VALUES ('k', 'c', 1, 0)")
        postgres.run("INSERT INTO tickets VALUES ('k', 'c', 1, 'boot-a')")
        waiting = one.tasks.create_task(_take_turn(one))
        async with asyncio.timeout(30):
            while not waiting.done():
                await one.beat()
                await asyncio.sleep(0.01)
        assert await waiting == 2


# -- the cache's rows --------------------------------------------------------------------------


async def test_what_one_proxy_stores_the_other_follows(postgres: Postgres) -> None:
    def item(name: str, **fields: Any) -> ItemRow:
        keys = (KeyRow("prompt", f"key of {name}", b"\x01\x02", "e"), KeyRow("chunk", "c"))
        return ItemRow(name, "alice", f"answer {name}", keys, prompt=f"prompt {name}", **fields)

    async with peer(postgres, "a") as one, peer(postgres, "b") as two:
        mine, other = one.state.cache_rows, two.state.cache_rows
        await mine.put([item("1", source="doc"), item("2", put=True), item("3")])
        page = await other.page(0, 2)
        assert ([row.item_id for row in page.items], page.removed, page.more) == (
            ["1", "2"],
            (),
            True,
        )
        assert page.items[0].keys[0].vector == b"\x01\x02"
        assert page.items[0].response == ""
        page = await other.page(page.upto, 2)
        assert ([row.item_id for row in page.items], page.more) == (["3"], False)
        await mine.remove(["2", "unknown"])
        await mine.put([item("4"), item("3", model="new")], replaces=["1"])
        seen: list[str] = []
        gone: list[str] = []
        upto, more = page.upto, True
        while more:
            page = await other.page(upto, 2)
            seen += [row.item_id for row in page.items]
            gone += page.removed
            upto, more = page.upto, page.more
        assert sorted(seen) == ["3", "4"]
        assert {"1", "2"} <= set(gone)
        assert await other.page(upto, 2) == Page((), (), upto, False)
        (row,) = await other.fetch(["3", "1"])
        assert (row.model, row.prompt, [key.kind for key in row.keys]) == (
            "new", "prompt 3", ["prompt", "chunk"],
        )  # fmt: skip
        await mine.set_vectors([("4", 1, b"\x03", "f")])
        found = await other.find(["alice"], source=None, after=0, most=10)
        assert {row.item_id: row.keys[1].space for row in found} == {"3": "", "4": "f"}
        await mine.put([item("5", source="doc")])
        assert await other.ids("alice", "doc") == ["5"]
        await mine.keep("threshold", "0.9")
        await other.keep("threshold", "0.8")
        assert await mine.kept() == {"threshold": "0.8"}


# -- whole proxies -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def two_proxies(tmp_path: Path, postgres: Postgres, **fields: Any) -> AsyncIterator[Any]:
    async with running() as provider, Tasks() as tasks:
        sites = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            sites.append(Site(tmp_path / name, provider, tasks))
        try:
            for site in sites:
                await site.start(store={"url": postgres.url, "timeout_s": 2}, **fields)
            yield sites
        finally:
            for site in sites:
                await site.stop()
                await site.session.close()
            tasks.cancel_all()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)


async def test_keys_and_logs_are_shared(tmp_path: Path, postgres: Postgres) -> None:
    async with two_proxies(tmp_path, postgres, keys={"required": True}) as (one, two):
        made = await one.proxy.admin("keys.new", {"name": "alice"})
        auth = {"Authorization": f"Bearer {made['secret']}"}
        await _answers(two, auth, 200)
        await two.chat(headers={**auth, "X-Request-Id": "r1"})
        assert await two.proxy.api.ledger.flush()
        assert (await one.get("/v1/requests/r1", headers=auth))[0] == 200
        await two.proxy.admin("keys.revoke", {"name": "alice"})
        await _answers(one, auth, 401)


async def test_the_database_goes_away_and_comes_back(tmp_path: Path, postgres: Postgres) -> None:
    async with two_proxies(tmp_path, postgres) as (one, two):
        made = await one.proxy.admin(
            "keys.new",
            {"name": "alice", "grants": {"budgets": [{"unit": "dollars", "limit": "1000"}]}},
        )
        auth = {"Authorization": f"Bearer {made['secret']}"}
        await _answers(two, auth, 200)
        acknowledged: list[str] = []
        statuses: list[int] = []
        over = asyncio.Event()
        one.provider.default = Script(delay_s=0.005)

        async def ask(site: Any, who: int) -> None:
            number = 0
            while not over.is_set():
                number += 1
                prompt = f"p{who}-{number}"
                body = {
                    "prompt": prompt, "service_type": "fixed", "options": {"model": "m"},
                    "conversation": f"c{who}",
                }  # fmt: skip
                status, answer, _ = await site.post("/v1/request", body, headers=auth)
                statuses.append(status)
                if status == 200:
                    acknowledged.append(prompt)
                else:
                    assert status == 503, answer
                    assert "store" in answer["error"]["message"]
                    await asyncio.sleep(0.05)

        async def outage() -> None:
            for _ in range(2):
                await _until(lambda: statuses[-20:].count(200) >= 15)
                await asyncio.to_thread(postgres.stop)
                await _until(lambda: 503 in statuses[-3:])
                assert (await one.chat())[0] == 200  # needs no store
                assert any("store" in reason for reason in one.proxy.unready())
                await asyncio.to_thread(postgres.start)
                statuses.clear()
            await _until(lambda: statuses[-20:].count(200) >= 15)
            over.set()

        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            for who in range(6):
                group.create_task(ask((one, two)[who % 2], who))
            group.create_task(outage())
        stored = set()
        for who in range(6):
            _, found, _ = await one.get(f"/v1/conversations/c{who}", headers=auth)
            stored |= {message["prompt"] for message in found["messages"]}
        assert set(acknowledged) <= stored
        for site in (one, two):
            await _until(lambda site=site: site.proxy.unready() == [])
            assert await site.proxy.api.ledger.flush()
        (row,) = [
            row
            for row in await one.proxy.api.ledger.accounts()
            if row.account_id.startswith("key:")
        ]
        provider = one.provider
        bill = provider.bill_in * 1000 + provider.bill_out * 10_000
        free = sum(
            row["cost_nano"]
            for row in await one.proxy.api.ledger.spend(1)
            if row["key"] == "anonymous"
        )
        assert row.spent == bill - free
        assert row.reserved == 0


async def _answers(site: Any, auth: dict[str, str], status: int) -> None:
    """Wait until it has heard of the key."""
    async with asyncio.timeout(60):
        while (await site.chat(headers=auth))[0] != status:  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0.02)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.02)


# -- lists, single messages, feedback ----------------------------------------------------------


async def test_names_removal_and_feedback(postgres: Postgres) -> None:
    async with peer(postgres, "a") as one, peer(postgres, "b") as other:
        for name in ("b", "A", "a"):
            async with one.state.turns.turn("k", name) as turn:
                await one.state.turns.append(turn, Message("p", "r", message_id=f"m-{name}"), ())
        names = await other.state.turns.names("k", 2, "")
        assert [row["conversation"] for row in names] == ["A", "a"]
        assert [row["conversation"] for row in await other.state.turns.names("k", 2, "a")] == ["b"]
        assert await other.state.turns.remove("k", "a", "m-a") == 1
        assert await one.state.turns.load("k", "a") == []
        for good in (True, False):
            row = FeedbackRow("k", "req", good, "well", 5.0)
            await one.state.feedback_rows.write(row)
            assert await other.state.feedback_rows.find("k", "req") == row
        assert await other.state.feedback_rows.find("k", "other") is None
