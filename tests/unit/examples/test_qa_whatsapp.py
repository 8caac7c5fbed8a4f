"""WhatsApp messages of the question-and-answer example over failures and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from examples.qa_service import whatsapp as module
from examples.qa_service.proxy import Proxy, Reply
from examples.qa_service.service import QaService
from examples.qa_service.store import DAY_S, Store
from examples.qa_service.whatsapp import WORKERS, Incoming, Settings, WhatsApp


class Models:
    """In the proxy's place. fails: the next questions raise."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def ask(self, prompt: str, service_type: str, conversation: str = "") -> Reply:
        self.asked.append(prompt)
        await self.answers.wait()
        if self.fails:
            self.fails -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return Reply(f"r{len(self.asked)}", f"about {prompt}", "m", "0", cached=False)

    async def followups(self, request_id: str) -> list[str]:
        return []


class Phone:
    """WhatsApp's API. fails: the next messages are refused by 500."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.fails = 0

    async def take(self, request: web.Request) -> web.Response:
        if self.fails:
            self.fails -= 1
            return web.Response(status=500)
        body = await request.json()
        text = body["text"]["body"] if "text" in body else body["interactive"]["body"]["text"]
        self.got.append(text)
        return web.json_response({})


class World:
    """models, phone, and the service as often as it is started."""

    def __init__(self, path: Path, graph: str, phone: Phone) -> None:
        self.path = path
        self.models = Models()
        self.phone = phone
        self._settings = Settings("1", "token", "secret", "verify", graph)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[tuple[WhatsApp, Store]]:
        store = Store(self.path)
        whatsapp = WhatsApp(self._settings, QaService(cast(Proxy, self.models), store))
        running = asyncio.create_task(whatsapp.run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            yield whatsapp, store
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            assert running.cancelled()
            await whatsapp.close()
            store.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    phone = Phone()
    graph = web.Application()
    graph.router.add_post("/1/messages", phone.take)
    async with TestServer(graph) as api:
        yield World(tmp_path / "qa.sqlite", str(api.make_url("")).rstrip("/"), phone)


def message(name: str) -> Incoming:
    return Incoming(name, f"49{name}", "", f"question {name}")


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  a store has no event
            await asyncio.sleep(0.01)


async def test_no_failure_ends_a_worker_and_what_failed_is_tried_again(world: World) -> None:
    async with world.started() as (whatsapp, store):
        world.models.fails = failed = 2 * WORKERS
        assert all(whatsapp.take(message(f"{n}")) for n in range(failed))
        await until(lambda: whatsapp.failures == failed)
        assert not world.phone.got
        assert store.count_waiting() == failed
        assert whatsapp.take(message("later"))
        await until(lambda: world.phone.got == ["about question later"])
        whatsapp.take_up(time.time())
        await until(lambda: len(world.phone.got) == failed + 1)
        await until(lambda: not store.count_waiting())


async def test_an_answer_that_was_not_sent_is_sent_later_without_asking_again(world: World) -> None:
    async with world.started() as (whatsapp, store):
        world.phone.fails = 1
        assert whatsapp.take(message("a"))
        await until(lambda: whatsapp.failures == 1)
        whatsapp.take_up(time.time())
        await until(lambda: world.phone.got == ["about question a"])
        await until(lambda: not store.count_waiting())
        assert world.models.asked == ["question a"]
        assert whatsapp.take(message("a"))  # acknowledged, and not answered twice
        assert not store.count_waiting()


async def test_messages_outlive_a_crash_for_a_while(world: World) -> None:
    world.models.answers.clear()
    async with world.started() as (whatsapp, _):
        assert whatsapp.take(message("a"))
        await until(lambda: world.models.asked)
    world.models.answers.set()
    async with world.started() as (whatsapp, store):
        await until(lambda: world.phone.got == ["about question a"])
        await until(lambda: not store.count_waiting())
        store.accept("old", "{}", time.time() - module.WAIT_S - 1)
        whatsapp.take_up(time.time())
        assert not store.count_waiting()
    assert not whatsapp.take(message("b"))  # nobody works


async def test_a_message_that_always_fails_is_given_up(world: World) -> None:
    async with world.started() as (whatsapp, store):
        world.models.fails = 1000
        assert whatsapp.take(message("a"))
        for failures in range(1, module.TRIES + 1):
            await until(lambda most=failures: whatsapp.failures == most)
            whatsapp.take_up(time.time())
        await until(lambda: not store.count_waiting())
        assert len(world.models.asked) == module.TRIES


async def test_what_cannot_be_written_down_is_not_acknowledged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.started() as (whatsapp, store):
        world.models.answers.clear()
        monkeypatch.setattr(module, "QUEUE", 1)
        assert [whatsapp.take(message(name)) for name in "ab"] == [True, False]
        monkeypatch.setattr(module, "QUEUE", 10)

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(store, "accept", full)
            assert not whatsapp.take(message("b"))
        assert whatsapp.take(message("b"))


async def test_waiting_for_followups_holds_no_worker(world: World) -> None:
    async with world.started() as (whatsapp, _):
        count = 3 * WORKERS
        assert all(whatsapp.take(message(f"{n}")) for n in range(count))
        async with asyncio.timeout(sum(module.FOLLOWUP_WAITS_S) * 4):
            await until(lambda: len(world.phone.got) == count)
        assert len(world.models.asked) == count


def test_a_push_is_due_once_a_day_over_restarts(tmp_path: Path) -> None:
    due = []
    for hour in (8, 10, 11, 24 + 8, 24 + 9):
        store = Store(tmp_path / "qa.sqlite")
        now = 20_000 * DAY_S + hour * 3600.0
        due.append(QaService(cast(Proxy, None), store, now=lambda at=now: at).push_is_due())
        store.close()
    assert due == [False, True, False, False, True]
