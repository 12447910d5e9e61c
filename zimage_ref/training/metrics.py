"""What a run measured, one JSON line at a time, and the page that shows it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zimage_ref.formats.files import atomic_write

from .events import Event, Previewed, Step, Validated
from .report import page
from .run_folder import RunFolder

_REFRESH = 20.0  # seconds between versions of the page


class Metrics:
    """The metrics.jsonl and the report.html of a run."""

    def __init__(self, run: RunFolder, facts: Mapping[str, Any], environment: Mapping[str, str], step: int) -> None:
        """Goes on after `step`: what an interrupted run wrote beyond it is dropped, as those steps come again."""
        self._run, self._config, self._environment = run, facts["config"], environment
        lines = [line for line in read_lines(run) if line["step"] <= step]
        with atomic_write(run.metrics) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file = run.metrics.open("a", encoding="utf-8")
        self._refreshed = time.monotonic()

    def write(self, event: Event) -> None:
        """Records what an event measured, if anything."""
        line = _line(event, self._run)
        if line:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if line and time.monotonic() - self._refreshed > _REFRESH:
            self.refresh()

    def refresh(self) -> None:
        """Writes the page anew."""
        text = page(self._run, read_lines(self._run), self._config, self._environment)
        with atomic_write(self._run.report) as file:
            file.write(text.encode())
        self._refreshed = time.monotonic()

    def close(self) -> None:
        """Writes everything to disk, and the page a last time if there is room for it."""
        with self._file:
            os.fsync(self._file.fileno())
        with suppress(OSError):
            self.refresh()


def read_lines(run: RunFolder) -> list[dict[str, Any]]:
    """All whole lines; a last one that a crash cut off is left out."""
    if not run.metrics.is_file():
        return []
    lines = []
    for text in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _line(event: Event, run: RunFolder) -> dict[str, Any] | None:
    if isinstance(event, Step):
        names = (
            "step", "total", "epoch", "loss", "smoothed", "lr", "grad_norm", "seconds", "pictures", "peak_memory",
            "skipped",
        )  # fmt: skip
        return {name: _finite(getattr(event, name)) for name in names}
    if isinstance(event, Validated):
        return {"step": event.step, "validation": {str(s): _finite(loss) for s, loss in event.losses.items()}}
    if isinstance(event, Previewed):
        path = event.path.relative_to(run.path).as_posix()
        return {"step": event.step, "preview": path, "index": event.index, "prompt": event.prompt}
    return None


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
