"""Guard of the server: the key, the Host of the request, and the page that a browser asks from.

A page of another site can make its visitor's browser send requests to 127.0.0.1, and by DNS rebinding even
read the replies. So a server that is bound to its own machine answers only to that machine's names, and
refuses a request with another site's Origin.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from .errors import Refused
from .replies import error_reply

OWN_NAMES = ("localhost", "127.0.0.1", "::1")
# open to all: browsers fetch these before anybody could type a key into the page, and monitors do too
OPEN_PATHS = ("/", "/health", "/favicon.ico")
OPEN_FOLDER = "/page/"
# a request that changes something below these paths needs an admin's key, if the server has admins' keys
ADMIN_PATHS = ("/studio", "/v1/adapters", "/v1/states", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@dataclasses.dataclass(frozen=True)
class Guard:
    """Guard with `hosts`, names of the server (None: any), and `origins`, other sites that may ask.

    A client sends one of `keys`, if there are any. One of `admin_keys` is needed to change something on the
    server, such as its adapters, and serves for the rest, too; without any, all who may ask may do so.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    admin_keys: tuple[str, ...] = ()

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise Refused for a request that may not be answered."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise Refused(
                403,
                f"this server does not answer to the host {host[:80]!r}; ask for one of"
                f" {', '.join(sorted(self.hosts))}, or start it with --allow_host",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.origins and host_of_origin(origin) != host.lower():
            raise Refused(
                403,
                f"requests from pages of {origin[:80]!r} are not answered; --cors_origin allows them",
                code="origin_not_allowed",
            )
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        reads = method in ("GET", "HEAD")
        is_admins = bool(self.admin_keys) and path.startswith(ADMIN_PATHS) and not reads
        # a browser asks without the key whether it may ask
        if not self.keys and not is_admins or method == "OPTIONS" or is_open and reads:
            return
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        # Anthropic's clients have a header of their own
        other = headers.get(b"x-api-key", b"").decode("latin-1")
        key = key.strip() if scheme.lower() == "bearer" else other
        if is_one_of(key, self.admin_keys):
            return
        is_client = is_one_of(key, self.keys)
        if is_client and is_admins:
            raise Refused(
                403,
                "only an admin's key may change something on this server; send one of its --admin_key_file in"
                " the header Authorization: Bearer KEY",
                code="admin_key_required",
            )
        if not is_client:
            raise Refused(
                401,
                "the API key is wrong, or there is none; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def is_one_of(key: str, keys: Iterable[str]) -> bool:
    """Compare a text with keys, in a time that does not depend on where they differ."""
    digest, *digests = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (key, *keys))
    return any([hmac.compare_digest(digest, other) for other in digests])


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def host_of_origin(origin: str) -> str:
    """Return the Host header of a page of this origin; "" for none, such as a file's."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_own_machine(host: str) -> bool:
    """Tell whether only its own machine can reach a server that is bound to this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class GuardMiddleware:
    """Middleware that answers instead of the application if the guard refuses; `refused` gets the status."""

    def __init__(self, app, guard: Guard, refused: Callable[[int], None]):
        self.app, self.guard, self.refused = app, guard, refused

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            # before anybody looks: some clients end an address with a slash, and do not follow a redirection
            scope["path"] = scope["path"].rstrip("/") or "/"
            try:
                self.guard.check(scope["method"], scope["path"], dict(scope["headers"]))
            except Refused as refused:
                self.refused(refused.status)
                await error_reply(refused, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)
