"""The book of policies against a naive model, over restarts and restored backups."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from intentd.controller.flows_app import differences
from intentd.controller.policies import MIGRATIONS, HeldError, PolicyBook
from intentd.core.errors import InputError
from intentd.daemons.kit.store import Store

APP = "flows"


class Books(RuleBasedStateMachine):
    """What members may rely on: whatever happens to the process or the store, every number issued
    is larger than every number issued before, and what is newest is what was issued last."""

    def __init__(self) -> None:
        super().__init__()
        self.where = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.wall_s = 1000.0
        self.issued: list[tuple[int, int]] = []  # ever, by any life of the store
        self.contents: dict[int, int] = {}  # number -> content, in this life
        self.held = False
        self.backup: tuple[dict[int, int], bool] | None = None
        self.store: Store | None = None
        self.open()

    def open(self) -> None:
        self.store = Store(self.where / "db", MIGRATIONS)
        self.book = PolicyBook(
            self.store,
            witness=self.where / "witness",
            wall=lambda: self.wall_s,
            differences={"flows": differences},
        )
        newest = self.book.newest(APP)
        if newest is not None and (newest.era, newest.number) not in self.issued:
            self.note(newest.era, newest.number, newest.body["content"])

    def close(self) -> None:
        assert self.store is not None
        self.store.close()

    def note(self, era: int, number: int, content: int) -> None:
        assert (era, number) > max(self.issued, default=(0, 0))
        self.issued.append((era, number))
        self.contents[number] = content

    @rule(content=st.integers(0, 9), automatic=st.booleans(), step=st.integers(0, 3))
    def issue(self, content: int, automatic: bool, step: int) -> None:
        self.wall_s += step
        author = "automatic" if automatic else "operator"
        body = {"content": content}
        if automatic and self.held:
            with pytest.raises(HeldError):
                self.book.issue(APP, body, inputs={}, reason="r", author=author)
            return
        got = self.book.issue(APP, body, inputs={"why": 1}, reason="r", author=author)
        self.note(got.era, got.number, content)

    @rule(number=st.integers(0, 40))
    def rollback(self, number: int) -> None:
        if number not in self.contents:
            with pytest.raises(InputError):
                self.book.rollback(APP, number, author="operator")
            return
        got = self.book.rollback(APP, number, author="operator")
        self.held = True
        self.note(got.era, got.number, self.contents[number])

    @rule()
    def release(self) -> None:
        assert self.book.release(APP) is self.held
        self.held = False

    @rule()
    def restart(self) -> None:
        era = self.book.era
        self.close()
        self.open()
        assert self.book.era == era, "a mere restart begins no era"

    @rule()
    def take_backup(self) -> None:
        assert self.store is not None
        (self.where / "backup").unlink(missing_ok=True)
        self.store.backup(self.where / "backup")
        self.backup = (dict(self.contents), self.held)

    @rule(witness_too=st.booleans())
    def restore(self, witness_too: bool) -> None:
        """witness_too: the run directory is gone as well (the machine restarted)."""
        if self.backup is None:
            return
        self.close()
        for name in ("db", "db-wal", "db-shm"):
            (self.where / name).unlink(missing_ok=True)
        shutil.copy(self.where / "backup", self.where / "db")
        self.contents, self.held = dict(self.backup[0]), self.backup[1]
        if witness_too:
            (self.where / "witness").unlink()
            self.wall_s += 100  # eras that members pushed ahead of the clock are in the past again
        self.open()

    @rule(ahead=st.integers(0, 3))
    def member_knows_more(self, ahead: int) -> None:
        """A member runs a policy of a life of the store that nothing here remembers."""
        newest = max(self.issued, default=(0, 0))
        ran = (self.book.era + ahead, newest[1] + ahead)
        got = self.book.seen(APP, *ran, "agent@a")
        assert self.book.era >= ran[0]
        if got is not None:
            assert (got.era, got.number) > ran
            self.note(got.era, got.number, got.body["content"])

    @invariant()
    def newest_is_what_was_issued_last(self) -> None:
        newest = self.book.newest(APP)
        assert (newest is None) == (not self.contents)
        if newest is not None:
            assert newest.number == max(self.contents)
            assert newest.body["content"] == self.contents[newest.number]
        assert (self.book.hold(APP) is not None) == self.held

    def teardown(self) -> None:
        self.close()
        shutil.rmtree(self.where)


Books.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestBooks = Books.TestCase


def test_differences_name_what_changed() -> None:
    cls = {"threshold_bytes": 5.0, "weight": 1.0, "mpl": 1}
    old = {"domains": [{"domain": "a", "name": "2d", "classes": [cls]}, {"domain": "b"}]}
    new = {
        "domains": [
            {"domain": "a", "name": "ps", "classes": [cls | {"weight": 0.5}]},
            {"domain": "c", "classes": [cls]},
        ]
    }
    assert differences(old, new) == [
        "b: domain left",
        "a: name 2d -> ps",
        "a: classes[0].weight 1.0 -> 0.5",
        "c: new domain, 1 classes",
    ]
