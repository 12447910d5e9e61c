"""Every check passes on this machine at its smallest size, and its limit is what roundings add up to."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from support.daily import daily

from zimage_mlx.doctor.cases import Case
from zimage_mlx.doctor.catalogue import catalogue
from zimage_mlx.doctor.checking import Planned, check, verdict
from zimage_mlx.doctor.limits import EPS, Errors, as_float32, limit
from zimage_mlx.doctor.numbers import DTYPES, Numbers, on_device
from zimage_mlx.doctor.picture import built_in, draw, repeated
from zimage_ref import ZImagePipeline as NumPyPipeline
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.pictures.images import read_picture

CASES = {case.name: case for case in catalogue(packed=True)}


def planned(case: Case, dtype: str) -> Planned:
    """The smallest check of a case."""
    return Planned(case, case.sizes[-1], dtype, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_check_passes_and_its_limit_is_not_far_from_the_error(name: str) -> None:
    case = CASES[name]
    trial = case.prepare(case.sizes[-1])
    expected = trial.expected()
    for dtype in case.dtypes:
        found = verdict(planned(case, dtype), trial, expected)
        assert found.right, found
        if dtype != "f32":  # of which BLAS makes the same numbers here
            assert found.limit < 5 * found.error, "the limit is so wide that a fault of 1 % may pass"
    assert [array.dtype for array in expected] == [np.float32] * len(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_what_the_limit_says(dtype: str) -> None:
    x = np.exp(np.random.default_rng(0).uniform(0, 8, 100_000)).astype(np.float32)  # spread over binades
    wide = x.astype(np.float64) * (1 + np.random.default_rng(1).uniform(0, 1e-7, len(x)))
    rounded = as_float32(mx.array(x).astype(DTYPES[dtype])).astype(np.float64) if dtype != "f32" else x
    error = np.sqrt(np.mean(((rounded - (x if dtype != "f32" else wide)) / x) ** 2))
    assert limit(dtype, 1, 0) > error
    if dtype != "f32":
        assert limit(dtype, 1, 0) == pytest.approx(2 * error, rel=0.02)


def test_inputs_are_exact_in_every_dtype() -> None:
    array = Numbers.seeded(0)(1000, 7, scale=0.05)
    for dtype in DTYPES:
        assert Errors.of(as_float32(on_device(array, dtype)), array).error < 1e-6
    assert np.array_equal(Numbers.seeded(0)(1000, 7, scale=0.05), array)
    assert Numbers.seeded(0)(3000, 2000).std() == pytest.approx(1, rel=0.01)  # larger than the pool


def test_values_that_are_not_finite_are_beyond_any_limit() -> None:
    good = np.ones((2, 2), np.float32)
    assert Errors.of(np.array([[1, np.nan], [1, 1]], np.float32), good) == Errors(math.inf, math.inf)
    assert Errors.of(good[:1], good) == Errors(math.inf, math.inf)
    assert Errors.of(good, good) == Errors(0.0, 0.0)
    assert EPS["bf16"] / 2 < Errors.of(good * 1.01, good).error < Errors(0.5, 0.5).error


def test_the_reference_is_computed_once_for_all_dtypes_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    work = [planned(CASES["rotation"], dtype) for dtype in ("bf16", "f32")]
    verdicts = list(check(work, lambda *words: said.append(words)))
    assert [v.dtype for v in verdicts] == ["bf16", "f32"] and all(v.note for v in verdicts)
    assert said == [
        ("right", 0, 2, "rotation, bf16"), ("right", 1, 2, "rotation, f32"), ("right", 2, 2, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", daily(["f32", "bf16"], "bf16"))
def test_the_picture_of_the_built_in_model(dtype: str) -> None:
    assert built_in(dtype).right


def test_the_stored_picture_is_the_one_that_numpy_draws() -> None:
    from zimage_mlx.doctor.picture import STORED

    drawn = draw(NumPyPipeline.from_pretrained(TINY, "float32"))
    assert np.abs(drawn + 128 - np.asarray(read_picture(STORED), np.float32)).max() <= 1


def test_two_runs_make_the_same_bytes() -> None:
    assert repeated((8, 3), "f32").right
