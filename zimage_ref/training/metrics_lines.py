"""metrics.jsonl: each line is a JSON object for a step, a measurement of the held-out loss, or a preview."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TypeAlias, TypedDict, final

from .events import Event, Previewed, Step, Validated
from .run_folder import RunFolder

Finite: TypeAlias = float | None  # None if the number was not finite, since JSON has no NaN


@final
class StepLine(TypedDict):
    """The fields of the event `Step`."""

    step: int
    total: int
    epoch: int
    loss: Finite
    smoothed: Finite
    lr: Finite
    grad_norm: Finite
    seconds: float
    pictures: int
    peak_memory: int
    skipped: bool


@final
class HeldOutLine(TypedDict):
    """The fields of `Validated`."""

    step: int
    validation: dict[str, Finite]  # sigma -> loss


@final
class PreviewLine(TypedDict):
    """The fields of `Previewed`; its path is relative to the run's folder."""

    step: int
    preview: str
    index: int
    prompt: str


MetricsLine: TypeAlias = StepLine | HeldOutLine | PreviewLine


def line_of(event: Event, run: RunFolder) -> MetricsLine | None:
    """The line for `event`. None if it measured nothing."""
    match event:
        case Step():
            return {
                "step": event.step, "total": event.total, "epoch": event.epoch, "loss": _finite(event.loss),
                "smoothed": _finite(event.smoothed), "lr": _finite(event.lr), "grad_norm": _finite(event.grad_norm),
                "seconds": event.seconds, "pictures": event.pictures, "peak_memory": event.peak_memory,
                "skipped": event.skipped,
            }  # fmt: skip
        case Validated():
            return {"step": event.step, "validation": {str(s): _finite(loss) for s, loss in event.losses.items()}}
        case Previewed():
            path = event.path.relative_to(run.path).as_posix()
            return {"step": event.step, "preview": path, "index": event.index, "prompt": event.prompt}
        case _:
            return None


def read_lines(run: RunFolder) -> list[MetricsLine]:
    """All complete lines. If a crash cut off the last line, it is left out."""
    if not run.metrics.is_file():
        return []
    lines: list[MetricsLine] = []
    for text in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def step_lines(lines: Iterable[MetricsLine]) -> list[StepLine]:
    """The lines of steps."""
    return [line for line in lines if "loss" in line]


def held_out_lines(lines: Iterable[MetricsLine]) -> list[HeldOutLine]:
    """The lines of measurements of the held-out loss."""
    return [line for line in lines if "validation" in line]


def preview_lines(lines: Iterable[MetricsLine]) -> list[PreviewLine]:
    """The lines of previews."""
    return [line for line in lines if "preview" in line]


def _finite(value: float) -> Finite:
    return value if math.isfinite(value) else None
