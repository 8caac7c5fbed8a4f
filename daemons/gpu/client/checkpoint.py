"""Checkpoints that a run taken for dead cannot spoil. Standard library only.

Each run of a job writes a file of its own, named after its epoch, so that one that still runs on a
node that was cut off never overwrites what its successor saved. A file is there whole or not at
all. Outside of the scheduler the epoch is 0.

    from intentd.daemons.gpu.client.checkpoint import load, save
    state = load()                  # None at the first start
    save(json.dumps(state).encode())

For libraries that write files themselves (``torch.save``) pass what writes one to ``save_with``,
and read from ``newest``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from intentd.daemons.gpu.client.progress import epoch

KEPT = 2


class StaleRunError(Exception):
    """A later run of this job has saved: this one should end."""


def save(data: bytes, directory: str | Path = ".", name: str = "checkpoint") -> Path:
    """On disk when this returns. Raises StaleRunError, OSError."""

    def write(path: str) -> None:
        Path(path).write_bytes(data)

    return save_with(write, directory, name)


def save_with(
    write: Callable[[str], None], directory: str | Path = ".", name: str = "checkpoint"
) -> Path:
    """Calls write(path of a temporary file), then puts that in place. As ``save``."""
    where, mine = Path(directory), epoch()
    if any(number > mine for number in _saved(where, name)):
        raise StaleRunError(f"{name} of a run after {mine} is there: this run was replaced")
    temporary = where / f".{name}.{mine}.{os.getpid()}"
    try:
        write(str(temporary))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        path = where / f"{name}.{mine}"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for number in sorted(_saved(where, name))[:-KEPT]:
        (where / f"{name}.{number}").unlink(missing_ok=True)
    return path


def newest(directory: str | Path = ".", name: str = "checkpoint") -> Path | None:
    """The last checkpoint of this run or of one before it."""
    where, mine = Path(directory), epoch()
    numbers = [number for number in _saved(where, name) if not mine or number <= mine]
    return where / f"{name}.{max(numbers)}" if numbers else None


def load(directory: str | Path = ".", name: str = "checkpoint") -> bytes | None:
    """Its content, None if there is none yet."""
    path = newest(directory, name)
    return path.read_bytes() if path is not None else None


def _saved(where: Path, name: str) -> list[int]:
    found = [path.name.rpartition(".") for path in where.glob(f"{name}.*")]
    return [int(number) for before, _, number in found if before == name and number.isdecimal()]
