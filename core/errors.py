"""The errors of the suite; each message names the thing, the value and what was expected."""

from __future__ import annotations


class IntentdError(Exception):
    """Root of every error the suite raises on purpose."""


MAX_SHOWN = 400


def _shown(value: object) -> str:
    """As Python writes it, cut short: what comes from outside may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a nest of lists
        return f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


class InputError(IntentdError, ValueError):
    """Something that came from outside is wrong.

    field: path of the offending value, such as ``classes[2].weight``. A ValueError too, so that
    pydantic validators may raise it and the configuration loader puts the path in front.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        text = f"{field}: got {_shown(value)}, expected {expected}"
        super().__init__(text.encode(errors="backslashreplace").decode())  # what can be sent


class ConfigError(InputError):
    """A configuration file or environment override is wrong; the field carries the path."""


class PolicyError(InputError):
    """A policy does not validate; it is refused whole."""


class WireError(IntentdError):
    """Bytes that are not a message of ours. Dropped and counted, never fatal."""


class StateError(IntentdError):
    """A transition the state machine forbids (a programmer error); the text tells the story."""


class NotLeadingError(IntentdError):
    """Asked of a controller that stands by: another one of them leads."""
