"""The jobs that wait: bounded, fair between clients, equal ones taken together."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque

from zimage_serve.refusals import BusyError, ClosingError

from .jobs import Job

_FIRST_GUESS = 2.0  # seconds that a picture takes, before one was made
_SMOOTHING = 0.8  # share of the average that a new measurement keeps


class FairQueue:
    """Jobs by client. Clients take turns; the jobs of one client keep their order."""

    def __init__(self, size: int) -> None:
        """size: the most jobs that wait."""
        self._size = size
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()  # the first one's turn is next
        self._closed = False
        self._seconds = _FIRST_GUESS  # a picture takes

    def __len__(self) -> int:
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, job: Job) -> None:
        """Queues `job`. Raises BusyError if the queue is full, ClosingError if the server stops."""
        with self._lock:
            if self._closed:
                raise ClosingError("the server is about to stop: try again later")
            if (count := self._count()) >= self._size:
                waiting = sum(len(each.order.configs) for jobs in self._clients.values() for each in jobs)
                seconds = max(1, math.ceil(self._seconds * waiting / count))
                raise BusyError(f"{count} requests wait already: try again in {seconds} s", seconds)
            self._clients.setdefault(job.client, deque()).append(job)
            self._news.notify_all()

    def take(self, most: int, timeout: float) -> list[Job]:
        """The next job, and jobs of equal settings up to `most` pictures. [] if none comes for `timeout` seconds."""
        with self._lock:
            if not self._clients and not self._closed:
                self._news.wait(timeout)
            if not self._clients or self._closed:
                return []
            client, jobs = next(iter(self._clients.items()))
            first = jobs.popleft()
            if jobs:
                self._clients.move_to_end(client)
            else:
                del self._clients[client]
            return [first, *self._like(first, most - len(first.order.configs))]

    def _like(self, first: Job, room: int) -> list[Job]:
        """Takes jobs with the settings of `first` while their pictures fit into `room`, in the order of turns."""
        found: list[Job] = []
        for client in list(self._clients):
            for job in list(self._clients[client]):
                if len(job.order.configs) > room:
                    break
                if job.order.settings == first.order.settings:
                    self._clients[client].remove(job)
                    found.append(job)
                    room -= len(job.order.configs)
            if not self._clients[client]:
                del self._clients[client]
        return found

    def remove(self, job: Job) -> bool:
        """Takes `job` out, if it waits. Says whether it did."""
        with self._lock:
            jobs = self._clients.get(job.client, deque())
            if job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._clients[job.client]
            return True

    def position(self, job: Job) -> int | None:
        """The number of jobs whose turn comes before `job`. None if it does not wait."""
        with self._lock:
            places = [list(jobs).index(job) for jobs in self._clients.values() if job in jobs]
            if not places:
                return None
            row = places[0]
            before, passed = 0, False
            for client, jobs in self._clients.items():
                passed = passed or client == job.client
                before += min(len(jobs), row if passed else row + 1)
            return before

    def measured(self, seconds: float) -> None:
        """A picture took `seconds`: for `Retry-After`."""
        with self._lock:
            self._seconds = _SMOOTHING * self._seconds + (1 - _SMOOTHING) * seconds

    def wake(self) -> None:
        """Ends the wait of `take`."""
        with self._lock:
            self._news.notify_all()

    def close(self) -> list[Job]:
        """Takes no more jobs. Returns those that wait."""
        with self._lock:
            self._closed = True
            waiting = [job for jobs in self._clients.values() for job in jobs]
            self._clients.clear()
            self._news.notify_all()
            return waiting
