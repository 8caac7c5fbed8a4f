"""API tokens of a daemon's HTTP endpoint: who may read, operate, administer. Only hashes are kept.

A token carries 256 random bits, so that a plain SHA-256 of it cannot be guessed back; a slow hash
(scrypt) protects what people choose and remember, and would cost a tenth of a second a request.
Tokens come from the configuration (``status.tokens``: hashes) and from the book, a file in the
state directory that ``intentctl tokens`` changes while the daemon runs.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.kit.files import write_atomically

PREFIX: Final = "intentd-"
FILE: Final = "tokens.json"
MAX_TOKENS: Final = 1000
MAX_FILE_BYTES: Final = 1 << 20
CONFIGURED: Final = re.compile(r"(?:(read|operate|admin):)?([0-9a-f]{64})\Z")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")


class Role(enum.IntEnum):
    """What a caller may do; each may do what those below it may. NONE: not known who it is."""

    NONE = 0
    READ = 1
    OPERATE = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        return self.name.lower()


def role_of(word: object, field: str = "role") -> Role:
    """Raises InputError."""
    if word not in ("read", "operate", "admin"):
        raise InputError(field, f"{word!r:.40}", "read, operate or admin")
    return Role[str(word).upper()]


@dataclass(frozen=True, slots=True)
class Token:
    """One token without its secret. expires_wall_s None: never."""

    name: str
    role: Role
    hashed: str
    created_wall_s: float = 0.0
    expires_wall_s: float | None = None
    configured: bool = False

    def to_plain(self) -> dict[str, Any]:
        """For people: without the hash."""
        return {
            "name": self.name,
            "role": self.role.word,
            "created_wall_s": self.created_wall_s,
            "expires_wall_s": self.expires_wall_s,
            "configured": self.configured,
        }


def token_hash(token: str) -> str:
    # Headers may hold any bytes; aiohttp gives the undecodable ones as lone surrogates.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def configured_tokens(entries: Sequence[str]) -> dict[str, Token]:
    """hash -> token of ``[ROLE:]SHA256`` entries; without a role they administer."""
    found = {}
    for number, entry in enumerate(entries, 1):
        match = CONFIGURED.match(entry)
        if match is None:
            raise InputError("status.tokens", "(hidden)", "[read:|operate:|admin:]SHA256")
        role = role_of(match[1] or "admin")
        found[match[2]] = Token(f"configured-{number}", role, match[2], configured=True)
    return found


class TokenBook:
    """Looked up by hash: what a comparison's time would tell of a digest helps nobody."""

    def __init__(
        self, path: Path | None, configured: Sequence[str], wall: Callable[[], float]
    ) -> None:
        """path None: the configuration's alone. Raises IntentdError for a damaged file."""
        self._path = path
        self._wall = wall
        self._configured = configured_tokens(configured)
        self._own = _load(path) if path is not None else {}

    def __len__(self) -> int:
        return len(self._configured) + len(self._own)

    def set_configured(self, entries: Sequence[str]) -> None:
        self._configured = configured_tokens(entries)

    def find(self, secret: str) -> Token | None:
        """The token with this secret, if it is in force."""
        return self.valid(token_hash(secret)) if secret else None

    def valid(self, hashed: str) -> Token | None:
        token = self._own.get(hashed) or self._configured.get(hashed)
        if token is None:
            return None
        expires = token.expires_wall_s
        return token if expires is None or self._wall() < expires else None

    def from_header(self, header: str) -> Token | None:
        """The token of an Authorization header."""
        scheme, _, secret = header.partition(" ")
        return self.find(secret.strip()) if scheme.lower() == "bearer" else None

    def all(self) -> list[Token]:
        return sorted(
            (*self._own.values(), *self._configured.values()), key=lambda token: token.name
        )

    def new(self, name: object, role: object, expires_wall_s: object = None) -> tuple[Token, str]:
        """A new token and its secret, which is shown once. Raises InputError, IntentdError."""
        if not isinstance(name, str) or not _NAME.match(name):
            raise InputError("name", f"{name!r:.60}", "letters, digits and ._@-, at most 64")
        if any(token.name == name for token in self.all()):
            raise InputError("name", name, "a name that no token has")
        if len(self._own) >= MAX_TOKENS:
            raise InputError("tokens", len(self._own), f"fewer than {MAX_TOKENS}")
        if expires_wall_s is not None and (
            isinstance(expires_wall_s, bool)
            or not isinstance(expires_wall_s, (int, float))
            or not self._wall() < expires_wall_s < 1e12
        ):
            raise InputError("expires_wall_s", f"{expires_wall_s!r:.40}", "seconds, in the future")
        secret = new_secret()
        token = Token(name, role_of(role), token_hash(secret), self._wall(), expires_wall_s)
        self._save({**self._own, token.hashed: token})
        return token, secret

    def revoke(self, name: object) -> Token:
        """From now on it is refused. Raises InputError, IntentdError."""
        for token in self.all():
            if token.name == name:
                if token.configured:
                    raise InputError("name", name, "a token of the book: edit status.tokens")
                self._save({key: one for key, one in self._own.items() if one is not token})
                return token
        raise InputError("name", f"{name!r:.60}", "the name of a token")

    def _save(self, own: dict[str, Token]) -> None:
        if self._path is None:
            raise IntentdError("tokens: no file to keep them in")
        rows = [
            {
                "name": token.name,
                "role": token.role.word,
                "sha256": token.hashed,
                "created_wall_s": token.created_wall_s,
                "expires_wall_s": token.expires_wall_s,
            }
            for token in own.values()
        ]
        try:
            write_atomically(self._path, json.dumps({"tokens": rows}, indent=1).encode() + b"\n")
        except OSError as error:
            raise IntentdError(f"{self._path}: {error.strerror}") from None
        self._own = own


def _load(path: Path) -> dict[str, Token]:
    try:
        with path.open("rb") as file:
            rows = json.loads(file.read(MAX_FILE_BYTES))["tokens"]
        tokens = [
            Token(
                str(row["name"]),
                role_of(row["role"]),
                str(row["sha256"]),
                float(row["created_wall_s"]),
                None if row["expires_wall_s"] is None else float(row["expires_wall_s"]),
            )
            for row in rows
        ]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IntentdError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise IntentdError(f"{path}: damaged ({error!s:.80}): move it away") from None
    return {token.hashed: token for token in tokens}
