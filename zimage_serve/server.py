"""Runs a server until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import FrameType

import uvicorn

from zimage_ref.errors import ConfigError
from zimage_serve.engines import Engines
from zimage_serve.settings import ServeSettings
from zimage_serve.web.app import Addition, application
from zimage_serve.work.studio import Studio
from zimage_serve.work.worker import GRACE

_AGENT = "zimage_serve.web.agent"  # it needs the extra mcp
_CONNECTIONS = 1000  # at most; more are told that the server is busy


class Server(uvicorn.Server):
    """A server of one studio. At the first signal it ends the work, so that streams end and connections close."""

    def __init__(self, studio: Studio, ready: Callable[[str], None] = lambda address: None) -> None:
        """ready: is called with the address when the server listens. Raises ConfigError if the port is not free."""
        settings = studio.settings
        self.studio, self._ready = studio, ready
        super().__init__(
            uvicorn.Config(
                application(studio, _agent(studio)), access_log=False, log_config=None, server_header=False, ws="none",
                lifespan="on", limit_concurrency=_CONNECTIONS, timeout_keep_alive=30,
                timeout_graceful_shutdown=int(2 * GRACE),
            )
        )  # fmt: skip
        self.socket = _bound(settings.host, settings.port)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, begins to work, and says so."""
        await super().startup(sockets)
        if self.started:
            self.studio.start()
            host = self.studio.settings.host
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{self.port}")

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.socket.getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal ends the server; a second one ends it at once."""
        self.studio.close()
        super().handle_exit(sig, frame)


def serve_agent(settings: ServeSettings, engines: Engines) -> None:
    """Serves one agent through stdin and stdout until it leaves. Raises the errors of `serve`."""
    studio = Studio(settings, engines)
    studio.start()
    try:
        import_module(_AGENT).serve_stdio(studio)
    finally:
        studio.close()
        studio.join()


def _agent(studio: Studio) -> Addition | None:
    """The interface of agents, if its package is installed."""
    if find_spec("mcp") is None:
        return None
    found: Addition = import_module(_AGENT).addition(studio)
    return found


def serve(settings: ServeSettings, engines: Engines, ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError and other ZImageErrors before it listens."""
    studio = Studio(settings, engines)
    try:
        server = Server(studio, ready)
        server.run([server.socket])
    finally:
        studio.close()
        studio.join()


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only if the protocol is named; else each would take 40 ms
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ConfigError(f"{host}:{port}: cannot be listened on: {error.strerror}: give another `port`") from error
    return made
