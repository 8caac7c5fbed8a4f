"""Key files: modes, kinds, allow lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from intentd.core.errors import IntentdError
from intentd.daemons.kit import keys


def test_a_pair_is_written_read_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "k"
    pair = keys.new_curve_keys()
    keys.write_curve_keys(path, pair)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.read_curve_keys(path) == pair
    assert keys.read_curve_public(path) == pair.public
    assert keys.read_curve_public(tmp_path / "k.pub") == pair.public
    assert pair.secret.hex() not in repr(pair)
    with pytest.raises(IntentdError, match="never overwritten"):
        keys.write_curve_keys(path, pair)


def test_a_secret_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fin"
    keys.write_fin_key(path, keys.new_fin_key())
    assert len(keys.read_fin_key(path)) == 32
    path.chmod(0o640)
    with pytest.raises(keys.KeyFileError, match="0600"):
        keys.read_fin_key(path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with pytest.raises(keys.KeyFileError, match="No such file"):
        keys.read_fin_key(path)
    path.touch(0o600)
    for content, expected in (
        (b"", "a line 'intentd-fin-key HEX'"),
        (b"intentd-fin-key zz", "64 hex digits"),
        (b"intentd-fin-key 00", "64 hex digits"),
        (b"\xff\xfe", "text lines"),
    ):
        path.write_bytes(content)
        with pytest.raises(keys.KeyFileError, match=expected):
            keys.read_fin_key(path)


def test_the_allow_list(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    one, two = keys.new_curve_keys().public, keys.new_curve_keys().public
    path.write_text(
        f"# who\n{one.hex()} agent@h1  # the first\n\nintentd-curve-public {two.hex()}\n"
    )
    assert keys.read_allow_list(path) == {one: "agent@h1", two: ""}
    path.write_text(f"{one.hex()} a b")
    with pytest.raises(keys.KeyFileError, match=r"allow:1: .*KEY \[ROLE"):
        keys.read_allow_list(path)
