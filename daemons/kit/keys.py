"""Key files: CURVE pairs for ZeroMQ links, allow lists, and the FIN datagrams' shared key.

Text files of ``NAME HEX`` lines; ``#`` starts a comment. Files with a secret are written with mode
0600 and refused when others may read them. While a key is rotated (``rotation``) a file has a
second one, under the name with ``-next`` or ``-previous`` behind it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq

from intentd.core.errors import InputError, IntentdError

PUBLIC: Final = "intentd-curve-public"
SECRET: Final = "intentd-curve-secret"  # noqa: S105  the name of a field, not a secret
FIN: Final = "intentd-fin-key"
NEXT: Final = "-next"
PREVIOUS: Final = "-previous"
FIN_KEY_BYTES: Final = 32
_CURVE_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 1 << 20


class KeyFileError(InputError):
    """A key file that is missing, readable by others or not of its kind."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A CURVE pair, raw bytes; the secret never shows in a repr."""

    public: bytes
    secret: bytes = field(repr=False)


def new_curve_keys() -> CurveKeys:
    public, secret = zmq.curve_keypair()
    return CurveKeys(_from_z85(public), _from_z85(secret))


def _from_z85(text: bytes) -> bytes:
    from zmq.utils import z85  # only where keys are made

    raw: bytes = z85.decode(text)
    return raw


def new_fin_key() -> bytes:
    return secrets.token_bytes(FIN_KEY_BYTES)


def write_curve_keys(path: Path, keys: CurveKeys) -> None:
    """Write PATH (pair, 0600) and PATH.pub (public part). Never overwrites."""
    public = f"{PUBLIC} {keys.public.hex()}\n"
    _write_new(path, public + f"{SECRET} {keys.secret.hex()}\n", 0o600)
    _write_new(path.with_name(path.name + ".pub"), public, 0o644)


def write_fin_key(path: Path, key: bytes) -> None:
    _write_new(path, f"{FIN} {key.hex()}\n", 0o600)


def read_curve_keys(path: Path) -> CurveKeys:
    """Raises KeyFileError."""
    found = _read(path, secret=True)
    return CurveKeys(
        _key(found, PUBLIC, path, _CURVE_BYTES), _key(found, SECRET, path, _CURVE_BYTES)
    )


def read_curve_public(path: Path) -> bytes:
    """The public key of a pair file or of its .pub. Raises KeyFileError."""
    found = _read(path, secret=False)
    if SECRET in found:
        _refuse_readable(path)
    return _key(found, PUBLIC, path, _CURVE_BYTES)


def read_curve_publics(path: Path) -> tuple[bytes, ...]:
    """The public key of a pair file or of its .pub, and the one it is rotated to or from."""
    first, found = read_curve_public(path), _read(path, secret=False)
    return (first, *_others(found, PUBLIC, path, _CURVE_BYTES))


def read_fin_key(path: Path) -> bytes:
    """Raises KeyFileError."""
    return read_fin_keys(path)[0]


def read_fin_keys(path: Path) -> tuple[bytes, ...]:
    """The key to sign with, then any other that is accepted. Raises KeyFileError."""
    found = _read(path, secret=True)
    first = _key(found, FIN, path, FIN_KEY_BYTES)
    return (first, *_others(found, FIN, path, FIN_KEY_BYTES))


def _others(found: Mapping[str, str], name: str, path: Path, length: int) -> tuple[bytes, ...]:
    names = (name + NEXT, name + PREVIOUS)
    return tuple(_key(found, other, path, length) for other in names if other in found)


def secret_lines(path: Path) -> dict[str, str]:
    """NAME -> HEX of a file with a secret, as it stands. Raises KeyFileError."""
    return _read(path, secret=True)


def read_allow_list(path: Path) -> dict[bytes, str]:
    """Public key -> ``ROLE@NAME``, ``ROLE`` or "" (any member). Raises KeyFileError."""
    allowed: dict[bytes, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0].startswith(PUBLIC):  # a .pub file's line may be appended as it is
            words = words[1:]
        if not words or len(words) > 2:
            raise KeyFileError(f"{path}:{number}", line[:80], "KEY [ROLE[@NAME]]")
        key = _hex(words[0], f"{path}:{number}", _CURVE_BYTES)
        allowed[key] = words[1] if len(words) == 2 else ""
    return allowed


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("ascii")
    except OSError as error:
        raise KeyFileError(str(path), error.strerror, "a readable key file") from None
    except UnicodeDecodeError:
        raise KeyFileError(str(path), "binary data", "a key file of text lines") from None


def _read(path: Path, *, secret: bool) -> dict[str, str]:
    text = _text(path)
    if secret:
        _refuse_readable(path)
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition("#")[0].strip().partition(" ")
        if name:
            found[name] = value.strip()
    return found


def _refuse_readable(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise KeyFileError(str(path), f"mode {mode:04o}", "mode 0600: only the owner may read it")


def _key(found: Mapping[str, str], name: str, path: Path, length: int) -> bytes:
    if name not in found:
        raise KeyFileError(str(path), None, f"a line '{name} HEX'")
    return _hex(found[name], str(path), length)


def _hex(text: str, where: str, length: int) -> bytes:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != length:
        raise KeyFileError(where, "(hidden)", f"{2 * length} hex digits")
    return raw


def _write_new(path: Path, text: str, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except FileExistsError:
        raise IntentdError(f"{path} exists: keys are never overwritten, move it away") from None
    except OSError as error:
        raise IntentdError(f"{path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
