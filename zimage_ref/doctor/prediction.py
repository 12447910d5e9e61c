"""The model of time: what pictures and training will take, from rates of this machine and parts that were measured.

    seconds = ratio * (products / rate + attention / rate + convolutions / rate + bytes moved / bandwidth)

The ratio is 1 unless a part of the work was measured itself. Then it is the measured time over the time that the
formula gives for the same part. So launches, waits and anything else that the formula does not know are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from zimage_ref.checkpoints.component import AnyComponent
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.checkpoints.registry import model_parts
from zimage_ref.formats.json_file import JsonObject
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import BFLOAT16, Tensor
from zimage_ref.memory import (
    LoadedModel,
    Mode,
    footprint_of_mlx,
    generation_stages,
    lora_bytes,
    on_apple_silicon,
    peak,
    training_stages,
)
from zimage_ref.model.config import OFFICIAL_SCHEDULER, OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER, OFFICIAL_VAE
from zimage_ref.model.parameters import block_of

from . import work
from .work import Tokens, Work

SIDES = (512, 768, 1024)
MODES: tuple[Mode, ...] = ("fast", "lean", "stream")
STEPS = 8  # of a picture, Turbo's
BITS = {"8": 8, "4": 4}  # precisions that are numbers of bits
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}
_AS_GOOD = 1.1  # a choice of more bits is better if it takes at most this times the fastest one's time


@dataclass(frozen=True)
class Rates:
    """FLOP a second of products, attention and convolutions, and bytes a second of memory."""

    products: float
    attention: float
    convolutions: float
    memory: float

    def seconds(self, amount: Work) -> float:
        """How long `amount` takes by the formula."""
        flops = amount.products / self.products + amount.attention / self.attention
        return flops + amount.convolutions / self.convolutions + amount.moved / self.memory


@dataclass(frozen=True)
class Part:
    """A part of the work that was measured: which, how much it is, and how long it took."""

    case: str  # forward, step fast, step lean, decode fast, decode lean, text
    precision: str
    side: int
    amount: Work
    seconds: float


class TimeModel:
    """Seconds of forward passes, steps and pictures of the official model, by precision and side."""

    def __init__(self, rates: Mapping[str, Rates], compute: str, parts: Sequence[Part] = ()) -> None:
        """rates: by precision. compute: what quantized weights are computed in, f32 or bf16."""
        self._rates, self._compute = rates, compute
        self._ratios = {(p.case, p.precision, p.side): p.seconds / rates[p.precision].seconds(p.amount) for p in parts}

    def _itemsize(self, precision: str) -> int:
        return _ITEMSIZE[self._compute if precision in BITS else precision]

    def ratio(self, case: str, precision: str, side: int) -> float:
        """Measured time over the formula's: between the sides that were measured, or of the precision nearest to it."""
        known = sorted((s, r) for (c, p, s), r in self._ratios.items() if (c, p) == (case, precision))
        if known:
            sides, ratios = zip(*known, strict=True)
            return float(np.exp(np.interp(np.log(side), np.log(sides), np.log(ratios))))
        if case.startswith("step"):  # a step is slower than the formula says as a forward pass is
            base = self.ratio("forward", precision, side)
            if precision != self._compute:
                own = self.ratio(case, self._compute, side) / self.ratio("forward", self._compute, side)
                return base * own
            return base
        if precision != self._compute and any(c == case for c, _, _ in self._ratios):
            return self.ratio(case, self._compute, side)
        return 1.0

    def seconds(self, case: str, precision: str, side: int, amount: Work) -> float:
        """How long `amount` of the work `case` takes."""
        return self.ratio(case, precision, side) * self._rates[precision].seconds(amount)

    def forward(self, precision: str, side: int) -> float:
        """One forward pass of the transformer for one picture."""
        amount = work.forward(OFFICIAL_TRANSFORMER, Tokens.of(side), self._itemsize(precision))
        return self.seconds("forward", precision, side, amount)

    def step(self, precision: str, side: int, mode: Mode) -> float:
        """One training step: gradient and optimizer. In the mode stream as in lean: a disk that keeps pace is taken."""
        mode = "fast" if mode == "fast" else "lean"
        amount = work.step(OFFICIAL_TRANSFORMER, Tokens.of(side), self._itemsize(precision), mode == "lean")
        optimizer = self._rates[precision].seconds(work.optimizer(OFFICIAL_TRANSFORMER))
        return self.seconds(f"step {mode}", precision, side, amount) + optimizer

    def decode(self, precision: str, side: int, mode: Mode) -> float:
        """The autoencoder from latents to a picture; it is not quantized, and not streamed."""
        mode = "fast" if mode == "fast" else "lean"
        precision = self._compute if precision in BITS else precision
        amount = work.decode(OFFICIAL_VAE, side * side, self._itemsize(precision))
        return self.seconds(f"decode {mode}", precision, side, amount)

    def encode(self, precision: str, side: int) -> float:
        """The autoencoder from a picture to latents."""
        precision = self._compute if precision in BITS else precision
        amount = work.encode(OFFICIAL_VAE, side * side, self._itemsize(precision))
        return self.seconds("decode lean", precision, side, amount)

    def text(self, precision: str) -> float:
        """A prompt of ordinary length."""
        amount = work.encode_text(OFFICIAL_TEXT_ENCODER, 64, self._itemsize(precision))
        return self.seconds("text", precision, 64, amount)

    def picture(self, precision: str, side: int, mode: Mode) -> float:
        """Prompt, STEPS steps and decoding, without reading weights."""
        steps = STEPS * self.forward(precision, side)
        return self.text(precision) + steps + self.decode(precision, side, mode)

    def picture_bytes(self, precision: str, side: int, mode: Mode) -> int:
        """Memory of making one picture; lean and stream free each network before they load the next."""
        model, footprint = _loaded(precision, self._compute), footprint_of_mlx(mode, on_apple_silicon())
        stages = generation_stages(model, footprint, (side, side), one_at_a_time=mode != "fast")
        return peak(stages).total

    def step_bytes(self, precision: str, side: int, mode: Mode) -> int:
        """Memory of training LoRAs of rank 16 on all blocks, with AdamW."""
        lora = lora_bytes(work.trained_values(OFFICIAL_TRANSFORMER), slots=2)
        model = _loaded(precision, self._compute)
        footprint = footprint_of_mlx("lean" if mode == "fast" else mode, on_apple_silicon())
        return peak(training_stages(model, Tokens.of(side).image, lora, 1, mode != "fast", footprint)).total

    def read_rate(self, precision: str, side: int) -> float:
        """The bytes a second that a disk must give so that streaming takes no longer than lean."""
        packed = sum(
            size for name, size in _loaded(precision, self._compute).sizes("transformer").items() if block_of(name)
        )
        return packed / self.forward(precision, side)

    def to_json(self, limit: int | None) -> JsonObject:
        """Every prediction, and what to choose on a machine that has `limit` bytes for it."""

        def by_mode(value: Callable[[str, int, Mode], float]) -> JsonObject:
            return {p: {m: {str(s): value(p, s, m) for s in SIDES} for m in MODES} for p in self._rates}

        def by_precision(value: Callable[[str, int], float]) -> JsonObject:
            return {p: {str(s): value(p, s) for s in SIDES} for p in self._rates}

        return {
            "forward_seconds": by_precision(self.forward),
            "step_seconds": by_mode(self.step),
            "decode_seconds": by_mode(self.decode),
            "encode_seconds": by_precision(self.encode),
            "text_seconds": {p: self.text(p) for p in self._rates},
            "picture_seconds": by_mode(self.picture),
            "picture_bytes": by_mode(self.picture_bytes),
            "step_bytes": by_mode(self.step_bytes),
            "stream_bytes_per_second": by_precision(self.read_rate),
            "memory_limit": limit,
            "best": {
                "picture": {str(s): self._best(self.picture, self.picture_bytes, s, limit) for s in SIDES},
                "step": {str(s): self._best(self.step, self.step_bytes, s, limit) for s in SIDES},
            },
        }

    def _best(
        self,
        seconds: Callable[[str, int, Mode], float],
        nbytes: Callable[[str, int, Mode], int],
        side: int,
        limit: int | None,
    ) -> dict[str, str] | None:
        """Precision and mode to choose: the fastest that fits, or one of more bits that is nearly as fast; or None."""
        fits = [(p, m) for p in self._rates for m in MODES if limit is None or nbytes(p, side, m) <= limit]
        fits = [(p, m) for p, m in fits if m != "stream"] or fits  # it is as fast only if the disk is
        if not fits:
            return None
        longest = _AS_GOOD * min(seconds(p, side, m) for p, m in fits)
        good = [(p, m) for p, m in fits if seconds(p, side, m) <= longest]
        precision, mode = max(good, key=lambda pm: (BITS.get(pm[0], 16), -nbytes(pm[0], side, pm[1])))
        return {"precision": precision, "mode": mode}


@cache
def _loaded(precision: str, compute: str) -> LoadedModel:
    bits = BITS.get(precision)
    return LoadedModel(official_model(), NAMES[compute if bits else precision], Quantization(bits) if bits else None)


def official_model() -> ModelFolder:
    """The published model: every shape in bfloat16, no data."""
    weights = {name: _shapes_only(component) for name, component in model_parts().items()}
    configs = {name: component.official for name, component in model_parts().items()}
    return ModelFolder(Path("Z-Image-Turbo"), configs, weights, OFFICIAL_SCHEDULER, Path("tokenizer.json"))


def _shapes_only(component: AnyComponent) -> dict[str, Tensor]:
    config = component.official
    unused = component.unused(config)
    shapes = component.parameters(config)
    return {n: Tensor(shape, BFLOAT16, lambda: np.empty(0)) for n, shape in shapes.items() if n not in unused}
