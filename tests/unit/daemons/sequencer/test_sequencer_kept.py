"""What a sequencer leaves to the next process: taken once, and only when that is safe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from intentd.core.flows.turn import wire
from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings
from intentd.daemons.sequencer import kept

SETTINGS = SequencerSettings()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sequencer.turns.json"


def core() -> SequencerCore:
    made = SequencerCore(SETTINGS, epoch=7, previous=3, now=0.0)
    made.tick(1.0)
    made.receive(b"a", wire.encode(wire.Hello("link", "a", 1, 0, 1, 0)), 1.0)
    return made


def test_taken_once(path: Path) -> None:
    left = core()
    left.pause(2.0, 5.0)
    assert kept.leave(path, left, 5.0)
    taken = kept.take(path, SETTINGS, 7, 3.0)
    assert taken.core is not None
    assert (taken.core.epoch, taken.promised_until) == (7, 7.0)
    again = kept.take(path, SETTINGS, 7, 3.5)  # as after a crash
    assert (again.core, again.promised_until) == (None, 7.0)


def test_nothing_was_left(path: Path) -> None:
    assert kept.take(path, SETTINGS, 7, 3.0) == kept.Taken(None, -math.inf)
    assert not kept.leave(path, SequencerCore(SETTINGS, epoch=2, previous=1, now=0.0), 5.0)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "epoch"),
    [
        ({"version": 2}, 7),
        ({"turns": {"epoch": 7}}, 7),
        ({}, 8),
        ({"clock": "another start of the machine"}, 7),
    ],
)
def test_what_is_not_safe_begins_a_new_epoch(
    path: Path, change: dict[str, Any], epoch: int
) -> None:
    left = core()
    left.pause(2.0, 5.0)
    kept.leave(path, left, 5.0)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    taken = kept.take(path, SETTINGS, epoch, 3.0)
    assert taken.core is None
    assert taken.promised_until == (8.0 if "clock" in change else 7.0)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1}'])
def test_a_damaged_file_begins_a_new_epoch(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    assert kept.take(path, SETTINGS, 7, 3.0).core is None


def test_other_settings_and_a_full_disk(path: Path, tmp_path: Path) -> None:
    kept.leave(path, core(), 0.0)
    assert kept.take(path, SequencerSettings(max_members=3), 7, 3.0).core is None
    assert not kept.leave(tmp_path / "nowhere" / "file", core(), 0.0)
