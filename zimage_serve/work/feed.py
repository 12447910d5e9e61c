"""The events of one job or run: written by any thread, followed by any number of clients."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

_KEPT = 500  # the most events that a client that comes late can still get


@dataclass(frozen=True)
class Told:
    """One event."""

    number: int  # from 1
    kind: str
    facts: dict[str, object]
    data: bytes | None = None  # a preview; dropped when the feed ends


class Feed:
    """The events of one job or run, in order. It ends once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[Told] = deque(maxlen=_KEPT)
        self._number, self._ended = 0, False
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    @property
    def ended(self) -> bool:
        """Whether no event will follow."""
        return self._ended

    def tell(self, kind: str, facts: dict[str, object], data: bytes | None = None, last: bool = False) -> None:
        """Adds an event. last: no event follows it."""
        with self._lock:
            if self._ended:
                return
            self._number += 1
            self._events.append(Told(self._number, kind, facts, data))
            if last:
                self._ended = True
                self._events = deque((replace(event, data=None) for event in self._events), _KEPT)
            waiting = list(self._waiting)
        for loop, news in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.set)

    def latest(self, kind: str, **facts: object) -> Told | None:
        """The last event of `kind` that has these `facts`."""
        with self._lock:
            found = (event for event in reversed(self._events) if event.kind == kind)
            return next((event for event in found if facts.items() <= event.facts.items()), None)

    async def follow(self, after: int = 0) -> AsyncGenerator[Told, None]:
        """Yields the events after number `after`, those to come too, until the feed ends."""
        news = asyncio.Event()
        listener = (asyncio.get_running_loop(), news)
        with self._lock:
            self._waiting.add(listener)
        try:
            while True:
                with self._lock:
                    fresh, ended = [event for event in self._events if event.number > after], self._ended
                    news.clear()
                for event in fresh:
                    after = event.number
                    yield event
                if ended and not fresh:
                    return
                if not ended:
                    await news.wait()
        finally:
            with self._lock:
                self._waiting.discard(listener)
