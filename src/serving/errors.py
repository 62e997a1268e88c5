"""Errors for clients, as OpenAI's error objects with their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """Refusal of a request.

    `param` is the field at fault, `headers` are sent along.
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
        """Return OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        others = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, others)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> Refused:
    """Make the refusal of a field's value."""
    return Refused(400, f"{param}: {message}", param, "invalid_value")


def failed(message: str) -> Refused:
    """Make the refusal for a failure that is not the client's."""
    return Refused(500, message, code="internal_error")
