"""A server in this process, and clients for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from zimage_cli.commands.serve import engines_of
from zimage_cli.terminal.backends import DEFAULT
from zimage_ref.generation.provenance import ModelChoice
from zimage_serve.engines import Engines
from zimage_serve.server import Server
from zimage_serve.settings import ServeSettings
from zimage_serve.work.studio import Studio

SMALL: dict[str, Any] = {"prompt": "a red star", "width": 32, "height": 32, "steps": 2, "guidance": 0}


@dataclass
class Served:
    """A server that runs, and a client for it."""

    studio: Studio
    server: Server
    url: str
    client: httpx.Client
    keys: Mapping[str, str] = field(default_factory=dict)

    def make(self, **fields: Any) -> dict[str, Any]:
        """The facts of a job for SMALL changed by `fields`, after its end."""
        answer = self.client.post("/api/jobs", json={**SMALL, **fields})
        assert answer.status_code == 202, answer.text
        return self.wait(answer.json()["id"])

    def wait(self, id: str, seconds: float = 120) -> dict[str, Any]:
        """The facts of the job `id` after its end."""
        job = self.studio.job(id)
        assert job is None or job.ended.wait(seconds)
        facts: dict[str, Any] = self.client.get(f"/api/jobs/{id}").json()
        return facts


def engines(model: Path = Path("tiny"), backend: str = DEFAULT) -> Engines:
    """The engines that `zimage serve` gives to a server."""
    return engines_of(backend, ModelChoice(model))


@contextmanager
def serving(folder: Path, own: Engines | None = None, **settings: Any) -> Iterator[Served]:
    """A server on a free port of 127.0.0.1."""
    options = {"folder": folder, "port": 0, **settings}
    studio = Studio(ServeSettings(**options), own or engines())
    server = Server(studio)
    thread = threading.Thread(target=server.run, args=([server.socket],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.port}"
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            yield Served(studio, server, url, client)
    finally:
        studio.close()
        server.should_exit = True
        thread.join(60)
        studio.join()
        assert not thread.is_alive()
