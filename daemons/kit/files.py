"""Files that users name, read once within bounds; small files that must survive a crash whole, and
the directories they live in."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from intentd.core.errors import InputError, IntentdError


def read_text(path: Path, field: str, most_bytes: int) -> str:
    """A text file of bounded size that a user named. Raises InputError naming the field."""
    try:
        # a pipe that nobody writes to is empty, and not waited for
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(most_bytes + 1) or b""
        if len(data) > most_bytes:
            raise InputError(field, str(path), f"a file of at most {most_bytes} bytes")
        return data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(field, str(path), f"a readable text file ({error})") from None


def parse_json(text: str, field: str, name: str) -> Any:
    """A JSON document; name is what to call it. Raises InputError naming the field, also for one
    nested too deeply or with a number too long to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(field, name, "a JSON document that is not nested so deeply") from None
    except ValueError as error:
        raise InputError(field, name, f"a JSON document ({error})") from None


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new, never a part.

    Write beside it, fsync, rename, fsync the directory. Raises OSError; the old file then stays.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(beside, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_directory(path: Path, mode: int) -> None:
    """Make a directory; one in a shared place (/tmp) must be ours alone. Raises IntentdError."""
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)
        found = path.stat(follow_symlinks=False)
    except OSError as error:
        raise IntentdError(f"cannot make directory {path}: {error.strerror}") from None
    parent = path.parent.stat()
    if parent.st_mode & stat.S_ISVTX and found.st_uid not in (0, os.geteuid()):
        raise IntentdError(f"{path}: owned by uid {found.st_uid}, expected this user's directory")
