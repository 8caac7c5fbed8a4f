"""A private PostgreSQL for tests and benchmarks: initdb in a directory, a Unix socket, no port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

DATABASE = "postgres"


def binaries() -> Path | None:
    """Where initdb and postgres are; Debian keeps them off the PATH. INTENTD_PG_BIN: others, such
    as those of a PostgreSQL with extensions that the distribution has not."""
    if named := os.environ.get("INTENTD_PG_BIN"):
        return Path(named)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).parent if on_path and shutil.which("initdb") else None


def why_not() -> str:
    """Why there can be no cluster here; empty when there can."""
    if binaries() is None:
        return "PostgreSQL is not installed"
    if os.geteuid() == 0 and not _other_user():
        return "PostgreSQL refuses root, and there is no user nobody"
    return ""


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


class Postgres:
    """start() and stop() as often as wanted; close() removes it. Not durable against a power cut
    (fsync off) unless durable is set: its own kill -9 loses nothing either way."""

    def __init__(self, *, durable: bool = False, base: Path | None = None) -> None:
        """base: an empty directory to live in, by default one of its own under /tmp."""
        where = binaries()
        assert where is not None
        self._bin = where
        self._process: subprocess.Popen[bytes] | None = None
        # Short: a Unix socket's path has 107 bytes. Not pytest's: another user must get there.
        self.base = base or Path(tempfile.mkdtemp(prefix="ipg-", dir="/tmp"))
        self._options: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _other_user()
            assert user is not None
            os.chown(self.base, user.pw_uid, user.pw_gid)
            self._options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.data = self.base / "data"
        try:
            subprocess.run(
                [
                    self._bin / "initdb", "--pgdata", self.data, "--username", "intentd",
                    "--auth", "trust", "--no-sync", "--encoding", "UTF8", "--locale", "C",
                ],
                check=True, capture_output=True, cwd=self.base, timeout=60, **self._options,
            )  # fmt: skip
            with (self.data / "postgresql.conf").open("a") as config:
                config.write(
                    f"listen_addresses = ''\nunix_socket_directories = '{self.base}'\n"
                    f"fsync = {'on' if durable else 'off'}\nshared_buffers = 64MB\n"
                    "max_connections = 60\nautovacuum_naptime = 10s\n"
                    + ("max_wal_size = 64MB\n" if base is not None else "")
                )
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"postgresql://intentd@/{DATABASE}?host={self.base}"

    def start(self) -> None:
        with (self.base / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.data],
                stdout=log, stderr=log, cwd=self.base, **self._options,
            )  # fmt: skip
        until_s = time.monotonic() + 60
        while not (self.base / ".s.PGSQL.5432").exists() or not self._answers():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError((self.base / "log").read_text()[-2000:])
            time.sleep(0.02)

    def _answers(self) -> bool:
        ready = subprocess.run(
            [self._bin / "pg_isready", "-q", "-h", self.base, "-t", "5"], check=False, timeout=30
        )
        return ready.returncode == 0

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT: at once, as in a crash. SIGINT: clients are cut off in order."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def ended(self) -> bool:
        """Whether it is not there, by itself or stopped."""
        return self._process is None or self._process.poll() is not None

    def pids(self) -> list[int]:
        """The server and its processes."""
        if self._process is None:
            return []
        own = self._process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [own, *map(int, children)]

    def empty(self) -> None:
        """Drop every table of ours."""
        self.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def run(self, sql: str) -> list[list[str]]:
        """Rows of a statement, as text."""
        done = subprocess.run(
            [
                self._bin / "psql", "-qAtX", "-F", "\x1f", "-v", "ON_ERROR_STOP=1",
                "-h", self.base, "-U", "intentd", "-d", DATABASE, "-c", sql,
            ],
            check=True, capture_output=True, text=True, cwd="/", timeout=60,
        )  # fmt: skip
        return [line.split("\x1f") for line in done.stdout.splitlines()]

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.base, ignore_errors=True)
