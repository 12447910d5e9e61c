"""The whole examination: machine, right, fast, and what they mean for pictures and training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from zimage_mlx.device import multiply_in_float32, on_gpu
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.doctor import machine
from zimage_ref.doctor.findings import Findings, Machine, Progress, Rate, Verdict
from zimage_ref.doctor.prediction import SIDES, Part, TimeModel
from zimage_ref.formats.json_file import JsonObject

from . import device
from .cases import FLOATS, Case
from .catalogue import catalogue
from .checking import Pace, Planned, check, plan
from .parts import Measurer, Wanted
from .picture import built_in, repeated
from .rates import Measuring, by_precision, packed_shares


@dataclass(frozen=True)
class Budget:
    """Seconds that the sections of a run may take, and megabytes that are written to the disk for a moment."""

    right: float  # all checks
    rate: float  # each rate
    part: float  # each part
    megabytes: int


QUICK = Budget(right=6.0, rate=0.2, part=2.5, megabytes=64)
FULL = Budget(right=66.0, rate=0.8, part=6.0, megabytes=512)


def diagnose(quick: bool = False, progress: Progress = lambda section, done, total, detail: None) -> Findings:
    """Examines this machine. quick: in less than half a minute, with fewer dtypes; else in less than three.

    progress: called before each check and measurement with its section, its number, how many there are, and its name.
    It sets MLX_ENABLE_TF32=0 for this process, unless you have set it: float32 is compared with float32. MLX reads it
    once, so call this before other work with MLX. Else checks in float32 may be wrong on an M5 or on CUDA; they say so.
    """
    multiply_in_float32()
    start = time.perf_counter()
    budget, compute = QUICK if quick else FULL, "bf16" if on_gpu() else "f32"
    progress("machine", 0, 2, "system")
    found = machine.describe()
    limit = ZImagePipeline.from_pretrained(TINY).memory_limit()
    progress("machine", 1, 2, "disk")
    found += device.describe(limit) + machine.disk(budget.megabytes)
    progress("machine", 2, 2, "")

    pace = Pace.measure()
    verdicts = right(quick, compute, plan_checks(quick, compute, pace, budget.right), progress)
    rates, parts, predicted = fast(quick, compute, pace, limit, progress)
    return Findings(
        quick,
        found + Machine({}, device.slow_bfloat16(rates)),
        verdicts,
        rates,
        {f"{part.case} {part.precision} {part.side}": part.seconds for part in parts},
        predicted,
        time.perf_counter() - start,
    )


def plan_checks(quick: bool, compute: str, pace: Pace, seconds: float) -> list[Planned]:
    """The checks of a run: of a quick one on `compute` for bfloat16, and without those that a quick run leaves out."""
    cases = catalogue(packed=not mx.cuda.is_available())
    wanted = {case.name: quick_dtypes(case, compute) if quick else list(case.dtypes) for case in cases}
    return plan(cases, wanted, pace, seconds)


def quick_dtypes(case: Case, compute: str) -> list[str]:
    """The dtypes that a quick run checks, without repetition: on a CPU float32 stands for bfloat16."""
    return list(dict.fromkeys(compute if dtype == "bf16" else dtype for dtype in case.quick))


def right(quick: bool, compute: str, planned: Sequence[Planned], progress: Progress) -> list[Verdict]:
    """Every verdict."""
    verdicts = list(check(planned, progress))
    dtypes = [compute] if quick else list(FLOATS)
    last: list[tuple[str, Callable[[], Verdict]]] = [
        (f"picture, {dtype}", partial(built_in, dtype)) for dtype in dtypes
    ]
    size = next(each.size for each in planned if each.case.name == "gradient of a block" and each.dtype == compute)
    last.append(("the same bytes twice", partial(repeated, size, compute)))
    for i, (name, run) in enumerate(last):
        progress("whole", i, len(last), name)
        verdicts.append(run())
    progress("whole", len(last), len(last), "")
    return verdicts


def fast(
    quick: bool, compute: str, pace: Pace, limit: int | None, progress: Progress
) -> tuple[list[Rate], list[Part], JsonObject]:
    """Rates, parts that were measured, and predictions."""
    budget = QUICK if quick else FULL
    precisions = [compute, "8", "4"] if quick or not on_gpu() else ["bf16", "f16", "f32", "8", "4"]
    rates = list(Measuring(pace, compute, budget.rate).all(precisions, progress))
    speeds = by_precision(rates, precisions, compute)
    measurer = Measurer(TimeModel(speeds, compute), compute, budget.part, limit)
    parts = list(measurer.all(wanted_parts(quick, compute, precisions), progress))
    model = TimeModel(speeds, compute, parts)
    return rates, parts, model.to_json(limit) | {"packed_speed": packed_shares(rates)}


def wanted_parts(quick: bool, compute: str, precisions: Sequence[str]) -> list[Wanted]:
    """The parts to measure: forward passes in every precision, steps and the decoder in the default one."""
    small, large = (SIDES[0], 256, 128), (SIDES[-1],)
    steps = [("step lean", small)] if quick else [(f"step {m}", s) for m in ("lean", "fast") for s in (small, large)]
    forward = precisions if not quick else [compute, "8"]
    wanted = [Wanted("forward", p, small) for p in forward]
    wanted += [Wanted(case, compute, sides) for case, sides in steps]
    wanted += [Wanted("decode lean", compute, (SIDES[-1], SIDES[0], 256)), Wanted("text", compute, (64,))]
    if not quick:
        wanted += [Wanted("forward", compute, large), Wanted("step lean", "4", small)]
        wanted += [Wanted(f"decode {m}", compute, small) for m in ("lean", "fast")]  # launches count more there
        wanted += [Wanted("decode fast", compute, (SIDES[-1], SIDES[0], 256))]
    return wanted
