"""intentctl jobs, against a daemon that says what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode

Out = Callable[[], tuple[str, str]]


def piece(text: str, at: int, state: str = "running", **more: Any) -> dict[str, Any]:
    end = at + len(text)
    return {
        "text": text,
        "offset": at,
        "next": end,
        "dropped": 0,
        "end": end,
        "state": state,
    } | more


@pytest.fixture
def gpu(said: Any) -> Any:
    said.serve("gpu")
    return said


def test_logs_that_are_followed_come_piece_by_piece(
    gpu: Any, out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intentd.daemons.ctl.jobs.FOLLOW_S", 0.0)
    pieces = [piece("one ", 0), piece("", 4), piece("two", 10, dropped=6), piece("", 13, "failed")]
    gpu.answers["jobs.logs"] = list(pieces)
    assert tool.main(["jobs", "logs", "7", "--follow", "--json"]) == ExitCode.OK
    documents = [json.loads(line) for line in out()[0].splitlines()]
    assert [row["text"] for row in documents] == ["one ", "two", ""]
    assert (documents[1]["dropped"], documents[-1]["state"]) == (6, "failed")
    assert [args["offset"] for _, _, args in gpu.asked] == [0, 4, 4, 13]
    gpu.answers["jobs.logs"] = list(pieces)
    assert tool.main(["jobs", "logs", "7", "--follow"]) == ExitCode.OK
    shown, told = out()
    assert shown == "one two"
    assert "6 bytes" in told


def test_logs_of_a_job_that_never_stops_printing_end(gpu: Any, out: Out) -> None:
    gpu.answers["jobs.logs"] = [piece("ab", 3, end=7, dropped=3), piece("cdef", 5, end=99)]
    assert tool.main(["jobs", "logs", "7", "--json"]) == ExitCode.OK
    document = json.loads(out()[0])
    assert document == {"job": 7, "text": "abcdef", "dropped": 3, "state": "running"}
