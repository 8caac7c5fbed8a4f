"""The descriptor store: what a daemon hands over, the manager holds, the next one receives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.kit.held import Held
from intentd.daemons.kit.holder import FdHolder
from intentd.daemons.kit.systemd import Notifier

ROOT = Path(__file__).parents[4]


class Manager:
    """A holder served by a thread, as a manager of its own would be."""

    def __init__(self, path: Path, capacity: int = 64) -> None:
        self.notices: list[dict[str, str]] = []
        self.holder = FdHolder(path, capacity=capacity, on_notice=self.notices.append)
        self.holder.socket.setblocking(True)
        self.holder.socket.settimeout(0.05)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                self.holder.receive()
            except TimeoutError:
                continue

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.holder.close()

    def held(self) -> Held:
        environ = self.holder.environment()
        notifier = Notifier.from_environment(environ)
        return Held.from_environment(environ, notifier)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.stop()


def test_what_is_kept_reaches_the_next_process(manager: Manager) -> None:
    held = manager.held()
    one = held.listen("api", "127.0.0.1", 0)
    port = one.getsockname()[1]
    memory = os.memfd_create("state")
    os.write(memory, b"flows")
    assert held.keep("state", [memory])
    assert held.settle()
    one.close()
    os.close(memory)
    waiting = socket.create_connection(("127.0.0.1", port), timeout=30)  # nobody accepts yet
    program = (
        f"from intentd.daemons.kit.held import Held, inherit; inherit({manager.holder.fds!r})\n"
        "import os; from intentd.daemons.kit.systemd import Notifier\n"
        "held = Held.from_environment(os.environ, Notifier.from_environment(os.environ))\n"
        f"one = held.listen('api', '127.0.0.1', {port}); one.setblocking(True)\n"
        "(state,) = held.take('state'); held.drop('state'); assert held.settle()\n"
        "assert 'LISTEN_FDS' not in os.environ and not os.get_inheritable(state)\n"
        "peer, _ = one.accept(); peer.sendall(os.pread(state, 9, 0))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **manager.holder.environment()}
    subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        pass_fds=manager.holder.fds,
        check=True,
        timeout=60,
    )
    assert waiting.recv(9) == b"flows"
    assert manager.holder.names() == ["api"]
    waiting.close()


def test_a_listener_of_another_address_is_not_taken(manager: Manager) -> None:
    held = manager.held()
    with held.listen("api", "127.0.0.1", 0) as one:
        held._received = [("api", os.dup(one.fileno()))]
        with held.listen("api", "127.0.0.2", one.getsockname()[1]) as other:
            assert other.getsockname() == ("127.0.0.2", one.getsockname()[1])
    assert held.settle()
    assert manager.holder.names() == ["api"]  # the second; the first was dropped


def test_names_are_dropped_and_the_capacity_holds(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify", capacity=2)
    try:
        held = manager.held()
        read, write = os.pipe()
        assert held.keep("a", [read, write, read])
        assert held.settle()
        assert manager.holder.names() == ["a", "a"]
        held.drop("a")
        assert held.settle()
        assert manager.holder.names() == []
        os.close(read)
        os.close(write)
    finally:
        manager.stop()


def test_what_nobody_takes_is_closed_on_both_sides(
    manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    held = manager.held()
    read, write = os.pipe()
    assert held.keep("old", [read])
    held._received = [("old", read)]
    held.close_unused()
    assert held.settle()
    assert manager.holder.names() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)
    os.close(write)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"FDSTORE": "8"},
        {"FDSTORE": "x", "NOTIFY_SOCKET": "/nowhere"},
        {"LISTEN_FDS": "2", "LISTEN_PID": "1", "FDSTORE": "0", "NOTIFY_SOCKET": "/nowhere"},
    ],
)
def test_without_a_manager_nothing_is_kept(environ: dict[str, Any]) -> None:
    notifier = Notifier.from_environment(environ)
    held = Held.from_environment(environ, notifier)
    assert environ == {}
    assert held.capacity == 0
    assert held.take("api") == []
    assert not held.keep("api", [0])
    assert not held.settle()
    with held.listen("api", "::1", 0) as sock:
        assert sock.getsockname()[1]


def test_a_manager_that_has_gone_is_no_failure(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "gone"), "FDSTORE": "8"}
    held = Held.from_environment(environ, Notifier.from_environment(environ))
    assert not held.keep("api", [0])
    assert not held.settle()
