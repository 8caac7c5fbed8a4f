"""Key rotation: the steps a key file goes through so that both sides always share a key.

A file has one key; then two, the second already accepted (``-next``); then the new one in use and
the old one still accepted (``-previous``); then the new one alone. After each step the file (of a
CURVE pair only its ``.pub``) goes where the others read it, and they reload: whoever has reloaded
and whoever has not understand each other at every moment, so there is no step that must happen
everywhere at once. ``next_step`` takes the step that comes next, which the file itself says.

Of a CURVE server only one key can be in use: its clients know both and try the other. Of a CURVE
client both keys are in the server's allow list.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from pathlib import Path

from intentd.core.errors import InputError
from intentd.daemons.kit import keys
from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.keys import FIN, NEXT, PREVIOUS, PUBLIC, SECRET


class Step(enum.Enum):
    """What a step did; the value is what the others have to do before the next one."""

    ADDED = "both sides must know the new key before it is used"
    SWITCHED = "the new key is used, the old one still accepted"
    DROPPED = "the old key is accepted no more"


def next_step(path: Path, allow_files: Sequence[Path] = ()) -> Step:
    """Take the next step with a FIN key or a CURVE pair. Raises KeyFileError or InputError.

    allow_files: allow lists where the pair's public key stands; the new one gets the same line.
    """
    lines = keys.secret_lines(path)
    if FIN in lines:
        step, after = _fin_step(lines)
    elif PUBLIC in lines and SECRET in lines:
        step, after = _curve_step(lines)
    else:
        raise InputError(str(path), sorted(lines), f"{FIN}, or {PUBLIC} and {SECRET}")
    lists = {file: _allow_list(file, lines, after) for file in allow_files}
    # Those who check a key hear of it before, and forget it after, the file that uses it changed.
    if step is not Step.DROPPED:
        _write_lists(lists)
    _write(path, after, 0o600)
    if PUBLIC in after:
        public = {name: value for name, value in after.items() if name.startswith(PUBLIC)}
        _write(path.with_name(path.name + ".pub"), public, 0o644)
    if step is Step.DROPPED:
        _write_lists(lists)
    return step


def _fin_step(lines: dict[str, str]) -> tuple[Step, dict[str, str]]:
    now = lines[FIN]
    if FIN + NEXT in lines:
        return Step.SWITCHED, {FIN: lines[FIN + NEXT], FIN + PREVIOUS: now}
    if FIN + PREVIOUS in lines:
        return Step.DROPPED, {FIN: now}
    return Step.ADDED, {FIN: now, FIN + NEXT: keys.new_fin_key().hex()}


def _curve_step(lines: dict[str, str]) -> tuple[Step, dict[str, str]]:
    now = {name: lines[name] for name in (PUBLIC, SECRET)}
    if PUBLIC + NEXT in lines:
        new = {PUBLIC: lines[PUBLIC + NEXT], SECRET: lines[SECRET + NEXT]}
        return Step.SWITCHED, new | {PUBLIC + PREVIOUS: now[PUBLIC]}
    if PUBLIC + PREVIOUS in lines:
        return Step.DROPPED, now
    pair = keys.new_curve_keys()
    more = {PUBLIC + NEXT: pair.public.hex(), SECRET + NEXT: pair.secret.hex()}
    return Step.ADDED, now | more


def _allow_list(path: Path, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The lines of an allow list with the new key beside the old one, or without the old one."""
    kept: list[str] = []
    known = {value for name, value in after.items() if name.startswith(PUBLIC)}
    gone = {value for name, value in before.items() if name.startswith(PUBLIC)} - known
    text = path.read_text(encoding="ascii")
    missing = {value for value in known if value not in text}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if set(words) & gone:
            continue
        kept.append(line)
        if missing and before[PUBLIC] in words:
            kept += [line.replace(before[PUBLIC], value) for value in sorted(missing)]
            missing = set()
    if missing:
        raise InputError(str(path), "no line of this key", f"{before[PUBLIC]} [ROLE[@NAME]]")
    return kept


def _write_lists(lists: dict[Path, list[str]]) -> None:
    for path, lines in lists.items():
        _replace(path, "\n".join(lines) + "\n", path.stat().st_mode & 0o777)


def _write(path: Path, lines: dict[str, str], mode: int) -> None:
    _replace(path, "".join(f"{name} {value}\n" for name, value in lines.items()), mode)


def _replace(path: Path, text: str, mode: int) -> None:
    """Whole or not at all, and for its owner as before: the daemon's user reads it."""
    owner = path.stat() if path.exists() else None
    write_atomically(path, text.encode("ascii"), mode=mode)
    if owner is not None and os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)
