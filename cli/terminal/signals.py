"""Ctrl-C and SIGTERM: what either does, wherever the program is.

Both unwind it, so that no half-written file stays. Work that can stop at a better moment, as training after a step,
asks for the first one to be noted; the next one, of either kind, unwinds.
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
    """SIGTERM came: what KeyboardInterrupt is to Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


_UNWINDING: dict[int, _Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}


@contextmanager
def unwinding() -> Iterator[None]:
    """A block in which SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt by itself."""
    with _handled({signal.SIGTERM: _terminate}):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM enters; the next one unwinds."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in _UNWINDING.items():
            signal.signal(each, handler)

    with _handled(dict.fromkeys(_UNWINDING, note)):
        yield received


@contextmanager
def _handled(handlers: Mapping[int, _Handler]) -> Iterator[None]:
    """A block with other handlers of signals."""
    if threading.current_thread() is not threading.main_thread():  # only there may they be set
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
