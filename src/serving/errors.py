"""Errors for clients, as the APIs' error objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


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
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        others = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, others)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error object."""
        others = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = ANTHROPIC_KINDS.get(self.status, others)
        return {"type": "error", "error": {"type": kind, "message": self.message}}


@contextlib.contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Give fields at fault the names that they have in the client's API: our name -> its name."""
    try:
        yield
    except Refused as refused:
        ours = refused.param
        if ours not in names:
            raise
        message = refused.message.replace(ours, names[ours], 1)
        raise Refused(refused.status, message, names[ours], refused.code) from None


def wrong(param: str, message: str) -> Refused:
    """Make the refusal of a field's value."""
    return Refused(400, f"{param}: {message}", param, "invalid_value")


def failed(message: str) -> Refused:
    """Make the refusal for a failure that is not the client's."""
    return Refused(500, message, code="internal_error")
