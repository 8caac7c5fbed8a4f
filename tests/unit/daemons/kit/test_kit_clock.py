"""The clocks daemons are given."""

from __future__ import annotations

import asyncio

import pytest

from intentd.daemons.kit.clock import ManualClock, SystemClock


async def test_the_manual_clock_wakes_sleepers_in_order() -> None:
    clock = ManualClock(10.0)
    woken: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(f"{name}@{clock.now():g}")

    async with asyncio.TaskGroup() as tasks:
        for name, seconds in (("late", 3.0), ("soon", 1.0), ("now", 0.0)):
            tasks.create_task(sleeper(name, seconds), name=name)
        for _ in range(3):
            await asyncio.sleep(0)
        assert woken == ["now@10"]
        assert clock.sleeping() == 2
        clock.advance(1.0)
        await asyncio.sleep(0)
        assert woken == ["now@10", "soon@11"]
        clock.advance(5.0)
    assert woken[-1] == "late@16"
    with pytest.raises(ValueError, match="only moves on"):
        clock.advance(-1)


async def test_a_cancelled_sleeper_is_passed_over() -> None:
    clock = ManualClock()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(clock.sleep(1), name="cancelled")
        await asyncio.sleep(0)
        task.cancel()
    clock.advance(2)
    assert clock.wall() - clock.now() == 1_700_000_000.0


async def test_the_system_clock_is_monotonic() -> None:
    clock = SystemClock()
    before = clock.now()
    await clock.sleep(-1)
    assert clock.now() >= before
    assert clock.wall() > 1.7e9
