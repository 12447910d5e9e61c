"""Time, noise and sign: against the official scheduler's tables, and against the definition."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from support.cases import DATA

from zimage_ref.model import flow
from zimage_ref.model.config import SchedulerConfig

OFFICIAL = json.loads((DATA / "sigmas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize("shift", [3, 6])
def test_sigmas_are_the_official_ones(shift: int, steps: int) -> None:
    ours = flow.sigmas(steps, SchedulerConfig(shift=float(shift)), image_tokens=1024)
    np.testing.assert_allclose(ours, OFFICIAL[str(shift)][str(steps)], rtol=0, atol=1.2e-7)
    assert ours[0] == 1 and ours[-1] == 0 and len(ours) == steps + 1


def test_four_steps_at_shift_three_are_the_fractions_one_can_work_out() -> None:
    np.testing.assert_allclose(flow.sigmas(4, SchedulerConfig(shift=3.0), 1), [1, 9 / 10, 3 / 4, 1 / 2, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(8, 0.55, 5), (9, 0.5, 5), (50, 0.99, 50), (8, 0.6, 5), (8, 0, 0)]
)
def test_strength_is_the_share_of_steps_rounded_up(steps: int, strength: float, made: int) -> None:
    table = flow.sigmas(steps, SchedulerConfig(shift=3.0), 1, strength)
    assert len(table) == made + 1 and table == flow.sigmas(steps, SchedulerConfig(shift=3.0), 1)[steps - made :]


def test_dynamic_shifting_follows_the_number_of_image_tokens() -> None:
    config = SchedulerConfig(shift=3.0, use_dynamic_shifting=True)
    assert flow.resolution_shift(256) == pytest.approx(np.exp(0.5))
    assert flow.resolution_shift(4096) == pytest.approx(np.exp(1.15))
    assert flow.sigmas(2, config, 256)[1] == pytest.approx(np.exp(0.5) / (np.exp(0.5) + 1))


@pytest.mark.parametrize("kind", ["uniform", "content", "style"])
def test_no_training_sigma_is_exactly_0_or_1(kind: str) -> None:
    ends = SimpleNamespace(random=lambda count: np.array([0.0, 1.0]))
    drawn = flow.TimestepSampling(kind).sigmas(ends, 2, 256)
    assert 0 < drawn.min() < 2e-5 and 1 > drawn.max() > 1 - 2e-5


def test_a_perfect_prediction_leads_from_noise_to_the_picture_in_any_number_of_steps() -> None:
    rng = np.random.default_rng(0)
    x_0, noise = rng.standard_normal((2, 3, 4, 5))
    for steps in (1, 7):
        table = flow.sigmas(steps, SchedulerConfig(shift=3.0), 64)
        x = flow.add_noise(x_0, noise, table[0])
        np.testing.assert_array_equal(x, noise)
        for sigma, following in pairwise(table):
            np.testing.assert_allclose(x, flow.add_noise(x_0, noise, sigma), atol=1e-12)
            x = flow.euler_step(x, flow.training_target(x_0, noise), sigma, following)
        np.testing.assert_allclose(x, x_0, atol=1e-12)


def test_the_model_is_told_one_for_a_picture_and_zero_for_noise() -> None:
    assert flow.model_time(0.0) == 1 and flow.model_time(1.0) == 0 and flow.model_time(0.25) == 0.75


def test_guidance_is_counted_from_zero() -> None:
    assert flow.guided(5.0, 2.0, 0.0) == 5 and flow.guided(5.0, 2.0, 3.0) == 14


def test_training_sigmas_are_logit_normal_and_shifted_by_resolution() -> None:
    for tokens, median in ((256, 1.6487 / 2.6487), (4096, 3.1582 / 4.1582), (100_000, 3.2 / 4.2), (1, 1.6 / 2.6)):
        drawn = flow.TimestepSampling.parse("auto").sigmas(np.random.default_rng(1), 40_000, tokens)
        assert drawn.dtype == np.float32 and drawn.shape == (40_000,) and drawn.min() > 0 and drawn.max() < 1
        assert np.median(drawn) == pytest.approx(median, abs=0.01)
        odds = drawn.astype(np.float64) / (1 - drawn)
        assert np.std(np.log(odds)) == pytest.approx(1, abs=0.02)


def test_starting_noise_depends_on_the_seed_alone() -> None:
    noise = flow.starting_noise(0, (2, 3))
    np.testing.assert_allclose(noise.ravel()[:3], [1.1176214, -1.3871249, -0.4265716], rtol=1e-6)
    assert noise.dtype == np.float32
    assert np.array_equal(noise, flow.starting_noise(0, (2, 3)))
    assert not np.array_equal(noise, flow.starting_noise(1, (2, 3)))
