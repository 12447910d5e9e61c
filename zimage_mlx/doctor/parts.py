"""Parts of the official model, measured as they are run: a few blocks forward, a few blocks of a step, the decoder.

One block stands in for all of a network: its weights are read as many times as those of different blocks would be,
and memory holds one. The time of a few blocks is scaled to thirty by the amount of work.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from zimage_mlx.device import on_gpu
from zimage_mlx.lora.layers import add_trainable_loras
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_mlx.networks.running import BlockRunner
from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.text_encoder import Layer
from zimage_mlx.networks.transformer import Block, Transformer
from zimage_mlx.networks.tree import find
from zimage_mlx.networks.tree import replace as put
from zimage_mlx.networks.vae import VAE
from zimage_mlx.training.gradient import LossAndGradients
from zimage_mlx.training.loss import NoisyBatch
from zimage_ref.doctor import work
from zimage_ref.doctor.findings import Progress
from zimage_ref.doctor.prediction import Part, TimeModel
from zimage_ref.doctor.work import Tokens
from zimage_ref.formats.quantize import GROUP_SIZE
from zimage_ref.memory import FAST, LEAN, Mode, kept_values
from zimage_ref.model.config import OFFICIAL_TEXT_ENCODER, OFFICIAL_TRANSFORMER, OFFICIAL_VAE

from .layers import LORA_LAYERS
from .numbers import DTYPES
from .rates import median

Network = TypeVar("Network", bound=nn.Module)

_CAPTION = 64
_FEWEST = 2  # blocks
_KEPT = 0.25  # of the memory limit: for what blocks keep of a step in the fast mode


@dataclass(frozen=True)
class Wanted:
    """A part to measure: the largest of `sides` that fits into the time."""

    case: str
    precision: str
    sides: tuple[int, ...]


@dataclass(frozen=True)
class Measurer:
    """Measures parts within a share of time for each, as far as `rates` lets it hope for."""

    model: TimeModel  # without parts: from rates alone
    compute: str
    share: float
    limit: int | None  # bytes

    def all(self, wanted: list[Wanted], progress: Progress) -> Iterator[Part]:
        """The parts that were measured; those that would take too long at any size are left out."""
        for i, each in enumerate(wanted):
            progress("parts", i, len(wanted), f"{each.case}, {each.precision}")
            fitting = [side for side in each.sides if self.least(each.case, each.precision, side) <= self.share]
            if fitting:
                yield self._measure(each.case, each.precision, fitting[0])
            gc.collect()
            mx.clear_cache()
        progress("parts", len(wanted), len(wanted), "")

    def least(self, case: str, precision: str, side: int) -> float:
        """Seconds that the smallest measurement takes, by the formula: one run to warm up and one that counts."""
        if case == "text":
            return 2 * _FEWEST / 35 * self.model.text(precision)
        if case.startswith("decode"):
            return 2.5 * self.model.decode(precision, side, "fast")
        mode: Mode = "fast" if case == "step fast" else "lean"
        whole = self.model.forward(precision, side) if case == "forward" else self.model.step(precision, side, mode)
        return 2.5 * whole * (_FEWEST + 2) / 34

    def _measure(self, case: str, precision: str, side: int) -> Part:
        if case == "text":
            return self._text(precision)
        if case.startswith("decode"):
            return self._decode(case, precision, side)
        return self._blocks(case, precision, side)

    def _blocks(self, case: str, precision: str, side: int) -> Part:
        """A forward pass, or the gradient, of as many blocks as fit."""
        itemsize, tokens, lean = DTYPES[self._dtype(precision)].size, Tokens.of(side, _CAPTION), case == "step lean"
        network = RepeatedTransformer(self._dtype(precision), precision, trains=case != "forward")
        run = network.step(side, lean) if case != "forward" else network.forward(side)
        network.resize(_FEWEST)
        few = median(run, 0)
        each = few / (_FEWEST + 2)
        most = int(0.7 * self.share / 2 / each) - 2
        if case == "step fast" and self.limit:
            kept = tokens.both * kept_values(OFFICIAL_TRANSFORMER) * itemsize
            most = min(most, int(_KEPT * self.limit / kept) - 4)
        count = max(_FEWEST, min(most, OFFICIAL_TRANSFORMER.n_layers))
        seconds = few
        if count > _FEWEST:
            network.resize(count)
            seconds = median(run, 0.3 * self.share)
        if case == "forward":
            amount = work.forward(OFFICIAL_TRANSFORMER, tokens, itemsize, count)
        else:
            amount = work.step(OFFICIAL_TRANSFORMER, tokens, itemsize, lean, count)
        return Part(case, precision, side, amount, seconds)

    def _decode(self, case: str, precision: str, side: int) -> Part:
        vae = with_random_weights(VAE(OFFICIAL_VAE), precision)
        latents = mx.random.normal((1, 16, side // 8, side // 8))
        strips = FAST.strips if case == "decode fast" else LEAN.strips
        seconds = median(lambda: mx.eval(vae.decode(latents, Strips(strips))), 0.5 * self.share)
        return Part(case, precision, side, work.decode(OFFICIAL_VAE, side * side, DTYPES[precision].size), seconds)

    def _text(self, precision: str) -> Part:
        """Some layers of the text encoder, one after the other."""
        layer, count = with_random_weights(Layer(OFFICIAL_TEXT_ENCODER), precision), 2 * _FEWEST
        x = mx.random.normal((1, _CAPTION, OFFICIAL_TEXT_ENCODER.hidden_size)).astype(DTYPES[precision])
        mx.eval(x)

        def run() -> None:
            y = x
            for _ in range(count):
                y = layer(y)
            mx.eval(y)

        whole = work.encode_text(OFFICIAL_TEXT_ENCODER, _CAPTION, DTYPES[precision].size)
        seconds = median(run, 0.5 * self.share)
        return Part("text", precision, _CAPTION, whole * (count / OFFICIAL_TEXT_ENCODER.used_layers), seconds)

    def _dtype(self, precision: str) -> str:
        return precision if precision in DTYPES else self.compute


class RepeatedTransformer:
    """The official transformer whose blocks are all one, modulated and not, with random weights."""

    def __init__(self, dtype: str, precision: str, trains: bool) -> None:
        self.dtype = dtype
        config = replace(OFFICIAL_TRANSFORMER, n_layers=1, n_refiner_layers=1)
        self.model = with_random_weights(Transformer(config, BlockRunner()), dtype)
        self.block: Block = self.model.layers[0]
        self.plain: Block = self.model.context_refiner[0]
        for block in (self.block, self.plain):
            if precision not in DTYPES:
                _quantize(block, int(precision))
            block.freeze()
        self.model.freeze()
        if trains:
            for block in (self.block, self.plain):
                add_trainable_loras(block, LORA_LAYERS, work.RANK, float(work.RANK), np.random.default_rng(0))
        mx.eval(self.model.parameters())

    def resize(self, layers: int) -> None:
        """Gives the network so many layers, and the refiners of the official one."""
        self.model.config = replace(OFFICIAL_TRANSFORMER, n_layers=layers)
        refiners = OFFICIAL_TRANSFORMER.n_refiner_layers
        self.model.layers = [self.block] * layers
        self.model.noise_refiner = [self.block] * refiners
        self.model.context_refiner = [self.plain] * refiners

    def forward(self, side: int) -> Callable[[], None]:
        """Computes a forward pass for a square picture; the work that all steps share is done before."""
        x, caption = self._latents(side), self._caption()
        conditioning, t = self.model.condition([caption], side // 8, side // 8), mx.array([0.3])
        mx.eval(conditioning.caption, x)
        return lambda: mx.eval(self.model.denoise(x, t, conditioning))

    def step(self, side: int, lean: bool) -> Callable[[], None]:
        """Computes the gradient of LoRAs on all layers."""
        batch = NoisyBatch(self._latents(side), self._latents(side), mx.array([0.6]), [self._caption()])
        differentiate: dict[int, LossAndGradients] = {}

        def run() -> None:
            layers = len(self.model.layers)
            if layers not in differentiate:
                differentiate[layers] = LossAndGradients(self.model, 0.0 if lean else math.inf, compiled=on_gpu())
            differentiate[layers](batch)

        return run

    @staticmethod
    def _latents(side: int) -> mx.array:
        return mx.random.normal((1, OFFICIAL_TRANSFORMER.in_channels, side // 8, side // 8))

    def _caption(self) -> mx.array:
        return mx.random.normal((_CAPTION, OFFICIAL_TRANSFORMER.cap_feat_dim)).astype(DTYPES[self.dtype])


def with_random_weights(module: Network, dtype: str) -> Network:
    """`module` with small random weights."""
    module.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.02).astype(DTYPES[dtype]), module.parameters()))
    mx.eval(module.parameters())
    return module


def _quantize(block: Block, bits: int) -> None:
    for name in LORA_LAYERS:
        layer = QuantizedLinear.from_linear(find(block, name), GROUP_SIZE, bits)
        mx.eval(layer.parameters())
        put(block, [(name, layer)])
