"""The errors of the suite; each message names the thing, the value and what was expected."""

from __future__ import annotations


class IntentdError(Exception):
    """Root of every error the suite raises on purpose."""


class InputError(IntentdError, ValueError):
    """Something that came from outside is wrong.

    field: path of the offending value, such as ``classes[2].weight``. A ValueError too, so that
    pydantic validators may raise it and the configuration loader puts the path in front.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        text = f"{field}: got {value!r}, expected {expected}"
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
