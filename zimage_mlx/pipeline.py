"""Z-Image on MLX: the networks behind `zimage_ref.generation.pipeline.Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.tensors import Array
from zimage_ref.generation.pipeline import Pipeline
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import FAST, LEAN, Footprint
from zimage_ref.model.flow import model_time

from .device import on_gpu
from .lora.layers import Adapters
from .networks.running import BlockRunner, RunInPieces
from .networks.strips import Strips
from .networks.text_encoder import TextEncoder
from .networks.transformer import Conditioning, Transformer
from .networks.vae import VAE
from .networks.weights import DTYPES, load, to_mlx


class ZImagePipeline(Pipeline):
    """A Z-Image model that makes pictures, in bfloat16 on a GPU, float32 on a CPU, or as asked.

    Each network is loaded when it is first used. The state of sampling is float32 whatever the networks are.
    """

    dtypes = tuple(DTYPES)

    def __init__(
        self, folder: ModelFolder, dtype: str | None = None, lean: bool = False, quantize: int | None = None
    ) -> None:
        super().__init__(folder, dtype, lean, quantize)
        default = "bfloat16" if on_gpu() else "float32"
        self.dtype = DTYPES[dtype or default]
        if mx.metal.is_available():  # keeps weights from being paged out between steps
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))

    @property
    def footprint(self) -> Footprint:
        return LEAN if self.lean else FAST

    @property
    def precision(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The Qwen3 encoder."""
        return self._loaded(TextEncoder(self.folder.text_encoder), "text_encoder")

    @cached_property
    def transformer(self) -> Transformer:
        """The denoiser."""
        run = RunInPieces(on_gpu()).block if self.lean else BlockRunner()
        model: Transformer = self._loaded(Transformer(self.folder.transformer, run), "transformer")
        return model

    @cached_property
    def vae(self) -> VAE:
        """The autoencoder."""
        return self._loaded(VAE(self.folder.vae), "vae")

    def _loaded(self, model: Any, component: str) -> Any:
        load(model, self.folder.weights[component], self.dtype, self.quantization)
        return model

    def encode_prompt(self, text: str) -> mx.array:
        return self.text_encoder(mx.array(self.tokenizer.encode(text)))

    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        self._adapters.use([(file.updates, scale) for file, scale in loras])

    @cached_property
    def _adapters(self) -> Adapters:
        """Merging is faster for each step, branches are faster to change: a lean pipeline has nothing to change."""
        tensors = self.folder.weights["transformer"]
        return Adapters(self.transformer, lambda name: to_mlx(tensors[name], self.dtype), merge=self.lean)

    def release(self, *components: str) -> None:
        for component in (*components, *(["_adapters"] if "transformer" in components else [])):
            self.__dict__.pop(component, None)
        mx.clear_cache()

    def condition(self, captions: Sequence[mx.array], h: int, w: int) -> Conditioning:
        return self.transformer.condition(captions, h, w)

    def predict(self, x: mx.array, sigma: float, conditioning: Conditioning, copies: int = 1) -> mx.array:
        inputs = mx.concatenate([x] * copies)
        raw = self.transformer.denoise(inputs, mx.array([model_time(sigma)]), conditioning)
        return raw.astype(mx.float32)

    def to_backend(self, array: Array) -> mx.array:
        return mx.array(array)

    def memory_limit(self) -> int | None:
        if not on_gpu():
            return super().memory_limit()
        info = mx.device_info()
        # Metal recommends two thirds of a small machine's memory; three quarters of 8 GB are what training takes
        recommended = info.get("max_recommended_working_set_size") or info.get("total_memory") or 0
        limit = max(int(recommended), 3 * int(info.get("memory_size", 0)) // 4)
        return limit or super().memory_limit()

    def settle(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return array

    def encode(self, pixels: Array) -> mx.array:
        return self.vae.encode(mx.array(pixels), self._strips()).astype(mx.float32)

    def decode(self, x: mx.array) -> Array:
        return np.array(self.vae.decode(x, self._strips())[0].astype(mx.float32))

    def _strips(self) -> Strips:
        return Strips(self.footprint.strips)
