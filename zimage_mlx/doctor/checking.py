"""Runs the checks: each at the largest size that its share of the time allows, on the device and in NumPy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from zimage_mlx.device import on_gpu
from zimage_ref.doctor.findings import Progress, Verdict
from zimage_ref.formats.tensors import Array

from .cases import Case, Size, Trial
from .limits import Errors, as_float32, limit, worst_limit
from .numbers import DTYPES


@dataclass(frozen=True)
class Pace:
    """FLOP a second that small products reach: of the device by dtype, and of NumPy in float32."""

    device: Mapping[str, float]
    numpy: float

    @classmethod
    def measure(cls) -> Pace:
        """That of this machine, in less than a second for each dtype."""
        return cls({dtype: _device_pace(dtype) for dtype in DTYPES}, _numpy_pace())

    def seconds(self, case: Case, size: Size, dtype: str) -> float:
        """How long a check takes, its reference included. Wide margins: other work is slower than products."""
        flops = case.flops(size)
        return 2 * flops / self.device[dtype] + 2 * flops / self.numpy


def _device_pace(dtype: str) -> float:
    n = 128
    while True:
        a = mx.random.normal((n, n)).astype(DTYPES[dtype])
        mx.eval(a @ a)  # kernels are built
        start = time.perf_counter()
        mx.eval(a @ a)
        took = time.perf_counter() - start
        if took > 0.02 or n >= 4096:
            return 2 * n**3 / took
        n *= 2


def _numpy_pace() -> float:
    a = np.ones((768, 768), np.float32)
    best = math.inf
    for _ in range(4):  # the first one starts threads
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best


@dataclass(frozen=True)
class Planned:
    """A check to run."""

    case: Case
    size: Size
    dtype: str
    seconds: float  # an estimate

    @property
    def note(self) -> str:
        """The note on a check that is smaller than the real model."""
        if self.size == self.case.sizes[0]:
            return ""
        return f"at {text(self.size)} instead of {text(self.case.sizes[0])}: this device is slow in {self.dtype}"


def text(size: Size) -> str:
    """A size as people write it."""
    return " x ".join(map(str, size))


def plan(cases: Sequence[Case], dtypes: Mapping[str, Sequence[str]], pace: Pace, seconds: float) -> list[Planned]:
    """Which checks to run, at which sizes, so that all of them take about `seconds`; the smallest sizes always run.

    dtypes: by name of the case. Time that cheap checks leave goes to the next ones, so the large ones are planned
    last.
    """
    wanted = [(case, dtype) for case in cases for dtype in dtypes[case.name]]
    cheap_first = sorted(wanted, key=lambda pair: pace.seconds(pair[0], pair[0].sizes[0], pair[1]))
    left, chosen = seconds, {}
    for done, (case, dtype) in enumerate(cheap_first):
        share = left / (len(cheap_first) - done)
        costs = [(size, pace.seconds(case, size, dtype)) for size in case.sizes]
        size, cost = next((pair for pair in costs if pair[1] <= share), costs[-1])
        chosen[case.name, dtype] = Planned(case, size, dtype, cost)
        left = max(left - cost, 0.0)
    return [chosen[case.name, dtype] for case, dtype in wanted]


def check(planned: Sequence[Planned], progress: Progress) -> Iterator[Verdict]:
    """The verdicts, one after the other. Dtypes of one size share what NumPy expects."""
    known: tuple[str, Size] | None = None
    for i, each in enumerate(planned):
        case, size, dtype = each.case, each.size, each.dtype
        progress("right", i, len(planned), f"{case.name}, {dtype}")
        if (case.name, size) != known:
            known, trial = (case.name, size), case.prepare(size)
            expected = trial.expected()
        yield verdict(each, trial, expected)
        mx.clear_cache()
    progress("right", len(planned), len(planned), "")


def verdict(planned: Planned, trial: Trial, expected: Sequence[Array]) -> Verdict:
    """That of one check, its limit included."""
    case, size, dtype = planned.case, planned.size, planned.dtype
    longest = case.longest_sum(size)
    rounded = case.roundings + (longest // 2 if case.sums_rounded_on_cpu and not on_gpu() else 0)
    allowed = limit(dtype, rounded, longest)
    start, errors = time.perf_counter(), Errors(0.0, 0.0)
    for array, target in zip(trial.actual(dtype), expected, strict=True):
        errors |= Errors.of(as_float32(array), target)
    took = time.perf_counter() - start
    return Verdict(
        case.name, dtype, text(size), errors.error, allowed, errors.worst, worst_limit(allowed), took,
        planned.note, case.remedy,
    )  # fmt: skip
