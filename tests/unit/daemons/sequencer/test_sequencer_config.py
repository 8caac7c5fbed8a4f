"""The sequencer's configuration and its epoch file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intentd.daemons.kit.config import InvalidConfigError, load_config
from intentd.daemons.sequencer.config import SequencerConfig
from intentd.daemons.sequencer.epoch import EpochError, Epochs, next_epoch

PREFIX = "INTENTD_SEQUENCER__"


@pytest.mark.parametrize(
    ("setting", "value", "where"),
    [
        ("TURNS__BIND", "tcp://0.0.0.0:7410", "turns.bind"),
        ("TURNS__HEARTBEAT_S", "5", "turns.heartbeat_s"),
        ("TURNS__RECOVER_S", "0.2", "turns.recover_s"),
        ("TURNS__DOMAINS", '["a", ""]', "turns.domains[1]"),
        ("TURNS__KEY_FILE", "server.key", "turns.allow_file"),
        ("TURNS__LEASES", "1", "turns.leases"),
        ("FIN__BIND", "0.0.0.0:7412", "fin.key_file"),
        ("FIN__BIND", "here", "fin.bind"),
    ],
)
def test_wrong_settings_are_named(setting: str, value: str, where: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(SequencerConfig, None, {PREFIX + setting: value})
    assert [error.field for error in caught.value.errors] == [where]


def test_the_defaults_are_sound() -> None:
    config = load_config(SequencerConfig, None, {})
    settings = config.turns.settings()
    assert settings.recover_s >= settings.lease_s
    assert settings.doubt_s >= settings.lease_s


def test_epochs_only_grow(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    assert next_epoch(path, 1000.9) == Epochs(0, 1000)
    assert next_epoch(path, 1000.9) == Epochs(1000, 1001)
    assert next_epoch(path, 5.0) == Epochs(1001, 1002)  # the clock went back
    assert next_epoch(path, 3000.0) == Epochs(1002, 3000)
    path.unlink()  # the store was lost: the clock still leads
    assert next_epoch(path, 3001.0) == Epochs(0, 3001)


@pytest.mark.parametrize("content", [b"", b"-4\n", b"x", b"99999999999999999999\n"])
def test_a_damaged_epoch_file_starts_from_the_clock(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "epoch"
    path.write_bytes(content)
    assert next_epoch(path, 7000.0) == Epochs(0, 7000)


def test_an_epoch_that_cannot_be_kept_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(EpochError, match="can be written"):
        next_epoch(tmp_path / "missing" / "epoch", 7000.0)
    if os.geteuid() == 0:
        (tmp_path / "epoch").mkdir()
        with pytest.raises(EpochError):
            next_epoch(tmp_path / "epoch", 7000.0)


def test_numpy_stays_off_the_sequencers_path() -> None:
    """It would be half of the process's memory."""
    code = (
        "import sys, intentd.daemons.sequencer.daemon, intentd.core.flows.turn.domain;"
        "sys.exit('numpy' in sys.modules or 'intentd.core.sim' in sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4] / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode == 0
