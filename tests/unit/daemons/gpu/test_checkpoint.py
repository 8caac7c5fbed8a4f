"""Checkpoints carry the epoch of their run; an earlier run spoils nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from intentd.daemons.gpu.client.checkpoint import StaleRunError, load, newest, save, save_with


def test_a_run_reads_what_the_one_before_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path) is None
    for epoch in ("1", "2", "3"):
        monkeypatch.setenv("INTENTD_EPOCH", epoch)
        assert load(tmp_path) == (str(int(epoch) - 1).encode() if epoch != "1" else None)
        save(epoch.encode(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.2", "checkpoint.3"]


def test_a_replaced_run_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTENTD_EPOCH", "2")
    save(b"new", tmp_path)
    monkeypatch.setenv("INTENTD_EPOCH", "1")
    with pytest.raises(StaleRunError, match="after 1"):
        save(b"old", tmp_path)
    assert load(tmp_path) is None
    monkeypatch.delenv("INTENTD_EPOCH")
    assert load(tmp_path) == b"new"


def test_what_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    save(b"whole", tmp_path)

    def fails(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        save_with(fails, tmp_path)
    assert newest(tmp_path) == tmp_path / "checkpoint.0"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.0"]
    assert load(tmp_path) == b"whole"
