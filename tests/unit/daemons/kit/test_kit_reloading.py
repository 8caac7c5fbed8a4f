"""Reload: what is taken, what is refused, and the way back to the last good configuration."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from intentd.core.errors import ConfigError, IntentdError
from intentd.daemons.ctl.daemon import DAEMONS, daemon_class
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.config import CommonConfig, parse_config, validate
from intentd.daemons.kit.generations import Generations, ReturnedError
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.reloading import FIXED, Reloader, refuse_fixed, setting
from intentd.daemons.kit.systemd import Notifier


class Config(CommonConfig):
    """A file with a number in it."""

    role: ClassVar[str] = "toy"
    number: int = 0


class Site:
    """A daemon that runs whatever it is given: file, what it runs, why it is not ready."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = b"number = 1"
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.reasons: list[str] = []
        self.refuses: Exception | None = None
        self.told: list[str] = []
        self.running = self.read()[0]
        self.swaps = 0
        self.reloader = self.make()

    def make(self) -> Reloader[Config]:
        config, source = self.read()
        self.book = Generations(self.directory, "toy", config, source, self.clock.wall)
        return Reloader(
            self.book,
            clock=self.clock,
            metrics=self.metrics,
            notifier=Notifier(),
            fixed=(),
            read=self.read,
            swap=self.swap,
            unready=lambda: list(self.reasons),
            told=self.tell,
        )

    async def tell(self, text: str) -> None:
        self.told.append(text)

    def read(self) -> tuple[Config, bytes]:
        return parse_config(Config, self.source, {}), self.source

    async def swap(self, config: Config) -> None:
        self.swaps += 1
        refused, self.refuses = self.refuses, None
        if refused is not None:
            raise refused
        self.running = config

    async def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            for _ in range(4):
                await asyncio.sleep(0)

    async def reload(self, source: str, **options: Any) -> dict[str, Any]:
        self.source = source.encode()
        return await self.reloader.reload("test", **options)

    @property
    def good_file(self) -> Path:
        return self.directory / "toy.good.toml"


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    async with asyncio.TaskGroup() as tasks:
        made.reloader.start(tasks)
        await made.pass_s(0.2)
        yield made
        made.reloader.stop()


async def test_what_keeps_the_daemon_ready_is_confirmed_and_kept(site: Site) -> None:
    assert site.good_file.read_bytes() == b"number = 1"
    answer = await site.reload("number = 2")
    assert (answer["generation"], site.running.number) == (2, 2)
    assert site.book.to_plain()["outcome"] == "taken"
    assert site.book.to_plain()["on_trial"]
    assert site.good_file.read_bytes() == b"number = 1"
    await site.pass_s(31)
    assert site.book.to_plain()["outcome"] == "confirmed"
    assert site.book.to_plain()["good"] == 2
    assert site.good_file.read_bytes() == b"number = 2"
    assert stat.S_IMODE(site.good_file.stat().st_mode) == 0o600


async def test_lost_readiness_returns_to_the_last_good_one(site: Site) -> None:
    confirming = asyncio.ensure_future(site.reload("number = 2", confirm=True))
    await site.pass_s(1)
    site.reasons = ["it broke"]
    await site.pass_s(1.5)
    assert site.running.number == 2  # within its grace
    site.reasons = []
    await site.pass_s(1)
    site.reasons = ["it broke for good"]
    await site.pass_s(2.5)
    assert site.running.number == 1
    with pytest.raises(ReturnedError, match="generation 2 lost readiness: it broke for good; 1 ru"):
        await confirming
    told = site.book.to_plain()
    assert (told["outcome"], told["good"], site.book.number) == ("returned", 3, 3)
    assert "it broke for good" in told["reason"]
    assert 'reloads_total{outcome="returned"} 1.0' in site.metrics.render().decode()


async def test_one_that_was_unready_before_is_not_taken_back_until_it_was_mended(
    site: Site,
) -> None:
    site.reasons = ["no models"]
    await site.reload("number = 2")
    await site.pass_s(31)
    assert (site.running.number, site.book.to_plain()["outcome"]) == (2, "unconfirmed")
    assert site.book.good.number == 1
    await site.reload("number = 3")
    site.reasons = []
    await site.pass_s(1)
    site.reasons = ["lost again"]
    await site.pass_s(4)
    assert site.running.number == 1


async def test_a_second_reload_on_trial_still_returns_to_the_good_one(site: Site) -> None:
    first = asyncio.ensure_future(site.reload("number = 2", confirm=True))
    await site.pass_s(1)
    site.reasons = ["broken"]
    await site.pass_s(1)
    await site.reload("number = 3")
    await site.pass_s(3)
    with pytest.raises(ReturnedError, match="generation 2: 3 was loaded before it had time"):
        await first
    assert (site.running.number, site.book.to_plain()["outcome"]) == (1, "returned")


async def test_a_refusal_changes_nothing_and_is_told(site: Site) -> None:
    for source, text in (
        ("numbr = 2", "did you mean number"),
        ("number = 'x'", "valid integer"),
        ("number = ", "a TOML file"),
        ("name = 'other'", "name: got 'other', expected the value it started with"),
    ):
        with pytest.raises(ConfigError, match=text):
            await site.reload(source)
        assert (site.book.number, site.swaps) == (1, 0)
        assert site.book.to_plain()["outcome"] == "refused"
    with pytest.raises(ConfigError, match="a TOML file"):
        await site.reload("[" * 100_000)
    site.source = b"\xff\xfe"
    with pytest.raises(ConfigError, match="a TOML file"):
        await site.reloader.reload("test")


async def test_a_defect_is_a_refusal_after_which_the_old_one_is_taken_anew(site: Site) -> None:
    site.refuses = ZeroDivisionError("ours")
    with pytest.raises(IntentdError, match="internal error: ZeroDivisionError: ours"):
        await site.reload("number = 2")
    assert (site.running.number, site.swaps, site.book.number) == (1, 2, 1)


async def test_a_refusal_does_not_end_the_trial_before_it(site: Site) -> None:
    await site.reload("number = 2")
    with pytest.raises(ConfigError):
        await site.reload("number = 'x'")
    await site.pass_s(31)
    assert site.book.good.number == 2
    assert site.book.to_plain()["outcome"] == "refused"  # the last thing somebody asked for


async def test_when_the_good_one_is_not_taken_back_it_is_told(site: Site) -> None:
    await site.reload("number = 2")
    site.reasons = ["broken"]
    site.refuses = IntentdError("no")
    await site.pass_s(3)
    assert site.book.to_plain()["outcome"] == "stuck"
    assert site.running.number == 2


async def test_a_window_of_zero_never_returns(site: Site) -> None:
    site.reasons = []
    await site.reload("number = 2\n[reload]\nwindow_s = 0")
    await site.pass_s(0.2)
    assert site.book.to_plain()["outcome"] == "confirmed"


async def test_numbers_go_on_over_a_restart(site: Site) -> None:
    await site.reload("number = 2")
    await site.pass_s(31)
    site.make()
    assert site.book.number == 2  # the same file
    site.source = b"number = 3"
    site.make()
    assert site.book.number == 3
    (site.directory / "toy.generation.json").write_text('{"number": "x"}')
    site.make()
    assert site.book.number == 1


async def test_a_disk_that_refuses_is_told(site: Site) -> None:
    site.book._good_path = site.directory / "none" / "toy.good.toml"
    await site.reload("number = 2")
    await site.pass_s(31)
    assert "No such file" in site.book.to_plain()["not_kept"]
    assert site.running.number == 2


@pytest.mark.parametrize("role", DAEMONS)
def test_every_setting_that_needs_a_restart_exists(role: str) -> None:
    made = daemon_class(role)
    config = validate(made.config_model, {})
    for path in (*FIXED, *made.fixed):
        setting(config, path)
    refuse_fixed(config, config, (*FIXED, *made.fixed))


def test_a_change_deep_in_a_section_is_named() -> None:
    model = daemon_class("proxy").config_model
    one = validate(model, {})
    other = validate(model, {"listen": {"max_body_bytes": 4096}})
    with pytest.raises(ConfigError, match=r"listen\.max_body_bytes: got 4096, expected the value"):
        refuse_fixed(one, other, ("listen",))
