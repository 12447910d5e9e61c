"""Optimizers that MLX has not. They have the interface of `mlx.optimizers.Optimizer` and keep all state in `state`.

Sources: Prodigy, arXiv 2306.06101; schedule-free AdamW, arXiv 2405.15682; moments in 8 bits, arXiv 2110.02861.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
from mlx.optimizers import Optimizer

from .eight_bits import Quantized, dequantized, quantized

Slots = dict[str, mx.array]  # the state of one parameter
_EPS = 1e-8
_START = 1e-6  # Prodigy's first guess of the distance to the solution


class AdamW8bit(Optimizer):
    """AdamW with both moments in 8 bits, in blocks; see `eight_bits`. A step computes in float32."""

    def __init__(self, learning_rate: float, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.01) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.weight_decay = betas, weight_decay

    def init_single(self, parameter: mx.array, state: Slots) -> None:
        """Zero moments for `parameter`, of any shape."""
        zero = mx.zeros(parameter.size)
        for name, signed in (("m", True), ("v", False)):
            state[name], state[f"{name}_scale"] = quantized(zero, signed, mx.random.key(0))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Slots) -> mx.array:
        """`parameter` after a step."""
        step, (beta_1, beta_2) = int(self.step.item()), self.betas
        g, size = gradient.flatten(), parameter.size
        m = beta_1 * dequantized(Quantized(state["m"], state["m_scale"]), size) + (1 - beta_1) * g
        v = beta_2 * dequantized(Quantized(state["v"], state["v_scale"]), size) + (1 - beta_2) * mx.square(g)
        for name, value, signed in (("m", m, True), ("v", v, False)):
            key = mx.random.key(2 * step + signed)
            state[name], state[f"{name}_scale"] = quantized(value, signed, key)
        rate = self.learning_rate / (1 - beta_1**step)
        change = rate * m / (mx.sqrt(v / (1 - beta_2**step)) + _EPS)
        after: mx.array = parameter * (1 - self.learning_rate * self.weight_decay) - change.reshape(parameter.shape)
        return after


class ScheduleFreeAdamW(Optimizer):
    """AdamW whose result is an average x of its steps z. The parameters that learn lie between both:

        z' = z - lr (g / (sqrt(v) + eps) + weight_decay y)
        x' = (1 - c) x + c z'            c is the share of this step's lr^2 in the sum of all
        y' = beta_1 x' + (1 - beta_1) z'

    The gradient is taken at y. x is not stored: it follows from y and z.
    """

    def __init__(self, learning_rate: float, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.01) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.weight_decay = betas, weight_decay

    def init_single(self, parameter: mx.array, state: Slots) -> None:
        """The first z is the parameter."""
        state |= {"z": parameter, "v": mx.zeros_like(parameter), "highest": mx.array(0.0), "sum": mx.array(0.0)}

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Slots) -> mx.array:
        """The next y."""
        (beta_1, beta_2), lr = self.betas, self.learning_rate
        state["highest"] = mx.maximum(state["highest"], lr)
        weight = mx.square(state["highest"])
        state["sum"] = state["sum"] + weight
        share = mx.where(state["sum"] > 0, weight / state["sum"], 0.0)
        state["v"] = beta_2 * state["v"] + (1 - beta_2) * mx.square(gradient)
        denominator = mx.sqrt(state["v"] / (1 - beta_2 ** self.step.astype(mx.float32))) + _EPS
        x = self._average(parameter, state["z"])
        state["z"] = state["z"] - lr * (gradient / denominator + self.weight_decay * parameter)
        x = (1 - share) * x + share * state["z"]
        y: mx.array = beta_1 * x + (1 - beta_1) * state["z"]
        return y

    def result(self, parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The averages x, by the names of `parameters`, which are y."""
        return {name: self._average(y, self.state[name]["z"]) for name, y in parameters.items()}

    def _average(self, y: mx.array, z: mx.array) -> mx.array:
        beta_1 = self.betas[0]
        return (y - (1 - beta_1) * z) / beta_1


class Prodigy(Optimizer):
    """AdamW that finds its own rate: `d`, a lower bound of the distance from the first parameters to the solution.

    The learning rate multiplies d; leave it at 1. d is estimated from all parameters together. Weight decay is
    decoupled. As users of trainers are told to do, the bias of the moments is corrected, and a warmup does not
    raise d (`use_bias_correction` and `safeguard_warmup` of prodigyopt).
    """

    def __init__(self, learning_rate: float, betas: Sequence[float] = (0.9, 0.99), weight_decay: float = 0.01) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.weight_decay = betas, weight_decay

    def init(self, parameters: dict[str, mx.array]) -> None:
        """Keeps the first values of `parameters`."""
        super().init(parameters)
        self.state.update(d=mx.array(_START), most=mx.array(_START), numerator=mx.array(0.0))

    def init_single(self, parameter: mx.array, state: Slots) -> None:
        """Zero moments, and the parameter itself."""
        state |= {name: mx.zeros_like(parameter) for name in ("m", "v", "s")} | {"first": parameter}

    def apply_gradients(self, gradients: dict[str, mx.array], parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """The parameters after a step. Both tables have the same names."""
        self.state["step"] = self.step + 1
        (beta_1, beta_2), d, step = self.betas, self.state["d"], self.step.astype(mx.float32)
        beta_3 = math.sqrt(beta_2)
        rate = d * self.learning_rate * mx.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        ratio, moved, lengths = d / _START, mx.array(0.0), mx.array(0.0)
        for name, g in gradients.items():
            slots = self.state[name]
            moved = moved + ratio * rate * mx.sum(g * (slots["first"] - parameters[name]))
            slots["m"] = beta_1 * slots["m"] + (1 - beta_1) * d * g
            slots["v"] = beta_2 * slots["v"] + (1 - beta_2) * mx.square(d * g)
            slots["s"] = beta_3 * slots["s"] + ratio * d * g
            lengths = lengths + mx.sum(mx.abs(slots["s"]))
        self._estimate(beta_3 * self.state["numerator"] + moved, lengths)
        shrink, eps = 1 - rate * self.weight_decay, self.state["d"] * _EPS
        return {
            name: shrink * parameter - rate * self.state[name]["m"] / (mx.sqrt(self.state[name]["v"]) + eps)
            for name, parameter in parameters.items()
        }

    def _estimate(self, numerator: mx.array, lengths: mx.array) -> None:
        """Raises d if the steps so far show that the solution is farther away."""
        found = mx.where(lengths > 0, numerator / mx.maximum(lengths, 1e-38), 0.0)
        self.state["numerator"] = numerator
        self.state["most"] = mx.maximum(self.state["most"], found)
        self.state["d"] = mx.maximum(self.state["d"], self.state["most"])
