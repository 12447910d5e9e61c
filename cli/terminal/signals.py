"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): how they stop the program.

All raise an exception, so that no incomplete file stays. Training can stop better after a step. So it uses `noted`:
the first signal is only noted, and the next one, of any kind, raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # an exit code
HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPED: dict[int, str] = {signal.SIGTERM: "terminated"} | ({HANGUP: "the terminal was closed"} if HANGUP else {})

_Handler = Callable[[int, FrameType | None], object]


class Terminated(BaseException):
    """Raised on a signal in STOPPED, as KeyboardInterrupt is raised on Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


_UNWINDING: dict[int, _Handler] = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(STOPPED, _terminate)}


@contextmanager
def unwinding() -> Iterator[None]:
    """A block in which SIGTERM and SIGHUP raise Terminated. Ctrl-C raises KeyboardInterrupt without it."""
    with _handled(dict.fromkeys(STOPPED, _terminate)):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """A block that notes the first signal in the list that it gives. The next one raises."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in _UNWINDING.items():
            if not _ignored(each):
                signal.signal(each, handler)

    with _handled(dict.fromkeys(_UNWINDING, note)):
        yield received


@contextmanager
def _handled(handlers: Mapping[int, _Handler]) -> Iterator[None]:
    """A block in which `handlers` handle the signals."""
    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread only
        yield
        return
    handled = {number: handler for number, handler in handlers.items() if not _ignored(number)}
    before = {number: signal.signal(number, handler) for number, handler in handled.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored(number: int) -> bool:
    """Whether the program was started by `nohup`, so that SIGHUP has no effect."""
    return number == HANGUP and signal.getsignal(number) is signal.SIG_IGN
