"""A job: an order, its state, its events and its results."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import Enum

from zimage_serve.store.database import Row

from .feed import Feed
from .orders import PictureOrder


class State(str, Enum):
    """The states of a job. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Job:
    """One request for pictures. Only the worker changes its state after it was queued."""

    id: str
    client: str
    order: PictureOrder
    asked: dict[str, object]  # what the client sent, for the gallery
    created: float = field(default_factory=time.time)
    state: State = State.QUEUED
    error: str | None = None
    pictures: list[Row] = field(default_factory=list)  # rows of the database, by place
    feed: Feed = field(default_factory=Feed)
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def facts(self) -> dict[str, object]:
        """What clients see."""
        progress = self.feed.latest("progress")
        return {
            "id": self.id,
            "state": self.state.value,
            "created": self.created,
            "asked": self.asked,
            "seeds": [config.seed for config in self.order.configs],
            "progress": progress.facts if progress and self.state is State.RUNNING else None,
            "pictures": [row["id"] for row in self.pictures] if self.state is State.DONE else [],
            "error": self.error,
        }

    def start(self) -> None:
        """The worker begins."""
        self.state = State.RUNNING
        self.feed.tell("started", {"id": self.id})

    def end(self, state: State, error: str | None = None) -> None:
        """The job ends. Its results are on disk, and in the database, before this is called."""
        self.state, self.error = state, error
        self.ended.set()
        self.feed.tell(state.value, self.facts(), last=True)
