"""The generator's own speaking of the application protocol."""

from __future__ import annotations

import asyncio
from typing import Any

from intentd.agent import app_protocol as wire
from intentd.testbed.traffic.agent_gate import AgentGate
from intentd.testbed.traffic.turns import Turn


class Agent:
    """A socket that keeps what is said, and a board whose first class is free."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.unsettled = False

    def send(self, packet: bytes) -> None:
        self.heard.append(wire.decode_request(packet))

    def start(self, request: int, size: int, domain: bytes, has_peer: bool) -> Any:
        return (0, 10, 3, 700, 10**9)


def test_a_flow_so_small_that_it_announces_its_end_at_once_is_opened_first() -> None:
    async def main() -> list[Any]:
        agent = Agent()

        def on_turn(flow: int, turn: Turn) -> None:
            gate.announce(flow)

        gate = AgentGate(asyncio.get_running_loop(), on_turn, path="", domain="up")
        gate._sock = gate._board = agent  # type: ignore[assignment]
        gate.open(1, 100)
        assert agent.heard == []  # its request goes first
        await asyncio.sleep(0)
        return agent.heard

    assert [type(message) for message in asyncio.run(main())] == [wire.Open, wire.Announce]
