"""Writes the measurements of a run while it runs: metrics.jsonl, report.html, previews.png and other logs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import cast

from zimage_ref.formats.files import atomic_write, sync

from .events import Checkpointed, Event, Notice, Previewed, Saved
from .facts import RunFacts
from .logs import Logs
from .metrics_lines import line_of, read_lines
from .preview_sheet import write_sheet
from .report import page
from .run_folder import RunFolder

_REFRESH = 20.0  # seconds between two updates of the page


class Metrics:
    """The metrics.jsonl and the report.html of a run, and its logs for other programs."""

    def __init__(self, run: RunFolder, facts: RunFacts, step: int, logs: Logs) -> None:
        """Continues after `step`. Lines of later steps are deleted, because these steps are made again."""
        self._run, self._facts, self._logs = run, facts, logs
        with atomic_write(run.metrics) as file:
            for line in read_lines(run):
                if line["step"] <= step:
                    file.write(f"{json.dumps(line)}\n".encode())
        self._file = run.metrics.open("a", encoding="utf-8")
        self._refreshed = time.monotonic()

    def write(self, event: Event) -> list[str]:
        """Records the measurement of `event`, if it has one. Returns what there is to say about other logs."""
        line = line_of(event, self._run)
        if line is None:
            return []
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if time.monotonic() - self._refreshed > _REFRESH:
            self.refresh()
        return self._logs.write(line)

    def refresh(self) -> None:
        """Writes the page again."""
        text = page(self._run, read_lines(self._run), self._facts["config"], self._facts["environment"])
        with atomic_write(self._run.report) as file:
            file.write(text.encode())
        self._refreshed = time.monotonic()

    def draw_sheet(self) -> None:
        """Writes previews.png again."""
        write_sheet(self._run, read_lines(self._run))

    def close(self) -> None:
        """Writes everything to disk, and the page a last time if the disk has room."""
        with self._file:
            sync(self._file.fileno())
        with suppress(OSError):
            self.refresh()


def recorded(events: Iterable[Event], run: RunFolder, facts: RunFacts, done: int, logs: Logs) -> Iterator[Event]:
    """Yields the `events` of a run that has made `done` steps. Each is written to metrics, report and `logs` first."""
    last = len(cast(list[str], facts["config"]["preview_prompt"])) - 1
    with run.room_for(0):
        metrics = Metrics(run, facts, done, logs)
        try:
            for event in events:
                yield from map(Notice, metrics.write(event))
                if isinstance(event, Saved | Previewed | Checkpointed):
                    metrics.refresh()
                if isinstance(event, Previewed) and event.index == last:
                    metrics.draw_sheet()
                yield event
        finally:
            metrics.close()
