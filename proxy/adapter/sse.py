"""Server-sent events as bytes: split into whole events, read their data."""

from __future__ import annotations

from typing import Final

from intentd.core.errors import WireError

DONE: Final = b"[DONE]"


class EventSplitter:
    """Whole events out of a byte stream cut anywhere.

    An event comes without its blank line; CR LF counts as LF. What is not yet whole stays inside,
    at most max_bytes of it, so that half an event is never passed on.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Events that are whole now. Raises WireError for one over the bound."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\r" in data:
            held = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(held)].replace(b"\r\n", b"\n") + held
        events = data.split(b"\n\n")
        self._rest = events.pop()
        if len(self._rest) > self.max_bytes:
            raise WireError(f"event: over {self.max_bytes} bytes")
        return [event for event in events if event]

    def finish(self) -> list[bytes]:
        """At the end: some servers leave out the last blank line after [DONE]."""
        rest, self._rest = self._rest.strip(), b""
        return [rest] if rest == b"data: " + DONE or rest == b"data:" + DONE else []

    @property
    def begun(self) -> bool:
        """Whether bytes of a next event have come."""
        return bool(self._rest)

    @property
    def pending(self) -> bool:
        """Whether part of an event is held back."""
        return bool(self._rest.strip())


def event_data(event: bytes) -> bytes | None:
    """The data of an event, its lines joined; None for comments and events without data."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None


def encode_event(data: bytes, name: bytes = b"") -> bytes:
    """data must be one line, as JSON is."""
    return (b"event: " + name + b"\n" if name else b"") + b"data: " + data + b"\n\n"
