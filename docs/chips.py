"""Predicted times of chips that nobody here has, by published sizes of a chip and assumed shares of its peaks.

Cores and clocks are from https://github.com/philipturner/metal-benchmarks for M1 and M2, and from the pages of
https://hmc-tech.com/gpu for M3 and M4. A core of an Apple GPU makes 128 multiplications with addition in a cycle. That
an M5 makes four times the products of its cores is a guess. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_ref.doctor import work
from zimage_ref.doctor.prediction import Rates, TimeModel
from zimage_ref.doctor.work import Tokens, Work
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE

PRODUCTS, ATTENTION, CONVOLUTIONS, MEMORY = 0.70, 0.50, 0.60, 0.80  # shares of a peak that are taken to be reached
_FLOP_A_CYCLE = 256  # of a core
_ITEMSIZE = 2  # bytes of a value in bfloat16 or float16


@dataclass(frozen=True)
class Chip:
    """The sizes of a chip's GPU."""

    name: str
    cores: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    accelerated: float = 1.0  # products a second, over those of the cores

    @property
    def peak(self) -> float:
        """TFLOP/s of the cores."""
        return self.cores * _FLOP_A_CYCLE * self.clock / 1e3

    @property
    def rates(self) -> Rates:
        """The rates that are assumed to be reached."""
        flops = 1e12 * self.peak
        products = flops * self.accelerated
        return Rates(PRODUCTS * products, ATTENTION * flops, CONVOLUTIONS * products, MEMORY * 1e9 * self.bandwidth)


CHIPS = (
    Chip("M1", 8, 1.278, 68),
    Chip("M2 Pro", 19, 1.398, 200),
    Chip("M3 Max", 40, 1.398, 400),
    Chip("M4 Max", 40, 1.678, 546),
    Chip("M5 Max", 40, 1.75, 614, accelerated=4.0),
    Chip("M3 Ultra", 80, 1.398, 819),
)


@dataclass(frozen=True)
class ChipTimes:
    """Predictions for one chip, in seconds."""

    chip: Chip
    forward_512: float
    forward_1024: float
    step_fast_512: float
    step_lean_512: float
    step_lean_1024: float
    encode_512: float
    decode_1024: float
    picture_1024: float  # of 8 steps
    read_1024: float  # bytes a second that a disk must give, so that the mode stream takes no longer than lean at 1024
    products: float  # the share of products in a forward pass at 1024


def times(chip: Chip) -> ChipTimes:
    """The predictions for `chip`, of the published model in 16 bits."""
    model, rates = TimeModel({"bf16": chip.rates}, "bf16"), chip.rates
    amount = work.forward(OFFICIAL_TRANSFORMER, Tokens.of(1024), _ITEMSIZE)
    return ChipTimes(
        chip,
        model.forward("bf16", 512),
        model.forward("bf16", 1024),
        model.step("bf16", 512, "fast"),
        model.step("bf16", 512, "lean"),
        model.step("bf16", 1024, "lean"),
        model.encode("bf16", 512),
        rates.seconds(work.decode(OFFICIAL_VAE, 1024 * 1024, _ITEMSIZE)),
        model.picture("bf16", 1024, "lean"),
        model.read_rate("bf16", 1024),
        rates.seconds(Work(products=amount.products)) / rates.seconds(amount),
    )
