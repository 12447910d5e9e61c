"""Whose turn it is: the queue of pictures alone, and when the worker pauses training or gives the model back."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from zimage_serve.refusals import BusyError
from zimage_serve.work.queue import FairQueue
from zimage_serve.work.worker import Worker


def job(client: str, settings: str = "same", pictures: int = 1) -> Any:
    return SimpleNamespace(client=client, order=SimpleNamespace(settings=settings, configs=[None] * pictures))


def queue_of(*jobs: Any) -> FairQueue:
    queue = FairQueue(len(jobs))
    for each in jobs:
        queue.put(each)
    return queue


def test_clients_take_turns_and_keep_their_own_order() -> None:
    many, other = [job("a", str(i)) for i in range(3)], job("b", "x")
    queue = queue_of(*many, other)
    assert [queue.position(each) for each in (*many, other)] == [0, 2, 3, 1]
    assert [queue.take(1, 0.0) for _ in range(4)] == [[many[0]], [other], [many[1]], [many[2]]]


def test_only_jobs_of_equal_settings_are_taken_together() -> None:
    first, other, like, large = job("a"), job("b", "other"), job("c"), job("d", pictures=3)
    queue = queue_of(first, other, like, large)
    assert queue.take(4, 0.0) == [first, like] and queue.take(4, 0.0) == [other] and queue.take(4, 0.0) == [large]


def test_a_full_queue_says_when_to_come_back() -> None:
    queue = queue_of(job("a"), job("b"))
    with pytest.raises(BusyError, match="2 requests wait already: try again in 2 s"):
        queue.put(job("c"))


def worker(queue: Any, loaded: bool = True, **settings: object) -> Worker:
    made = Worker(SimpleNamespace(**settings), queue, SimpleNamespace(loaded=loaded), SimpleNamespace())  # type: ignore[arg-type]
    made._used = time.monotonic() - 90
    return made


@pytest.mark.parametrize(("rule", "waiting", "pauses"), [("pause", 1, True), ("pause", 0, False), ("wait", 1, False)])
def test_training_pauses_for_pictures_by_the_rule(rule: str, waiting: int, pauses: bool) -> None:
    made = worker([None] * waiting, while_training=rule)
    assert made._pause() == pauses
    made._stopping = threading.Event()
    made._stopping.set()
    assert made._pause()


@pytest.mark.parametrize(
    ("minutes", "loaded", "idle"), [(1, True, True), (2, True, False), (0, True, False), (1, False, False)]
)
def test_the_model_leaves_memory_after_so_many_minutes(minutes: float, loaded: bool, idle: bool) -> None:
    assert worker([], loaded, idle_minutes=minutes)._idle() == idle
