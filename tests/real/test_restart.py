"""Restarts that nobody notices, across an upgrade: the small edition of ``benchmarks.restart``."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.held_service import copy_code
from benchmarks.restart import CONNECTIONS, NEXT, agent_run, proxy_run

pytestmark = pytest.mark.real


async def test_streams_end_and_connections_go_on(tmp_path: Path) -> None:
    found = await proxy_run(tmp_path / "proxy", streams=20, keepers=4, chunks=20, upgrade=None)
    assert found["failed"] == 0, found
    assert found["outcomes"]["stream whole"] == 20
    assert found["outcomes"]["kept: 200"] > 0
    assert found["outcomes"]["fresh: 200"] > 0


async def test_queued_flows_keep_their_turns_across_an_upgrade(tmp_path: Path) -> None:
    code = copy_code(tmp_path / "code", "1.0.0"), copy_code(tmp_path / "next", NEXT)
    found = await agent_run(tmp_path / "agent", 40, code, answer_timeout_s=20.0)
    assert found["version_after"] == NEXT
    assert found["failed"] == 0, found
    assert found["in_order"], found
    assert (found["waiting_after"], found["sending_after"]) == (40 + CONNECTIONS, 1)
    assert (found["lost"], found["released_before_their_turn"], found["open_at_the_end"]) == (
        0, 0, 0,
    )  # fmt: skip
