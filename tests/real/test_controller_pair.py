"""Controllers in a pair on a real PostgreSQL: who leads, and whose writes count."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from benchmarks.controller_pair import ControllerProcess, PairLab
from benchmarks.local_postgres import Postgres

from intentd.controller.config import ControllerConfig
from intentd.controller.flows_app import differences
from intentd.controller.fronts import FrontBook
from intentd.controller.leader import FENCE, SCHEMA, Leadership, Me
from intentd.controller.policies import MIGRATIONS, PolicyBook
from intentd.core.errors import ConfigError
from intentd.daemons.kit.admin import AdminRefusedError
from intentd.daemons.kit.clock import SystemClock
from intentd.daemons.kit.config import validate
from intentd.daemons.kit.postgres_store import DeposedError, PostgresStore, numbered, translated
from intentd.daemons.kit.store import StoreError

pytestmark = pytest.mark.real


@pytest.fixture
def postgres(cluster: Postgres) -> Postgres:
    cluster.run("DROP SCHEMA IF EXISTS intentd_controller CASCADE")
    return cluster


class Leaders:
    """Leaderships by name, closed at the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.made: list[Leadership] = []

    def make(self, name: str, *, lease_s: float = 0.4, migrations: Any = MIGRATIONS) -> Leadership:
        leadership = Leadership(
            self.url,
            password="",
            timeout_s=5,
            lease_s=lease_s,
            me=Me(name, "h", "tcp://127.0.0.1:1", f"boot-{name}"),
            clock=SystemClock(),
            migrations=migrations,
        )
        self.made.append(leadership)
        return leadership


@pytest.fixture
async def leaders(postgres: Postgres) -> AsyncIterator[Leaders]:
    made = Leaders(postgres.url)
    yield made
    for leadership in made.made:
        await asyncio.to_thread(leadership.close)


def book(store: PostgresStore, where: Path) -> PolicyBook:
    where.mkdir(exist_ok=True)
    return PolicyBook(
        store,
        witness=where / "witness",
        wall=lambda: 1000.0,
        differences={"flows": differences},
        shared=True,
    )


async def test_a_leader_that_slept_writes_nothing_under_the_next(
    leaders: Leaders, tmp_path: Path
) -> None:
    """Nobody asks on the first one's connection, as if its process were stopped."""
    first, second = leaders.make("a"), leaders.make("b")
    old = await first.acquire()
    assert first.holds()
    old_book = book(old, tmp_path)
    assert old_book.issue("flows", {}, inputs={}, reason="one").number == 1
    with old.transaction() as db:
        db.execute("INSERT INTO settings VALUES (?, ?)", ("x", "{}"))
    new = await second.acquire()
    assert not first.holds()
    assert second.holds()
    assert (first.term, second.term) == (1, 2)
    new_book = book(new, tmp_path / "elsewhere")
    assert new_book.newest("flows") == old_book.newest("flows")
    with pytest.raises(DeposedError, match="term 1 is over: the newest is 2"):
        old_book.issue("flows", {}, inputs={}, reason="two")
    assert (await first.lost()) == "this process did not run for a lease"
    assert second.summary()["leader"] == {"name": "b", "host": "h"}
    store_ahead = book(new, tmp_path)  # the witness is the first one's: behind is no new era
    assert store_ahead.era == old_book.era
    old.close()
    new.close()


async def test_a_write_that_stands_still_keeps_nobody_from_leading(leaders: Leaders) -> None:
    """A leader was cut off between the messages of a statement, where no timeout runs."""
    first, second = leaders.make("a"), leaders.make("b")
    (await first.acquire()).close()
    await first.resign()
    stuck = await asyncpg.connect(leaders.url, server_settings={"search_path": SCHEMA})
    try:
        await stuck.execute("BEGIN")
        for statement in FENCE:
            await stuck.execute(statement)
        async with asyncio.timeout(20):
            store = await second.acquire()
        assert second.term == 2
        store.close()
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await stuck.execute("COMMIT")
    finally:
        stuck.terminate()


async def test_numbers_go_on_after_a_commit_nobody_heard_of(
    leaders: Leaders, postgres: Postgres, tmp_path: Path
) -> None:
    store = await leaders.make("a", lease_s=30).acquire()
    policies = book(store, tmp_path)
    era = policies.issue("flows", {}, inputs={}, reason="one").era
    postgres.run(  # as if the commit of another application's policy had happened unseen
        "INSERT INTO intentd_controller.policies SELECT 'jobs', number + 1, era, issued_wall_s, "
        "author, reason, copy_of, changes, inputs, body FROM intentd_controller.policies"
    )
    got = policies.issue("flows", {}, inputs={}, reason="two")
    assert (got.era, got.number) == (era, 3)
    fronts = FrontBook(store)
    assert [fronts.add(1.0, "r", {"front": []}).number for _ in range(25)] == list(range(1, 26))
    fronts.set_preference(["jct:avg"])
    assert fronts.preference() == ["jct:avg"]
    policies.put_settings({"eth0": {"a": 1}, "eth1": {}})
    policies.put_settings({"eth0": {"a": 2}, "eth1": None})
    assert policies.settings() == {"eth0": {"a": 2}}
    assert policies.rollback("flows", 1, author="me").copy_of == 1
    assert policies.release("flows") is True
    assert policies.release("flows") is False
    store.close()


async def test_a_database_that_goes_away_and_comes_back(
    leaders: Leaders, postgres: Postgres, tmp_path: Path
) -> None:
    leadership = leaders.make("a", lease_s=1.0)
    store = await leadership.acquire()
    policies = book(store, tmp_path)
    policies.issue("flows", {}, inputs={}, reason="one")
    postgres.stop()
    with pytest.raises(StoreError, match="store: "):
        policies.issue("flows", {}, inputs={}, reason="two")
    assert store.unready()
    assert await leadership.lost()
    assert leadership.away
    again = asyncio.ensure_future(leadership.acquire())
    await asyncio.sleep(0)
    postgres.start()
    later = await again
    assert leadership.term == 2
    assert book(later, tmp_path).issue("flows", {}, inputs={}, reason="three").number == 2
    store.close()
    later.close()


async def test_a_newer_schema_is_refused(leaders: Leaders) -> None:
    store = await leaders.make("a", migrations=(*MIGRATIONS, "SELECT 1")).acquire()
    store.close()
    with pytest.raises(StoreError, match=r"schema version \d, newer than \d"):
        await leaders.make("b").acquire()


def test_words_of_the_other_database() -> None:
    assert numbered("SELECT ? WHERE a = ?") == "SELECT $1 WHERE a = $2"
    migration = "CREATE TABLE t (n INTEGER PRIMARY KEY AUTOINCREMENT, r REAL, i INTEGER) STRICT;"
    assert translated(migration) == (
        "CREATE TABLE t (n BIGSERIAL PRIMARY KEY, r DOUBLE PRECISION, i BIGINT);"
    )


@pytest.mark.parametrize(
    "store",
    [{"url": "mysql://x"}, {"url": "postgresql://u:secret@h/d"}, {"lease_s": 0.01}],
)
def test_wrong_settings_are_refused_without_their_secrets(store: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ControllerConfig, {"store": store})
    assert "secret" not in str(caught.value)


@pytest.mark.slow
async def test_the_standby_takes_over_whatever_happens_to_the_leader(
    postgres: Postgres, tmp_path: Path
) -> None:
    lab = PairLab(tmp_path, postgres, lease_s=1.0)
    async with lab.running():
        leader = await lab.settled()
        standby = lab.controllers[1 - leader]
        status = await standby.admin.acall("status")
        assert status["ready"]
        told = status["detail"]["leadership"]
        assert told["state"] == "standby"
        assert told["leader"]["name"] == lab.controllers[leader].name
        with pytest.raises(AdminRefusedError, match=rf"is standby: ask the leader \(c{leader} on"):
            await standby.admin.acall("domains")
        for fault in ("stop", "kill", "silence", "close"):
            await lab.round(fault)
        leader = await lab.settled()
        others: list[dict[str, Any]] = []
        async with asyncio.timeout(60):
            while [row["state"] for row in others] != ["standby"]:
                status = await lab.controllers[leader].admin.acall("status")
                others = status["detail"]["leadership"]["others"]
        twice, issued = await asyncio.to_thread(lab.used_twice)
        assert twice == 0
        assert issued >= 8
        assert lab.link.policies()["flows"][1] >= issued


@pytest.mark.parametrize("leads", [True, False])
async def test_a_controller_stops_in_order_though_the_database_stands_still(
    postgres: Postgres, tmp_path: Path, leads: bool
) -> None:
    """Every process of the server is stopped, in the middle of the controller's writes."""
    one = ControllerProcess(tmp_path, "c0", postgres.url, 1.0)
    one.start()
    asked: list[asyncio.Task[Any]] = []
    try:
        async with asyncio.timeout(60):
            while await one.state() != "leading":  # noqa: ASYNC110  of another process
                await asyncio.sleep(0.05)
            for pid in postgres.pids():
                os.kill(pid, signal.SIGSTOP)
            document = {"domain": "eth0", "max_wait": 3}
            asked += [
                asyncio.create_task(one.admin.acall("policy_set", document=document))
                for _ in range(3)
            ]
            while not leads and '"was": "leading"' not in one.log.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        one.send(signal.SIGTERM)
        code = await asyncio.to_thread(one.ended)
    finally:
        for pid in postgres.pids():
            os.kill(pid, signal.SIGCONT)
        one.end()
        await asyncio.gather(*asked, return_exceptions=True)
    log = one.log.read_text()
    assert code == 0, log
    assert "took too long" not in log
    assert "crashed" not in log


async def test_a_second_controller_on_one_state_directory_is_refused(tmp_path: Path) -> None:
    first = ControllerProcess(tmp_path, "c0", "", 2.0)
    first.start()
    try:
        async with asyncio.timeout(60):
            while await first.state() != "leading":  # noqa: ASYNC110  another process's state
                await asyncio.sleep(0.05)
        config = tmp_path / "second.toml"
        config.write_text(
            f'state_dir = "{tmp_path}/c0-state"\nrun_dir = "{tmp_path}/r2"\n'
            f'[status]\nbind = "127.0.0.1:0"\n[hub]\nbind = "ipc://{tmp_path}/h2"\n'
            '[log]\nformat = "json"\n'
        )
        command = [sys.executable, "-m", "intentd.controller.daemon", "--config", str(config)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, timeout=60, env=dict(os.environ)
        )
        assert done.returncode == 1
        errors = [json.loads(line) for line in done.stderr.splitlines()]
        said = [row["message"] for row in errors if row["level"] == "error"]
        assert len(said) == 1
        assert "is in use by process" in said[0]
        assert "a pair needs store.url" in said[0]
    finally:
        first.send(signal.SIGTERM)
        first.end()
