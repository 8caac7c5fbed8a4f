"""An agent's socket, shell and gates in a thread of the test's process: no daemon, no root."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.agent.app_socket import AppSocket, SocketLimits
from intentd.agent.board import Board
from intentd.agent.domain import Domain
from intentd.agent.marking import mark
from intentd.agent.shell import GateShell
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn.domain import DomainGate

INF = float("inf")


def small_policy(domain: str = "up", **fields: Any) -> DomainPolicy:
    """Two classes, cut at 5,000 bytes, one flow of each at a time."""
    classes = (ClassPolicy(5000.0, 0.6, dscp=10), ClassPolicy(INF, 0.4))
    return DomainPolicy(domain, 1e9, classes, **fields)


class LocalAgent:
    """start and stop may be repeated, as an agent's restarts are."""

    def __init__(
        self, path: Path, policy: DomainPolicy, limits: SocketLimits | None, board: bool
    ) -> None:
        self.path = path
        self.policy = policy
        self.limits = limits
        self.with_board = board
        self.start()

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.board = Board() if self.with_board else None
        self.shell = GateShell(
            now=time.monotonic, mark=mark, boot=7, woken=self._wake, board=self.board
        )
        gate = DomainGate(self.policy, name="test", boot=7)
        self.domain = Domain(self.policy.domain, self.policy, gate)
        self.shell.set_domains([self.domain], [], self.policy.domain)
        self.socket = AppSocket(self.path, self.shell, limits=self.limits)
        self.shell.connections = lambda: len(self.socket.connections)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self.socket.open)

    def _wake(self, at: float) -> None:
        self.loop.call_later(max(0.0, at - time.monotonic()), self.shell.tick)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run in the agent's loop; its result."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the agent is in a state."""
        deadline = time.monotonic() + 30
        while not self.call(condition):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def stop(self) -> None:
        if not self.loop.is_closed():
            self.call(self.socket.close)
            if self.board is not None:
                self.board.close()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(30)
            self.loop.close()


@pytest.fixture
def local_agent(tmp_path: Path) -> Iterator[Callable[..., LocalAgent]]:
    """Start an agent: ``local_agent(policy=..., limits=..., board=...)``."""
    with contextlib.ExitStack() as stack:

        def start(
            policy: DomainPolicy | None = None,
            limits: SocketLimits | None = None,
            board: bool = False,
        ) -> LocalAgent:
            agent = LocalAgent(tmp_path / "agent.sock", policy or small_policy(), limits, board)
            stack.callback(agent.stop)
            return agent

        yield start


@pytest.fixture
def policy_of_two() -> Callable[..., DomainPolicy]:
    return small_policy


@pytest.fixture
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    with left, right:
        yield left, right
