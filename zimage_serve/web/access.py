"""Who may ask: the names in Host and Origin, and the API key. Pure functions of headers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import urlsplit

from zimage_serve.settings import ServeSettings, is_loopback

from .page import PATHS

COOKIE = "zimage_session"
# Anybody may ask for these: they hold no data. The page needs them to ask for the key
OPEN_PATHS = ("/health", "/login", *PATHS)
_SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Denial:
    """The answer to a request that is not served."""

    status: int
    message: str


class Gate:
    """Decides from the headers of a request whether it is served."""

    def __init__(self, settings: ServeSettings) -> None:
        self._local, self._names = settings.is_local, {name.lower() for name in settings.allow_host}
        self._key = settings.api_key

    def denial(self, method: str, path: str, headers: Mapping[str, str]) -> Denial | None:
        """Why a request is not served. None if it is. headers: by names in lower case."""
        host = headers.get("host", "")
        if not self.knows(host):
            return Denial(403, "this server does not know the name in Host: see `allow_host`")
        if not same_origin(headers.get("origin"), host):
            return Denial(403, "requests from other sites are refused")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and (
            method not in _SAFE or headers.get("sec-fetch-mode") != "navigate"
        ):
            return Denial(403, "requests from other sites are refused")
        if self._key and path not in OPEN_PATHS and not self.has_key(headers):
            return Denial(401, "an API key is needed: send it as Authorization: Bearer KEY")
        return None

    def knows(self, host: str) -> bool:
        """Whether the server may be called `host`, with or without a port.

        A page of another site can make its own name point to this machine (DNS rebinding), but not an address. So a
        local server knows local names only, and an open one any address and the names in `allow_host`.
        """
        name = _name(host)
        if not name or is_loopback(name) or name in self._names:
            return bool(name)
        return not self._local and _is_address(name)

    def has_key(self, headers: Mapping[str, str]) -> bool:
        """Whether the request holds the key: as a bearer, as the password of Basic, in X-API-Key, or by the cookie."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_key(value.strip()):
            return True
        if scheme.lower() == "basic" and self.is_key(_password(value)):
            return True
        return self.is_key(headers.get("x-api-key", "")) or _equal(_cookie(headers.get("cookie", "")), self.session())

    def is_key(self, text: str) -> bool:
        """Whether `text` is the key."""
        return bool(self._key) and _equal(text, self._key)

    def session(self) -> str:
        """The value of the cookie of a browser that sent the key. It does not tell the key."""
        return hmac.new(self._key.encode(), b"zimage session", hashlib.sha256).hexdigest()


def same_origin(origin: str | None, host: str) -> bool:
    """Whether `origin` is the page of this server itself, or absent as in programs that are not browsers."""
    if origin is None:
        return True
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and bool(host) and parts.netloc.lower() == host.lower()


def _name(host: str) -> str:
    """The name or address in a Host header; "" if it is not valid."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises if it is not a number
    except ValueError:
        return ""
    return parts.hostname or "" if parts.netloc == host and "@" not in host else ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _equal(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), right.encode())
