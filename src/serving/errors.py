"""What a client is told when its request can't be answered: OpenAI's error objects, with their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID, AUTHENTICATION, RATE, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


class Refused(Exception):
    """A request that is not answered.

    `param` is the field that it is about, `headers` are sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: AUTHENTICATION, 429: RATE}
        kind = kinds.get(self.status, SERVER if self.status >= 500 else INVALID)
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def wrong(param: str, message: str, code: str | None = "invalid_value") -> Refused:
    """The refusal of a field's value."""
    return Refused(400, f"{param}: {message}", param, code)


def failed(message: str) -> Refused:
    """The refusal of what is no fault of the client."""
    return Refused(500, message, code="internal_error")
