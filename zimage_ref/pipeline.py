"""Z-Image in NumPy, on any machine: the networks behind `generation.pipeline.Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .checkpoints.folder import ModelFolder
from .formats.tensors import DTYPE_NAMES, Array
from .generation.pipeline import Pipeline
from .lora.file import LoRAFile
from .memory import NUMPY, Footprint
from .model.flow import model_time
from .model.quantization import quantize_all
from .networks.text_encoder import TextEncoder
from .networks.transformer import Conditioning, Transformer
from .networks.vae import VAE
from .networks.weights import Weights


class ZImagePipeline(Pipeline):
    """A Z-Image model that makes pictures, in float32 or float64. Weights stay on disk, memory-mapped."""

    dtypes = ("float32", "float64")

    def __init__(
        self, folder: ModelFolder, dtype: str | None = None, lean: bool = False, quantize: int | None = None
    ) -> None:
        super().__init__(folder, dtype, lean, quantize)
        self.dtype = np.dtype(dtype or "float32")

    @property
    def precision(self) -> str:
        return str(self.dtype)

    @property
    def footprint(self) -> Footprint:
        return NUMPY

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The Qwen3 encoder."""
        return TextEncoder(self.folder.text_encoder, self._weights("text_encoder"))

    @cached_property
    def transformer(self) -> Transformer:
        """The denoiser."""
        return Transformer(self.folder.transformer, self._weights("transformer"))

    @cached_property
    def vae(self) -> VAE:
        """The autoencoder."""
        return VAE(self.folder.vae, self._weights("vae"))

    def _weights(self, component: str) -> Weights:
        tensors = self.folder.weights[component]
        if self.quantization:  # in the working precision, as MLX does it
            cast = {name: tensor.cast(DTYPE_NAMES[self.dtype]) for name, tensor in tensors.items()}
            tensors = quantize_all(cast, self.quantization, keep=True)
        return Weights(tensors, self.dtype)

    def encode_prompt(self, text: str) -> Array:
        return self.text_encoder(self.tokenizer.encode(text))

    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        self.transformer.w.use_loras([(file.updates, scale) for file, scale in loras])

    def release(self, *components: str) -> None:
        """Nothing to free: mapped weights take no memory of the process's own."""

    def condition(self, captions: Sequence[Array], h: int, w: int) -> Conditioning:
        return self.transformer.condition(captions, h, w)

    def predict(self, x: Array, sigma: float, conditioning: Conditioning, copies: int = 1) -> Array:
        inputs = np.concatenate([x] * copies)
        return self.transformer.denoise(inputs, np.full(len(inputs), model_time(sigma), self.dtype), conditioning)

    def to_backend(self, array: Array) -> Array:
        return array.astype(self.dtype)

    def settle(self, array: Array) -> Array:
        return array

    def encode(self, pixels: Array) -> Array:
        return self.vae.encode(pixels)

    def decode(self, x: Array) -> Array:
        return self.vae.decode(x)[0]
