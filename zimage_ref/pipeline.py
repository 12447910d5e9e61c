"""The NumPy engine, for any machine: `generation.pipeline.Pipeline` with the networks in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property

import numpy as np

from .checkpoints.control_file import ControlFile
from .formats.tensors import DTYPE_NAMES, Array, Tensor
from .generation.pipeline import Pipeline
from .lora.file import LoRAFile
from .memory import NUMPY, Footprint, Mode
from .model.flow import model_time
from .model.quantization import quantize_all
from .model.shared_moments import SharedMoments
from .model.steering import Steering
from .model.step_cache import StepCache
from .networks.controlnet import Control, ControlNet
from .networks.steered import condition_steered
from .networks.text_encoder import TextEncoder
from .networks.tiny_decoder import TinyDecoder
from .networks.transformer import Conditioning, Transformer
from .networks.vae import VAE
from .networks.weights import Weights
from .networks.writer import Writer


class ZImagePipeline(Pipeline[Array, Conditioning]):
    """A Z-Image model that makes pictures in float32 or float64. Weights stay on disk, memory-mapped."""

    backend = "numpy"
    dtypes = ("float32", "float64")
    _control: tuple[object, ControlNet] | None = None  # the last ControlNet, and the stamp of its file

    @classmethod
    def default_dtype(cls) -> str:
        return "float32"

    @property
    def dtype(self) -> np.dtype[np.float32] | np.dtype[np.float64]:
        """The dtype that the networks compute in."""
        return np.dtype(self.precision)

    @classmethod
    def footprint(cls, mode: Mode) -> Footprint:
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
        return self._ready(self.folder.weights[component])

    def _ready(self, tensors: Mapping[str, Tensor]) -> Weights:
        if self.quantization:  # quantized from the working precision, as in MLX
            cast = {name: tensor.cast(DTYPE_NAMES[self.dtype]) for name, tensor in tensors.items()}
            tensors = quantize_all(cast, self.quantization, keep=True)
        return Weights(tensors, self.dtype)

    def _encode_prompt(self, text: str) -> Array:
        return self.text_encoder(self.tokenizer.encode(text))

    def tiny_decoder(self, tensors: Mapping[str, Tensor]) -> Callable[[Array], Array]:
        decoder = TinyDecoder(Weights(tensors, np.dtype("float32")))
        return lambda x: np.asarray(decoder(x.astype(np.float32))[0])

    def writer(self) -> Writer:
        tensors = {**self.folder.weights["text_encoder"], **self.folder.spare["text_encoder"]}
        return Writer(self.folder.text_encoder, self._ready(tensors))

    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        self.transformer.w.use_loras([(file.updates, scale) for file, scale in loras])

    def release(self, *components: str) -> None:
        """Does nothing: mapped weights take no memory of the process."""

    def condition(
        self, captions: Sequence[Array], h: int, w: int, steering: Steering[Array] | None = None
    ) -> Conditioning:
        """See `Engine`: caption (B, T, D) in the working dtype, rotations (B, L, K / 2) and (B, S, K / 2), mask."""
        if steering is not None:
            return condition_steered(self.transformer, captions, h, w, steering)
        return self.transformer.condition(captions, h, w)

    def controlled(self, conditioning: Conditioning, file: ControlFile, context: Array, scale: float) -> Conditioning:
        """See `Engine`."""
        if self._control is None or self._control[0] != file.stamp:
            self._control = file.stamp, ControlNet(file.config, self._ready(file.tensors))
        return replace(conditioning, control=Control(self._control[1], context, scale))

    def cached(self, conditioning: Conditioning, cache: StepCache[Array]) -> Conditioning:
        """See `Engine`."""
        return replace(conditioning, cache=cache)

    def predict(self, x: Array, sigma: float, conditioning: Conditioning, copies: int = 1) -> Array:
        """See `Engine`: (copies * B, C, h, w) in the working dtype."""
        inputs = np.concatenate([x] * copies)
        return self.transformer.denoise(inputs, np.full(len(inputs), model_time(sigma), self.dtype), conditioning)

    def guarded(self) -> AbstractContextManager[None]:
        """NumPy does not warn of overflow: `check_finite` says it once, as an error."""
        return np.errstate(all="ignore")

    def to_backend(self, array: Array) -> Array:
        return array.astype(self.dtype)

    def settle(self, array: Array) -> Array:
        return array

    def _encode(self, pixels: Array, shared: SharedMoments[Array] | None = None) -> Array:
        return self.vae.encode(pixels, shared)

    def _decode(self, x: Array, shared: SharedMoments[Array] | None = None) -> Array:
        pixels: Array = self.vae.decode(x, shared)[0]
        return pixels
