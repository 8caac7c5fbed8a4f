"""What a host's devices held before the agent changed them, on disk before the first change.

One JSON file for all devices, replaced whole (temporary file, fsync, rename, fsync of the
directory), guarded by a lock file so that an agent that starts and a restoration that is still
under way never work on the same device.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError, IntentdError

VERSION: Final = 1
MAX_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """One device as it was before the first change.

    direction: "egress", or "ingress" where arrivals pass an IFB device of ours (named by ifb).
    kind, handle: its root qdisc. qdiscs: all of them, for people to read. ifindex and netns
    (inode of the namespace) tell a device from a later one of the same name.
    """

    device: str
    direction: str
    ifindex: int
    netns: int
    kind: str
    handle: int
    qdiscs: tuple[str, ...] = ()
    ifb: str = ""


class AgentAliveError(IntentdError):
    """Another agent holds the devices, and runs."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The agent that holds the devices; pid and start tell it from a later process."""

    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> Owner:
        return cls(os.getpid(), _start_ticks(os.getpid()) or 0)

    @property
    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.start_ticks

    def yield_or_raise(self) -> None:
        """Pass if the owner is this process or dead. Raises AgentAliveError."""
        if self.alive and self != Owner.current():
            raise AgentAliveError(f"another agent holds the devices and runs (pid {self.pid})")


@dataclass(frozen=True, slots=True)
class Record:
    """The file's content. boot: the kernel's boot id; after a reboot nothing is left to undo."""

    boot: str
    owner: Owner
    devices: tuple[Found, ...] = ()

    def find(self, device: str, direction: str) -> Found | None:
        for found in self.devices:
            if (found.device, found.direction) == (device, direction):
                return found
        return None


def _start_ticks(pid: int) -> int | None:
    """Start time from /proc/<pid>/stat (field 22), None if there is no such live process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()
    if after_name[0] in {"Z", "X"}:
        return None
    return int(after_name[19])


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def netns_inode() -> int:
    """The network namespace of the calling thread."""
    return Path("/proc/thread-self/ns/net").stat().st_ino


class StateFile:
    """Reads and replaces the record. Call its methods inside ``locked()``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock beside the file; waits for whoever has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(
            self.path.with_name(self.path.name + ".lock"),
            os.O_CREAT | os.O_RDWR | os.O_CLOEXEC,
            0o600,
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def load(self) -> Record | None:
        """None where there is no file. Raises InputError for one that is not ours."""
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        return parse(data, str(self.path))

    def save(self, record: Record) -> None:
        """On disk when this returns. A record without devices removes the file."""
        if not record.devices:
            self.path.unlink(missing_ok=True)
            self._sync_directory()
            return
        temporary = self.path.with_name(self.path.name + ".new")
        with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(json.dumps({"version": VERSION, **asdict(record)}, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def parse(data: bytes, where: str) -> Record:
    """The record in these bytes. Raises InputError naming the path of what is wrong."""
    if len(data) > MAX_BYTES:
        raise InputError(where, f"{len(data)} bytes", f"at most {MAX_BYTES}")
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(where, str(error), "JSON") from None
    plain = _fields(plain, where, {"version", "boot", "owner", "devices"})
    if plain["version"] != VERSION:
        raise InputError(f"{where}: version", plain["version"], str(VERSION))
    owner = _build(Owner, plain["owner"], f"{where}: owner")
    if not isinstance(plain["boot"], str) or not isinstance(plain["devices"], list):
        raise InputError(where, "boot or devices", "a text and a list")
    devices = []
    for index, row in enumerate(plain["devices"]):
        at = f"{where}: devices[{index}]"
        found = _build(Found, row, at)
        if found.direction not in {"egress", "ingress"}:
            raise InputError(f"{at}.direction", found.direction, "egress or ingress")
        devices.append(found)
    return Record(plain["boot"], owner, tuple(devices))


def _fields(plain: Any, where: str, expected: set[str]) -> dict[str, Any]:
    if not isinstance(plain, dict) or set(plain) != expected:
        got = sorted(map(str, plain)) if isinstance(plain, dict) else plain
        raise InputError(where, got, f"the fields {', '.join(sorted(expected))}")
    return plain


_TYPES: Final[dict[str, type]] = {"int": int, "str": str, "tuple[str, ...]": list}


def _build(kind: Any, plain: Any, where: str) -> Any:
    table = _fields(plain, where, {f.name for f in fields(kind)})
    for f in fields(kind):
        value = table[f.name]
        if isinstance(value, bool) or not isinstance(value, _TYPES[str(f.type)]):
            raise InputError(f"{where}.{f.name}", value, f"a value of type {f.type}")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise InputError(f"{where}.{f.name}", value, "a list of texts")
            table[f.name] = tuple(value)
    return kind(**table)
