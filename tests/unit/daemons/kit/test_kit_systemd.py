"""The notification protocol and the watchdog."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.systemd import Notifier
from intentd.daemons.kit.watchdog import Watchdog


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's socket: its address as in $NOTIFY_SOCKET."""
    address = str(tmp_path / "n")
    if request.param == "abstract":
        address = f"@intentd-test-{secrets.token_hex(8)}"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
    receiver.settimeout(10)
    yield address, receiver
    receiver.close()


def test_messages_as_sd_notify_defines_them(manager: tuple[str, socket.socket]) -> None:
    address, receiver = manager
    notifier = Notifier(address)
    notifier.ready("runs\nwell")
    assert receiver.recv(4096) == f"READY=1\nSTATUS=runs well\nMAINPID={os.getpid()}".encode()
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = receiver.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    notifier.stopping()
    notifier.watchdog()
    notifier.status("x")
    assert [receiver.recv(4096) for _ in range(3)] == [b"STOPPING=1", b"WATCHDOG=1", b"STATUS=x"]
    receiver.close()
    notifier.ready()  # a manager that went away is not the daemon's failure
    notifier.close()


def test_the_environment_is_taken_once() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environ)
    assert (notifier.address, notifier.watchdog_s, environ) == ("/n", 3.0, {})
    environ = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environ).watchdog_s == 0
    assert Notifier.from_environment({"WATCHDOG_USEC": "soon"}).watchdog_s == 0
    Notifier().ready()


async def test_the_watchdog_is_fed_only_when_the_loop_runs(
    manager: tuple[str, socket.socket],
) -> None:
    address, receiver = manager
    receiver.setblocking(False)
    clock = ManualClock()
    notifier = Notifier(address, watchdog_s=1.0)
    watchdog = Watchdog(clock, Metrics(), notifier)
    assert watchdog.interval_s == 0.5
    assert watchdog.summary() == {"mean": 0.0, "p99": 0.0, "max": 0.0}
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watchdog.run(), name="watchdog")
        for step in (0.5, 0.75):
            await asyncio.sleep(0)
            with pytest.raises(BlockingIOError):
                receiver.recv(100)
            clock.advance(step)
            for _ in range(3):
                await asyncio.sleep(0)
            assert receiver.recv(100) == b"WATCHDOG=1"
        task.cancel()
    notifier.close()
    assert watchdog.summary()["max"] == pytest.approx(0.25)
