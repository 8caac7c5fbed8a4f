"""Output of jobs: kept within bounds, read by offsets that stay true, past full disks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.gpu.outputs import decode, read_output
from intentd.daemons.gpu.supervisor import Output


def read_all(path: Path, offset: int, limit: int = 7) -> tuple[str, int, int]:
    """Text from offset on in small pieces, the next offset, bytes dropped."""
    text, dropped = "", 0
    while True:
        kept = read_output(path, offset, limit)
        piece, used = decode(kept.data, final=False)
        dropped += max(0, kept.at - offset)
        offset = kept.at + used
        if not piece:
            return text, offset, dropped
        text += piece


def test_who_follows_hears_everything_over_many_rotations(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    output, heard, at, written = Output(path, 64), "", 0, ""
    for turn in range(200):
        line = f"line {turn}: ümläut €\n"
        if turn % 50 == 25:  # the next run's supervisor, or a daemon that was restarted
            output.close()
            output = Output(path, 64)
        output.write(line.encode())
        written += line
        text, at, dropped = read_all(path, at)
        heard += text
        assert dropped == 0
    assert heard == written
    assert at == len(written.encode())
    assert sum(p.stat().st_size for p in tmp_path.glob("*.log")) <= 2 * (64 + 30)
    assert len(list(tmp_path.glob("*.log"))) == 2
    output.close()


def test_who_comes_late_is_told_how_much_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    output = Output(path, 10)
    for turn in range(8):
        output.write(f"{turn}".encode() * 10)
    text, at, dropped = read_all(path, 0, 1000)
    assert (text, at, dropped) == ("6" * 10 + "7" * 10, 80, 60)
    assert read_all(path, 75) == ("77777", 80, 0)
    tail = read_output(path, -12, 1000)
    assert (tail.data, tail.at, tail.end) == (b"66" + b"7" * 10, 68, 80)
    assert read_output(path, 10**12, 10).at == 80
    assert read_output(path, -(10**12), 1000).at == 60
    output.close()


def test_pieces_end_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_bytes("a€b".encode())
    assert decode(read_output(path, 0, 2).data, final=False) == ("a€", 4)  # room for one at least
    assert read_output(path, -3, 10).data == b"b"  # not the rest of a character
    path.write_bytes("a€".encode()[:3])
    assert decode(read_output(path, 0, 10).data, final=False) == ("a", 1)
    assert decode(read_output(path, 0, 10).data, final=True) == ("a�", 3)
    assert decode(b"\xff\x80ok", final=False) == ("��ok", 4)


def test_output_of_versions_that_kept_no_offset(tmp_path: Path) -> None:
    (tmp_path / "output.1.log").write_text("old ")
    (tmp_path / "output.log").write_text("new ")
    (tmp_path / "output.x.log").write_text("somebody's own")
    assert read_all(tmp_path / "output.log", 0)[0] == "old new "
    output = Output(tmp_path / "output.log", 4)
    output.write(b"newest")
    assert read_all(tmp_path / "output.log", 0) == ("new newest", 14, 4)
    output.close()
    assert read_output(tmp_path / "none" / "output.log", 0, 9).data == b""


def test_a_disk_that_refused_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "output.log"
    output = Output(path, 4)
    output.write(b"1234")
    true_open, true_write = os.open, os.write

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "open", full)
        output.write(b"lost")  # renamed, and no new file
    assert output.dropped == 4
    monkeypatch.setattr(os, "open", true_open)

    def one_byte(descriptor: int, data: bytes) -> int:
        return true_write(descriptor, bytes(data)[:1])

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", one_byte)
        output.write(b"abc")
    assert (output.dropped, path.read_bytes()) == (4, b"abc")
    calls = iter([one_byte, full])
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda *given: next(calls)(*given))
        output.write(b"xyz")
    assert (output.dropped, path.read_bytes()) == (6, b"abcx")
    assert read_all(path, 0)[0] == "1234abcx"
    output.close()
