"""Samplers on equations with known answers, and guidance with its two brakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.flows import curved
from support.networks import BACKENDS, native
from support.parity import to_float64

from zimage_ref.generation.samplers import SAMPLERS, TWICE, Guidance
from zimage_ref.model.config import SchedulerConfig
from zimage_ref.model.flow import add_noise, guided, sigmas, training_target

ORDERS = {"euler": 1, "heun": 2, "dpm++2m": 2, "unipc": 2, "res_multistep": 2, "res_2s": 2}
SIGMAS = sigmas(9, SchedulerConfig(shift=3.0), 64)


def run(name: str, x: Any, table: list[float], predict: Any, blend: Any = lambda x, sigma: x) -> list[tuple[Any, Any]]:
    return list(SAMPLERS[name](x, table, predict, blend))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_prediction_leads_to_the_picture(name: str) -> None:
    x_0, noise = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 5))
    steps = run(name, noise, SIGMAS, lambda x, sigma: training_target(x_0, noise))
    assert len(steps) == 9
    for (x, predicted), sigma in zip(steps, SIGMAS[1:], strict=True):
        np.testing.assert_allclose(x, add_noise(x_0, noise, sigma), atol=1e-12)
        np.testing.assert_allclose(predicted, x_0, atol=1e-12)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_the_error_shrinks_with_the_order_of_the_sampler(name: str, order: int) -> None:
    x = np.linspace(-2, 2, 5).reshape(1, 1, 1, 5)
    exact = 1 + 0.5 * x  # the flow of a Gaussian maps each quantile to its own
    errors = []
    for steps in (40, 80, 160, 320):
        table = sigmas(steps, SchedulerConfig(shift=1.0), 64)
        errors.append(np.abs(run(name, x, table, curved)[-1][0] - exact).max())
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.25)  # halving the step divides it by 2 or 4
    assert (errors[0] < 9e-3) == (order == 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_an_euler_step(name: str) -> None:
    x = np.array([[[[0.3, -1.2]]]])
    expected = run("euler", x, [1.0, 0.0], curved)[-1][0]
    np.testing.assert_allclose(run(name, x, [1.0, 0.0], curved)[-1][0], expected, atol=1e-12)


def test_heun_predicts_twice_a_step_but_for_the_last() -> None:
    calls: dict[str, list[float]] = {}
    for name in SAMPLERS:
        seen = calls.setdefault(name, [])
        run(name, np.ones((1, 1, 1, 1)), [1.0, 0.6, 0.3, 0.0], lambda x, s, seen=seen: seen.append(s) or curved(x, s))
    once = [1, 0.6, 0.3]
    assert calls.pop("heun") == [1, 0.6, 0.6, 0.3, 0.3]
    assert calls.pop("res_2s") == pytest.approx([1, 0.6**0.5, 0.6, 0.18**0.5, 0.3])
    assert calls == {name: once for name in SAMPLERS if name not in TWICE}


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_put_back_after_a_step_is_what_the_next_one_starts_from(name: str) -> None:
    def blend(x: Any, sigma: float) -> Any:
        return np.where(np.arange(4) < 2, 10 * sigma, x)

    starts = []
    steps = run(name, np.ones((1, 1, 1, 4)), SIGMAS, lambda x, s: starts.append((x, s)) or curved(x, s), blend)
    for (x, _), sigma in zip(steps, SIGMAS[1:], strict=True):
        np.testing.assert_array_equal(x[..., :2], 10 * sigma)
        assert (x[..., 2:] != 10 * sigma).all()
    assert np.allclose(next(x for x, s in starts if s == SIGMAS[1] and x[..., 0] == 10 * s)[..., 1], 10 * SIGMAS[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_backend_samples_alike(name: str, backend: str) -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 5)).astype(np.float32)
    expected = run(name, x.astype(np.float64), SIGMAS, curved)[-1][0]
    np.testing.assert_allclose(to_float64(run(name, native(backend, x), SIGMAS, curved)[-1][0]), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalization_shortens_each_picture_that_guidance_made_too_long(backend: str) -> None:
    positive, negative = np.random.default_rng(4).standard_normal((2, 2, 3, 4, 5)).astype(np.float32)
    negative[1] = 1.2 * positive[1]  # guidance away from it makes the second picture shorter: it stays
    raw = to_float64(guided(positive, negative, 2.0))
    limited = to_float64(Guidance(2.0, normalization=1.0)(native(backend, positive), native(backend, negative)))
    length = np.linalg.norm(positive[0])
    assert np.linalg.norm(raw[0]) > 1.5 * length
    np.testing.assert_allclose(limited[0], raw[0] * length / np.linalg.norm(raw[0]), rtol=1e-5)
    np.testing.assert_allclose(limited[1], raw[1], rtol=1e-6)
    free = to_float64(Guidance(2.0)(native(backend, positive), native(backend, negative)))
    np.testing.assert_allclose(free, raw, rtol=1e-6)


def test_guidance_ends_where_it_is_truncated() -> None:
    assert [Guidance(2.0, truncation=0.5).active(sigma) for sigma in (1.0, 0.6, 0.5, 0.4, 0.1)] == [1, 1, 1, 0, 0]
    assert not Guidance(0.0).active(1.0) and Guidance(0.1).active(0.01)


@pytest.mark.parametrize("name", ["res_multistep", "res_2s"])
def test_res_follows_a_picture_that_is_linear_in_log_sigma(name: str) -> None:
    """x_0 = a + b log sigma: the flow is known, and each step but those of order 1 follows it without an error."""
    a, b = np.array([[[[0.3, -1.0]]]]), np.array([[[[0.5, 0.25]]]])

    def raw(x: Any, sigma: float) -> Any:
        return (a + b * np.log(sigma) - x) / sigma

    def exact(x: Any, sigma: float, to: float) -> Any:
        particular = lambda s: a + b * (np.log(s) + 1)  # noqa: E731  solves dx/dlog sigma = x - x_0
        return particular(to) + (x - particular(sigma)) * to / sigma

    table = [0.9, 0.7, 0.4, 0.3, 0.1, 0.0]
    starts = [np.ones((1, 1, 1, 2)), *(x for x, _ in run(name, np.ones((1, 1, 1, 2)), table, raw))]
    exacts = [exact(x, s, to) for x, s, to in zip(starts, table[:-2], table[1:-1], strict=False)]
    follows = [np.allclose(x, e, atol=1e-12) for x, e in zip(starts[1:], exacts, strict=False)]
    assert follows == [name == "res_2s", True, True, True]


def test_res_multistep_is_the_published_step() -> None:
    """One step in numbers, by the formulas of arXiv 2308.02157 with c2 = -1/2: sigmas 1, 1/2, 1/8, x_0 of 1 and 2."""
    predicted = iter([1.0, 2.0])

    def raw(x: Any, sigma: float) -> Any:
        return (next(predicted) - x) / sigma

    *_, (x, _) = run("res_multistep", np.zeros((1, 1, 1, 1)), [1.0, 0.5, 0.125], raw)
    h, start = np.log(4.0), 0.5
    phi_1 = (1 - 0.25) / h
    phi_2 = (1 - phi_1) / h
    c2 = -np.log(2.0) / h
    expected = 0.25 * start + h * ((phi_1 - phi_2 / c2) * 2.0 + phi_2 / c2 * 1.0)
    assert x.item() == pytest.approx(expected, abs=1e-12)
