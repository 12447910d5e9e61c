"""The streams of the terminal. If output cannot be shown, the work goes on: a warning says so once."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO


class Shown:
    """A text stream for rich. After its first fault it shows nothing more."""

    def __init__(self, stream: TextIO | None, warn_on: TextIO | None = None) -> None:
        """stream: None if it is closed. warn_on: where a warning goes; None if there is no such place."""
        self._stream, self._warn_on = stream, warn_on
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a narrow encoding, such as ASCII

    def write(self, text: str) -> int:
        """Writes `text`, or warns and shows nothing from now on."""
        if self._stream is not None:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Shows what was written."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        stream, self._stream = self._stream, None
        with suppress(OSError, ValueError, AttributeError):  # what is left in its buffer must not fail at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
        if self._warn_on is not None and not isinstance(error, BrokenPipeError):  # `head` has seen enough
            with suppress(OSError, ValueError):
                print(f"warning: output cannot be shown: {error}: the work goes on without it", file=self._warn_on)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
