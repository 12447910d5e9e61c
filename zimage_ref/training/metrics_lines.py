"""metrics.jsonl: each line is a JSON object for a step, a measurement of the held-out loss, or a preview."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeAlias, TypedDict, TypeGuard, final, get_type_hints

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
_FIELDS = [get_type_hints(kind) for kind in (StepLine, HeldOutLine, PreviewLine)]
_LARGEST = 1e40  # no float32 is larger


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


def read_lines(run: RunFolder) -> Iterator[MetricsLine]:
    """All whole lines, one at a time. One that a crash cut off, or that is damaged, is left out."""
    if not run.metrics.is_file():
        return
    with run.metrics.open("rb") as file:
        for text in file:
            with suppress(ValueError, RecursionError):
                line: object = json.loads(text)
                if _is_line(line):
                    yield line


def _is_line(data: object) -> TypeGuard[MetricsLine]:
    """Whether `data` has all fields of a line, each of its type."""
    return isinstance(data, dict) and any(
        all(name in data and _fits(data[name], hint) for name, hint in fields.items()) for fields in _FIELDS
    )


def _fits(value: object, hint: object) -> bool:
    """Whether `value`, from JSON, is of the type `hint` of a field, and within bounds if it is a number."""
    if hint == dict[str, Finite]:
        return isinstance(value, dict) and all(_fits(item, Finite) for item in value.values())
    if hint in (float, Finite):
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        return number or (value is None and hint == Finite)
    if hint is int:
        return type(value) is int and 0 <= value <= _LARGEST
    return isinstance(value, str if hint is str else bool)


def figures(line: MetricsLine) -> dict[str, float]:
    """The finite numbers of a line by name, without the step itself. The held-out loss has a name for each sigma."""
    if "validation" in line:
        each = {f"held_out/{sigma}": loss for sigma, loss in line["validation"].items() if loss is not None}
        return {**each, "held_out/mean": sum(each.values()) / len(each)} if each else {}
    if "preview" in line:
        return {}
    found = {name: value for name, value in line.items() if name not in ("step", "total")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def step_lines(lines: Iterable[MetricsLine]) -> list[StepLine]:
    """The lines of steps."""
    return [line for line in lines if "loss" in line]


def preview_lines(lines: Iterable[MetricsLine]) -> list[PreviewLine]:
    """The lines of previews."""
    return [line for line in lines if "preview" in line]


def _finite(value: float) -> Finite:
    return value if math.isfinite(value) else None
