"""The errors clients see: shaped as OpenAI's, naming the field, with nothing of our insides."""

from __future__ import annotations

from typing import Any, Final

from intentd.core.errors import InputError, IntentdError
from intentd.core.prompts.request import PipelineError

MAX_SHOWN: Final = 80

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(IntentdError):
    """An answer that is an error.

    retry_after_s: sent as Retry-After, in whole seconds. outcome: what it is counted as; one of a
    few, where the code may be a provider's own. allow: the methods a path takes.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after_s: float | None = None,
        outcome: str = "",
        allow: str = "",
    ) -> None:
        self.status = status
        self.param = param
        self.code = code
        self.kind = kind or _TYPES.get(status, "server_error")
        self.retry_after_s = retry_after_s
        self.allow = allow
        self.outcome = outcome or code or self.kind
        super().__init__(text)

    def document(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_field(field: str, value: object, expected: str, *, code: str | None = None) -> ApiError:
    """400 that names the field, what it held and what it should."""
    return ApiError(
        400, f"{field}: got {shown(value)}, expected {expected}", param=field, code=code
    )


def no_answer(error: PipelineError, retry_after_s: float | None = None) -> ApiError:
    """A service type for which no model answered."""
    status = error.status if error.status in (400, 413, 429, 503, 504) else 502
    return ApiError(status, str(error), code="no_answer", retry_after_s=retry_after_s)


def from_input_error(error: InputError) -> ApiError:
    return bad_field(error.field, error.value, error.expected)


def shown(value: object) -> str:
    """A value as it may stand in an error: short, on one line, text that encodes."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
