"""Spacings of noise levels."""

from __future__ import annotations

import numpy as np
import pytest

from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import sigmas
from zimage_ref.model.spacings import SPACINGS, beta_quantile

TURBO = SchedulerConfig(shift=3.0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_spacing_keeps_the_ends_and_the_order(spacing: str) -> None:
    levels, plain = sigmas(9, TURBO, 64, spacing=spacing), sigmas(9, TURBO, 64)
    assert levels[0] == 1 and levels[-1] == 0 and levels[-2] == pytest.approx(plain[-2])
    assert np.all(np.diff(levels) < 0)
    assert (levels == plain) == (spacing == "simple")
    assert sigmas(1, TURBO, 64, spacing=spacing) == [1, 0]
    assert len(sigmas(9, TURBO, 64, 0.5, spacing)) == len(sigmas(9, TURBO, 64, 0.5))


def test_beta_quantiles_are_those_of_tables() -> None:
    """Values of scipy.stats.beta(0.6, 0.6).ppf, to ten digits."""
    known = {0.0: 0.0, 0.01: 0.0008612388, 0.1: 0.0395844056, 0.25: 0.1756803787, 0.4: 0.3627009908, 0.5: 0.5}
    for probability, value in known.items():
        assert beta_quantile(probability) == pytest.approx(value, abs=1e-9)
        assert beta_quantile(1 - probability) == pytest.approx(1 - value, abs=1e-9)


def test_exponential_levels_have_one_ratio_and_karras_one_step_of_powers() -> None:
    exponential, karras = (np.array(sigmas(7, TURBO, 64, spacing=name)[:-1]) for name in ("exponential", "karras"))
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], exponential[1] / exponential[0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(karras ** (1 / 7)), np.diff(karras ** (1 / 7)).mean(), rtol=1e-5)
