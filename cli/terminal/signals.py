"""Ctrl-C and SIGTERM: how they stop the program.

Both raise an exception, so that no incomplete file stays. Training can stop better after a step. So it uses `noted`:
the first signal is only noted, and the next one, of either kind, raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes

_Handler = Callable[[int, FrameType | None], object]


class Terminated(BaseException):
    """Raised on SIGTERM, as KeyboardInterrupt is raised on Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


_UNWINDING: dict[int, _Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}


@contextmanager
def unwinding() -> Iterator[None]:
    """A block in which SIGTERM raises Terminated. Ctrl-C raises KeyboardInterrupt without it."""
    with _handled({signal.SIGTERM: _terminate}):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """A block that notes the first Ctrl-C or SIGTERM in the list that it gives. The next one raises."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in _UNWINDING.items():
            signal.signal(each, handler)

    with _handled(dict.fromkeys(_UNWINDING, note)):
        yield received


@contextmanager
def _handled(handlers: Mapping[int, _Handler]) -> Iterator[None]:
    """A block in which `handlers` handle the signals."""
    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread only
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
