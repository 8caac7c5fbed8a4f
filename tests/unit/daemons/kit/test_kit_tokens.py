"""API tokens: roles, hashes at rest, expiry, revocation, damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.kit.tokens import FILE, Role, TokenBook, token_hash

NOW = [1000.0]


def book(where: Path, *configured: str) -> TokenBook:
    return TokenBook(where / FILE, configured, lambda: NOW[0])


def test_a_token_is_kept_as_its_hash_alone(tmp_path: Path) -> None:
    made, secret = book(tmp_path).new("ci", "operate")
    text = (tmp_path / FILE).read_text()
    assert secret not in text
    assert token_hash(secret) in text
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert "hash" not in json.dumps(made.to_plain())
    found = book(tmp_path).find(secret)
    assert found is not None
    assert (found.name, found.role) == ("ci", Role.OPERATE)


def test_headers() -> None:
    known = TokenBook(None, [token_hash("b"), "read:" + token_hash("r")], lambda: 0.0)
    for header in ("Bearer b", "bearer  b "):
        token = known.from_header(header)
        assert token is not None
        assert token.role is Role.ADMIN
    for header in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer c",
        "Basic b",
        token_hash("b"),
        "Bearer \udcff",
    ):
        assert known.from_header(header) is None
    token = known.find("r")
    assert token is not None
    assert token.role is Role.READ


def test_revoked_and_expired_are_refused(tmp_path: Path) -> None:
    mine = book(tmp_path)
    _, first = mine.new("a", "admin")
    _, second = mine.new("b", "read", NOW[0] + 60)
    mine.revoke("a")
    assert mine.find(first) is None
    assert mine.find(second) is not None
    NOW[0] += 61
    assert mine.find(second) is None
    assert [token.name for token in book(tmp_path).all()] == ["b"]


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (("", "read"), "name"),
        (("a b", "read"), "name"),
        ((None, "read"), "name"),
        (("taken", "read"), "name"),
        (("x", "root"), "role"),
        (("x", None), "role"),
        (("x", "read", 1), "expires_wall_s"),
        (("x", "read", True), "expires_wall_s"),
        (("x", "read", float("nan")), "expires_wall_s"),
    ],
)
def test_bad_requests_name_their_field(
    tmp_path: Path, args: tuple[object, ...], field: str
) -> None:
    mine = book(tmp_path)
    mine.new("taken", "read")
    with pytest.raises(InputError, match=field):
        mine.new(*args)
    assert len(mine) == 1


def test_what_is_configured_is_revoked_there(tmp_path: Path) -> None:
    mine = book(tmp_path, token_hash("x"))
    with pytest.raises(InputError, match=r"edit status\.tokens"):
        mine.revoke("configured-1")
    with pytest.raises(InputError, match="name"):
        mine.revoke("none")


@pytest.mark.parametrize("text", ["", "{}", '{"tokens": [{}]}', '{"tokens": 3}', "\xff"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(IntentdError, match="move it away"):
        book(tmp_path)
