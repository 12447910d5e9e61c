"""What a run would do, as clients see it: crops, memory, time, and what the user should know of the pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median

from zimage_ref.doctor.remembered import Figures, precision_name
from zimage_ref.errors import DatasetError, listing
from zimage_ref.memory import Mode, peak
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.dataset import Example
from zimage_ref.training.metrics_lines import StepLine
from zimage_ref.training.plan import TrainPlan, make_plan
from zimage_serve.engines import Trainer

_LEAST: Mapping[str, Mode] = {"fast": "fast", "stream": "stream"}  # `memory` -> the mode of the estimate, else lean
_SHOWN = 5  # names in a warning
_SMALL = 0.9  # a picture whose area is below this share of the wanted one is called small


def plan_facts(config: TrainConfig, trainer: Trainer, rate: float | None) -> dict[str, object]:
    """The plan of a run. Reads no weights.

    rate: seconds of a pixel, measured in an earlier run, if there is one.
    Raises the errors of `make_plan`, and BackendError if nothing can train here.
    """
    dtype, quantization = trainer.precision(config)
    plan = checked_plan(config)
    mode = _LEAST.get(config.memory, "lean")
    stages = plan.memory(dtype, quantization, mode, trainer.footprint("lean" if mode == "fast" else mode))
    step = _step_seconds(plan, precision_name(dtype, quantization), mode, rate)
    return {
        "pictures": len(plan.examples),
        "held_out": len(plan.held_out),
        "sizes": [
            {"width": size[0], "height": size[1], "pictures": n, "tokens": plan.tokens(size)}
            for size, n in sorted(plan.batches.sizes().items())
        ],
        "crops": _crops(plan),
        "steps": plan.total,
        "steps_per_epoch": plan.batches.steps_per_epoch,
        "lr": plan.lr,
        "parameters": plan.trainable,
        "layers": len(plan.layers),
        "precision": f"{quantization.bits} bits" if quantization else dtype,
        "memory_bytes": peak(stages).total,
        "seconds": step * plan.total if step else None,
        "warnings": list(_warnings(plan)),
    }


def checked_plan(config: TrainConfig) -> TrainPlan:
    """The plan of a run. Raises the errors of `make_plan`; those of pictures name no path of this machine."""
    try:
        return make_plan(config)
    except DatasetError as error:
        raise DatasetError(_without(config, str(error))) from None


def _without(config: TrainConfig, text: str) -> str:
    """`text` without the folders of datasets, which clients know by their names."""
    for each in config.sets:
        for end in ("/", ": "):
            text = text.replace(f"{each.folder}{end}", "")
    return text


def pixel_seconds(lines: Sequence[StepLine], config: TrainConfig) -> float | None:
    """Seconds of a pixel in a run with `config`, from the lines of its steps. None if there are none."""
    area = fmean(side * side for side in config.resolution)
    rates = [line["seconds"] / (line["pictures"] * area) for line in lines if line["pictures"]]
    return median(rates) if rates else None


def _step_seconds(plan: TrainPlan, precision: str, mode: Mode, rate: float | None) -> float | None:
    """Seconds of a step: by an earlier run, else by `zimage doctor`. None if neither has been."""
    sizes = plan.batches.sizes()
    pixels = sum(n * width * height for (width, height), n in sizes.items()) / sum(sizes.values())
    if rate is None:
        figures = Figures.for_model(plan.model.transformer)
        one = figures.step(precision, round(pixels), mode) if figures else None
    else:
        one = rate * pixels
    return None if one is None else one * sum(sizes.values()) / plan.batches.steps_per_epoch


def _crops(plan: TrainPlan) -> list[dict[str, object]]:
    """The sizes at which each picture of the first dataset is trained. It is scaled to cover one, then cropped."""
    sizes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for item in plan.batches.items:
        if item.size not in sizes[item.example]:
            sizes[item.example].append(item.size)
    learned = [(plan.examples[i], found, False) for i, found in sizes.items()]
    tested = [(e, [size], True) for e, size in zip(plan.held_out, plan.held_out_sizes, strict=True)]
    return [
        {"picture": example.picture.name, "sizes": found, "held_out": held_out}
        for example, found, held_out in [*learned, *tested]
        if example.picture.parent == plan.config.sets[0].folder
    ]


def _warnings(plan: TrainPlan) -> Iterator[str]:
    config, examples = plan.config, [*plan.examples, *plan.held_out]
    if plan.turbo_warning:
        yield plan.turbo_warning
    for notice in plan.notices:
        yield _without(config, notice)
    for equal in _equal(examples):
        yield f"equal pictures: {listing(equal, _SHOWN)}: delete all but one"
    wanted = max(config.resolution)
    if small := [e.picture.name for e in examples if e.size[0] * e.size[1] < _SMALL * wanted**2]:
        yield f"smaller than {wanted} x {wanted} ({len(small)}): {listing(small, _SHOWN)}: trained at a smaller size"


def _equal(examples: Iterable[Example]) -> list[list[str]]:
    """The names of pictures that are equal to others."""
    names: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        names[example.digest].append(example.picture.name)
    return [equal for equal in names.values() if len(equal) > 1]
