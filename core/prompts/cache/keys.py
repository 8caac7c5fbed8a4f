"""What a stored answer depends on: typed keys, and the scope that must be equal.

Two requests may share an answer only inside one scope. The scope is a hash over everything beside
the prompt that shapes an answer, length-prefixed so that no two inputs run together.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Final

from intentd.core.prompts.effects import Message

SCOPE_BYTES: Final = 16


def normal_text(text: str) -> str:
    """The exact key: Unicode composed, spaces single. Case stays: it can change what is asked."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def context_hash(messages: Iterable[Message]) -> str:
    """A hash of the conversation an answer was given in; "" for none."""
    digest = _new()
    count = 0
    for message in messages:
        count += 1
        _add(digest, message.prompt)
        _add(digest, message.response)
        if message.chat and not _is_plain(message):
            _add(digest, _canonical(list(message.chat)))
    return digest.hexdigest() if count else ""


def _is_plain(message: Message) -> bool:
    """Whether the chat says no more than the two texts: a client's own history then hashes like
    the same conversation kept here."""
    return len(message.chat) <= 2 and [
        (one.get("role"), one.get("content"), bool(one.get("tool_calls"))) for one in message.chat
    ] == [("user", message.prompt, False), ("assistant", message.response, False)]


def scope_hash(
    *,
    tenant: str,
    system: str = "",
    context: str = "",
    tools: object = None,
    response_format: object = None,
    params: Mapping[str, object] | None = None,
    model_floor: str = "",
) -> str:
    """The scope of an answer. tenant: key or group whose answers may be shared.

    context: a `context_hash`. params: sampling parameters that shape an answer (stop, seed,
    logit_bias, ...). model_floor: the least model whose answers will do.
    """
    digest = _new()
    for part in (
        tenant,
        system,
        context,
        _canonical(tools),
        _canonical(response_format),
        _canonical(dict(params) if params else None),
        model_floor,
    ):
        _add(digest, part)
    return digest.hexdigest()


def exact_key(scope: str, text: str) -> str:
    """The key of an exact match inside a scope."""
    digest = _new()
    _add(digest, scope)
    _add(digest, normal_text(text))
    return digest.hexdigest()


def _new() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=SCOPE_BYTES)


def _add(digest: hashlib.blake2b, text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    digest.update(len(raw).to_bytes(8, "big"))
    digest.update(raw)


def _canonical(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
