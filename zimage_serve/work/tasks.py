"""Files in the making. One thread makes them, one after another, beside the thread that owns the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from zimage_ref.errors import ZImageError, reason
from zimage_serve.refusals import BUG, INTERRUPTED, BusyError, UnknownError
from zimage_serve.store.names import new_id

from .feed import Feed
from .jobs import State

log = logging.getLogger("zimage.serve")
_MOST_WAITING = 8
_REMEMBERED = 50  # tasks that have ended
_RETRY = 10  # seconds
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Making = Callable[[Progress], list[str]]  # makes a file; returns what its user should know


class _CancelledError(Exception):
    """Nobody wants the file, or the server stops."""


@dataclass(eq=False)
class Task:
    """One file in the making. It appears when it is complete."""

    id: str
    kind: str  # "lora" or "checkpoint"
    name: str  # of the file
    making: Making
    state: State = State.QUEUED
    progress: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    feed: Feed = field(default_factory=Feed)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def facts(self) -> dict[str, object]:
        """What clients see."""
        done, total = self.progress
        return {
            "id": self.id, "kind": self.kind, "name": self.name, "state": self.state.value, "done": done,
            "total": total, "notes": self.notes, "error": self.error,
        }  # fmt: skip

    def end(self, state: State, error: str | None = None) -> None:
        """Nothing follows."""
        self.state, self.error = state, error
        self.feed.tell(state.value, self.facts(), last=True)


class TaskDesk:
    """All tasks of a server. They are forgotten when it ends."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, kind: str, name: str, making: Making) -> Task:
        """Queues a task. Raises BusyError if too many wait."""
        with self._news:
            open_ones = [task for task in self._tasks.values() if task.state in (State.QUEUED, State.RUNNING)]
            if len(open_ones) >= _MOST_WAITING:
                raise BusyError(f"{len(open_ones)} files are in the making already: try again later", _RETRY)
            task = Task(new_id(), kind, name, making)
            ended = [id for id, each in self._tasks.items() if each not in open_ones]
            for id in ended[: max(0, len(ended) - _REMEMBERED)]:
                del self._tasks[id]
            self._tasks[task.id] = task
            task.feed.tell("queued", task.facts())
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="zimage-tasks", daemon=True)
                self._thread.start()
            self._news.notify()
        return task

    def makes(self, kind: str, name: str) -> bool:
        """Whether a file of this name waits or is in the making."""
        return any(
            (task.kind, task.name) == (kind, name) and task.state in (State.QUEUED, State.RUNNING)
            for task in self.all()
        )

    def find(self, id: str) -> Task:
        """The task `id`. Raises UnknownError."""
        with self._news:
            if id not in self._tasks:
                raise UnknownError("task: there is no task with this id")
            return self._tasks[id]

    def all(self) -> list[Task]:
        """All tasks, the newest first."""
        with self._news:
            return list(reversed(self._tasks.values()))

    def cancel(self, id: str) -> Task:
        """Gives up a task. Raises UnknownError."""
        task = self.find(id)
        task.cancelled.set()
        return task

    def close(self) -> None:
        """Gives up all tasks."""
        with self._news:
            self._closing = True
            self._news.notify()

    def join(self, timeout: float) -> None:
        """Waits until the thread has ended, so that no half-written file stays."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._news:
                waiting = [task for task in self._tasks.values() if task.state is State.QUEUED]
                if self._closing:
                    break
                if not waiting:
                    self._news.wait()
                    continue
            self._make(waiting[0])
        for task in waiting:
            task.end(State.FAILED, INTERRUPTED)

    def _make(self, task: Task) -> None:
        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            task.progress = (done, total)
            if task.cancelled.is_set() or self._closing:
                raise _CancelledError
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                task.feed.tell("progress", {"done": done, "total": total})

        task.state = State.RUNNING
        task.feed.tell("started", task.facts())
        try:
            progress(0, 0)
            task.notes = task.making(progress)
            task.end(State.DONE)
        except _CancelledError:
            task.end(*((State.FAILED, INTERRUPTED) if self._closing else (State.CANCELLED, None)))
        except ZImageError as error:
            task.end(State.FAILED, str(error))
        except OSError as error:
            task.end(State.FAILED, f"the file cannot be written: {reason(error)}")
        except Exception:
            log.exception("a task failed")
            task.end(State.FAILED, BUG)
