"""What every request passes: access, the size and pace of its body; and headers that every answer gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zimage_serve.settings import ServeSettings

from .access import Gate
from .errors import refusal

_PAUSE = 30.0  # seconds that a client may take between two pieces of its body
_MOST_SECONDS_PER_MB = 10.0  # a body that comes more slowly than that is given up
_LEAST_SECONDS = 60.0  # for any body
LORA_UPLOADS = "/api/loras"  # larger bodies are allowed there
_MB = 10**6
_SOURCES = {  # nothing from elsewhere, and no script in a page itself
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' blob: data:",
    "connect-src": "'self'", "font-src": "'self'", "manifest-src": "'self'", "form-action": "'self'",
    "base-uri": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {sources}" for name, sources in _SOURCES.items()),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass
class _Body:
    """The body of one request while it comes."""

    receive: Receive
    limit: int  # bytes
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    size: int = 0
    complete: bool = False

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()  # only the end of the connection can follow
        try:
            message = await asyncio.wait_for(self.receive(), _PAUSE)
        except asyncio.TimeoutError:
            raise HTTPException(408, "the body of the request came too slowly") from None
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.limit:
            raise HTTPException(413, f"the body is larger than the {self.limit // _MB} MB allowed here")
        seconds = asyncio.get_running_loop().time() - self.began
        if not self.complete and seconds > _LEAST_SECONDS + self.size / _MB * _MOST_SECONDS_PER_MB:
            raise HTTPException(408, "the body of the request came too slowly")
        return message


class Safety:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, closing: Callable[[], bool]) -> None:
        self._app, self._settings, self._closing = app, settings, closing
        self._gate = Gate(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request if it may be served."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        answer = self._refused(scope)
        if answer:
            await refusal(*answer)(scope, receive, sending)
        else:
            await self._app(scope, _Body(receive, self._limit(scope["path"])), sending)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) > 1:
            return 400, "the request has two Host headers"
        denial = self._gate.denial(scope["method"], scope["path"], headers)
        if denial:
            return denial.status, denial.message
        if self._closing():
            return 503, "the server is about to stop: try again later"
        length = headers.get("content-length", "0")
        limit = self._limit(scope["path"])
        if not length.isdecimal() or int(length) > limit:
            return 413, f"the body is larger than the {limit // _MB} MB allowed here"
        return None

    def _limit(self, path: str) -> int:
        largest = self._settings.max_lora_mb if path == LORA_UPLOADS else self._settings.max_upload_mb
        return largest * _MB
