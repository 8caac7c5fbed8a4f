"""Console sessions: opened by a token, ended with it; guesses are bounded."""

from __future__ import annotations

from pathlib import Path

from intentd.controller.console.sessions import (
    ALL_GUESSES,
    GUESSES,
    IDLE_S,
    LIFETIME_S,
    MAX_ADDRESSES,
    MAX_SESSIONS,
    WINDOW_S,
    Guesses,
    Sessions,
)
from intentd.controller.policies import MIGRATIONS
from intentd.daemons.kit.store import Store
from intentd.daemons.kit.tokens import TokenBook


def test_a_session_ends_with_its_token_and_its_time(tmp_path: Path) -> None:
    now = [0.0]
    book = TokenBook(tmp_path / "t", (), lambda: 0.0)
    token, _ = book.new("ann", "operate")
    sessions = Sessions(book, lambda: now[0])
    cookie = sessions.open(token)
    found = sessions.find(cookie)
    assert found is not None
    assert found[1].name == "ann"
    assert Sessions.same(found[0], found[0].csrf)
    assert not Sessions.same(found[0], "")
    assert not Sessions.same(found[0], "\udcff")
    assert sessions.find("other") is None
    while now[0] + IDLE_S / 2 < LIFETIME_S:
        now[0] += IDLE_S / 2
        assert sessions.find(cookie) is not None
    now[0] += IDLE_S / 2 + 1
    assert sessions.find(cookie) is None, "older than a day"
    idle = sessions.open(token)
    now[0] += IDLE_S + 1
    assert sessions.find(idle) is None
    gone = sessions.open(token)
    book.revoke("ann")
    assert sessions.find(gone) is None


async def test_sessions_outlive_the_process_and_end_in_time(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    book = TokenBook(tmp_path / "t", (), lambda: 0.0)
    token, _ = book.new("ann", "operate")
    store = Store(tmp_path / "s", MIGRATIONS)
    sessions = Sessions(book, lambda: now[0])
    cookie, left, idle = (sessions.open(token) for _ in range(3))
    first = sessions.find(cookie)
    assert first is not None
    await sessions.keep(store)
    sessions.close(left)
    now[0] += IDLE_S - 10
    assert sessions.find(cookie) is not None  # a later use is written down as well
    await sessions.keep(store)
    written = [list(row) for row in store.read("SELECT * FROM sessions")]
    assert len(written) == 2
    assert not any(cookie in str(row) or first[0].csrf in str(row) for row in written)
    again = Sessions(book, lambda: now[0] + 20)
    new = again.open(token)
    await again.load(store)
    found = again.find(cookie)
    assert found is not None
    assert (found[0].csrf, found[1].name) == (first[0].csrf, "ann")  # its open forms go on
    assert again.find(new) is not None
    assert again.find(idle) is None
    assert again.find(left) is None
    await again.keep(store)
    assert len(store.read("SELECT * FROM sessions")) == 2
    back = Sessions(book, lambda: now[0] - 3600)  # the clock was set back
    await back.load(store)
    assert back.find(cookie) is None
    store.close()


def test_sessions_are_bounded(tmp_path: Path) -> None:
    book = TokenBook(tmp_path / "t", (), lambda: 0.0)
    token, _ = book.new("ann", "read")
    sessions = Sessions(book, lambda: 0.0)
    first = sessions.open(token)
    for _ in range(MAX_SESSIONS):
        last = sessions.open(token)
    assert len(sessions) == MAX_SESSIONS
    assert sessions.find(first) is None
    assert sessions.find(last) is not None
    sessions.close(last)
    assert sessions.find(last) is None


def test_guesses_are_bounded_by_address_and_in_all() -> None:
    now = [0.0]
    guesses = Guesses(lambda: now[0])
    for _ in range(GUESSES):
        assert guesses.wait_s("a") == 0
        guesses.wrong("a")
        now[0] += 1
    assert guesses.wait_s("a") == WINDOW_S - GUESSES
    assert guesses.wait_s("b") == 0
    now[0] = WINDOW_S + GUESSES
    assert guesses.wait_s("a") == 0
    for number in range(ALL_GUESSES):
        guesses.wrong(f"host-{number}")
    assert guesses.wait_s("new") > 0
    for number in range(2 * MAX_ADDRESSES):
        guesses.wrong(f"host-{number}")
    assert len(guesses._wrong) == MAX_ADDRESSES
