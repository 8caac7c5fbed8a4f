"""The store: migrations, transactions, damage, a full disk, kill -9."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.store import Store, StoreError

SCHEMA = ("CREATE TABLE item (id INTEGER PRIMARY KEY, text TEXT NOT NULL)",)


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = Store(path, SCHEMA)
    with store.transaction() as db:
        db.execute("INSERT INTO item (text) VALUES ('a')")
    store.close()
    store = Store(path, (*SCHEMA, "ALTER TABLE item ADD COLUMN size INTEGER DEFAULT 7"))
    assert store.version == 2
    assert [tuple(row) for row in store.read("SELECT text, size FROM item")] == [("a", 7)]
    store.close()
    with pytest.raises(StoreError, match="schema version 2, newer than 1"):
        Store(path, SCHEMA)


def test_a_failing_migration_leaves_the_old_schema(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    Store(path, SCHEMA).close()
    with pytest.raises(StoreError, match="nonsense"):
        Store(path, (*SCHEMA, "CREATE TABLE other (x); nonsense"))
    store = Store(path, SCHEMA)
    assert store.version == 1
    assert store.read("SELECT name FROM sqlite_master WHERE name = 'other'") == []
    store.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", SCHEMA)

    def half_way() -> None:
        with store.transaction() as db:
            db.execute("INSERT INTO item (text) VALUES ('a')")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert store.read("SELECT * FROM item") == []
    assert store.unready() == []
    store.close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, os.urandom(8192)])
def test_a_damaged_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="move it away or restore a backup"):
        Store(path, SCHEMA)


def test_a_damaged_page_is_found_at_open(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = Store(path, SCHEMA)
    with store.transaction() as db:
        db.executemany("INSERT INTO item (text) VALUES (?)", [("x" * 500,)] * 200)
    store.close()
    data = bytearray(path.read_bytes())
    data[4096 * 4 : 4096 * 5] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(StoreError, match="backup"):
        Store(path, SCHEMA)


def test_a_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot open"):
        Store(tmp_path / "none" / "s.db", SCHEMA)


def test_a_full_disk_shows_and_recovers(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", SCHEMA)
    store._db.execute(
        f"PRAGMA max_page_count={store._db.execute('PRAGMA page_count').fetchone()[0]}"
    )
    with pytest.raises(StoreError, match="full"), store.transaction() as db:
        db.executemany("INSERT INTO item (text) VALUES (?)", [("x" * 4000,)] * 50)
    assert "full" in store.unready()[0]
    store._db.execute("PRAGMA max_page_count=100000")
    store.probe()
    assert store.unready() == []
    with store.transaction() as db:
        db.execute("INSERT INTO item (text) VALUES ('again')")
    assert len(store.read("SELECT * FROM item")) == 1
    store.close()


async def test_work_runs_in_order_off_the_loop(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", SCHEMA)

    def add(text: str) -> int:
        with store.transaction() as db:
            return db.execute("INSERT INTO item (text) VALUES (?)", (text,)).lastrowid or 0

    assert [await store.run(lambda _, t=t: add(t)) for t in "abc"] == [1, 2, 3]  # type: ignore[misc]
    store.backup(tmp_path / "copy.db")
    store.close()
    copy = sqlite3.connect(tmp_path / "copy.db")
    assert copy.execute("SELECT count(*) FROM item").fetchone() == (3,)
    copy.close()


_WRITER = """
import sys
from pathlib import Path
from intentd.daemons.kit.store import Store
store = Store(Path(sys.argv[1]), (sys.argv[2],))
number = store.read("SELECT coalesce(max(id), 0) FROM item")[0][0]
while True:
    number += 1
    with store.transaction() as db:
        db.execute("INSERT INTO item VALUES (?, ?)", (number, "x" * 2000))
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    acknowledged = 0
    for round_ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), *SCHEMA], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(3 + 7 * round_):
                acknowledged = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                if line.endswith("\n"):
                    acknowledged = int(line)
        store = Store(path, SCHEMA)
        ids = [row[0] for row in store.read("SELECT id FROM item ORDER BY id")]
        store.close()
        assert ids == list(range(1, len(ids) + 1))
        assert len(ids) >= acknowledged


def test_an_atomic_write_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"one")
    write_atomically(path, b"two", mode=0o644)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    path.unlink()
    path.mkdir()
    (path / "x").touch()
    with pytest.raises(OSError, match="directory"):
        write_atomically(path, b"three")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


_REPLACER = """
import sys
from pathlib import Path
from intentd.daemons.kit.files import write_atomically
path = Path(sys.argv[1])
for number in range(1, 1_000_000):
    write_atomically(path, b"%07d" % number * 20_000)
    print(number, flush=True)
"""


def test_kill_9_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", _REPLACER, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(5):
                seen = int(writer.stdout.readline())
            writer.kill()
        data = path.read_bytes()
        assert len(data) == 7 * 20_000
        assert data == data[:7] * 20_000
        assert int(data[:7]) >= seen
