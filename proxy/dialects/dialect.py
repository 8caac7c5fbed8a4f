"""What a dialect has to give: every API is a way in to chats and a way out of their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from intentd.proxy.adapter.native import Event, Usage
from intentd.proxy.call import Call, Exchange
from intentd.proxy.errors import ApiError


class Renderer(Protocol):
    """Makes one stream of a dialect out of a chat's chunks."""

    def begin(self) -> bytes:
        """What comes before the first chunk."""

    def chunk(self, event: Event) -> bytes:
        """A chunk with choices."""

    def end(self, usage: Usage, last: Event | None) -> bytes:
        """The end of a whole answer, metadata included. last: the provider's usage chunk."""

    def broken(self, error: ApiError) -> bytes:
        """The end of an answer that is not whole."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API. document: a chat completion as its answer; error: its shape of an error."""

    renderer: Callable[[Call, Exchange], Renderer]
    document: Callable[[dict[str, Any], Usage, Call, Exchange], dict[str, Any]]
    error: Callable[[ApiError], dict[str, Any]]
