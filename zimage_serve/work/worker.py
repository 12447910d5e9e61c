"""The one thread that owns the model. It makes pictures and trains, one thing at a time."""

from __future__ import annotations

import logging
import threading
import time

from zimage_serve.settings import ServeSettings

from .maker import Maker
from .queue import FairQueue
from .runs import RunDesk

log = logging.getLogger("zimage.serve")
_LOOK = 0.5  # seconds between two looks at the time, if there is no work
_LINGER = 3.0  # seconds after a picture in which a paused training waits for more pictures
GRACE = 20.0  # seconds that pictures in the making get when the server stops


class Worker(threading.Thread):
    """Takes jobs and runs until it is stopped."""

    def __init__(self, settings: ServeSettings, queue: FairQueue, maker: Maker, runs: RunDesk) -> None:
        super().__init__(name="zimage-worker", daemon=True)
        self._settings, self._queue, self._maker, self._runs = settings, queue, maker, runs
        self._stopping = threading.Event()
        self._used = time.monotonic()  # when the last picture was made

    def stop(self) -> None:
        """Asks the thread to end: pictures in the making get GRACE seconds, a training run saves its state."""
        self._maker.deadline = time.monotonic() + GRACE
        self._stopping.set()
        self._queue.wake()

    def run(self) -> None:
        """Works until `stop`."""
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:  # such as a full disk while the database is written
                log.exception("the worker goes on after an error")
                self._stopping.wait(1.0)
        self._maker.unload()
        self._runs.close()

    def _turn(self) -> None:
        waiting = self._runs.next()
        jobs = self._queue.take(self._maker.gathered, self._patience(waiting is not None))
        if jobs:
            seconds = self._maker.make(jobs)
            self._queue.measured(seconds)
            self._used = time.monotonic()
        elif waiting and not self._stopping.is_set():
            self._maker.unload()  # training needs the memory
            self._runs.work(waiting, self._pause)
        elif self._idle():
            self._maker.unload()

    def _patience(self, training_waits: bool) -> float:
        """Seconds to wait for a picture."""
        if not training_waits:
            return _LOOK
        return max(0.0, self._used + _LINGER - time.monotonic()) if self._maker.loaded else 0.0

    def _pause(self) -> bool:
        """Whether training must save and pause after this step."""
        return self._stopping.is_set() or (self._settings.while_training == "pause" and len(self._queue) > 0)

    def _idle(self) -> bool:
        limit = self._settings.idle_minutes * 60
        return bool(limit) and self._maker.loaded and time.monotonic() - self._used > limit
