"""Z-Image on MLX: the networks behind `zimage_ref.generation.pipeline.Pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.doctor.remembered import Figures, precision_name
from zimage_ref.formats.quantize import GROUP_SIZE, stored_bits
from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.generation.pipeline import Pipeline
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import Footprint, Mode, footprint_of_mlx
from zimage_ref.model.flow import model_time
from zimage_ref.model.parameters import EMBEDDING
from zimage_ref.model.shared_moments import SharedMoments
from zimage_ref.model.steering import Steering
from zimage_ref.model.step_cache import StepCache
from zimage_ref.streaming import STREAMED, require_streamable

from . import device
from .device import gpu_errors_explained, gpu_memory, limit_memory, multiply_in_float32, on_gpu
from .lora.layers import Adapters
from .networks.controlnet import Control, ControlNet
from .networks.running import RESIDENT, BlockRunner, RunInPieces, Weights
from .networks.steered import condition_steered
from .networks.streaming import Stream
from .networks.strips import Strips
from .networks.text_encoder import TextEncoder
from .networks.tiny_decoder import TinyDecoder
from .networks.transformer import Conditioning, RunBlock, Transformer
from .networks.vae import VAE
from .networks.weights import DTYPES, load, to_mlx
from .networks.writer import Ending, Writer, ending_tensors

Network = TypeVar("Network", bound=nn.Module)


class ZImagePipeline(Pipeline[mx.array, Conditioning]):
    """A Z-Image model that makes pictures, in bfloat16 on a GPU, float32 on a CPU, or as asked.

    In float16 the matrices of the transformer are float16, see `networks.half`; the other networks are bfloat16.

    Each network is loaded when it is first used. The state of sampling is float32 whatever the networks are.
    """

    backend = "mlx"
    dtypes = tuple(DTYPES)

    def __init__(
        self,
        folder: ModelFolder,
        dtype: str | None = None,
        lean: bool = False,
        quantize: int | None = None,
        parts: Mapping[str, Path | None] | None = None,
        group_size: int = GROUP_SIZE,
        stream: bool = False,
    ) -> None:
        if stream:
            require_streamable(folder)
        super().__init__(folder, dtype, lean, quantize, parts, group_size, stream)
        self.unpack = True  # whether quantized weights are unpacked for a product of many rows
        self._networks: dict[str, nn.Module] = {}  # in memory, by component
        self._streams: dict[str, Stream] = {}  # what reads their blocks, in the mode stream
        if self.precision == "float32":
            multiply_in_float32()
        self._adapt_to(self.mode)
        self._adapters: Adapters | None = None  # of the transformer in memory
        self._control_stamp: object = None  # of the file of the ControlNet in memory

    @classmethod
    def default_dtype(cls) -> str:
        return "bfloat16" if on_gpu() else "float32"

    @property
    def dtype(self) -> mx.Dtype:
        """What the transformer computes in."""
        return DTYPES[self.precision]

    def _dtype_of(self, component: str) -> mx.Dtype:
        """What a network computes in. float16 is for the transformer: the others have not been tried in its range."""
        narrow = self.dtype == mx.float16 and component != "transformer"
        return mx.bfloat16 if narrow else self.dtype

    @classmethod
    def footprint(cls, mode: Mode) -> Footprint:
        return footprint_of_mlx(mode, device.on_metal())

    def measured_seconds(self, mode: Mode, pixels: int, predictions: int) -> float | None:
        figures = Figures.for_model(self.folder.transformer)
        precision = precision_name(self.precision, self.quantization)
        return figures.picture(precision, pixels, predictions, mode) if figures else None

    def set_mode(self, mode: Mode) -> None:
        if mode == "stream" != self.mode:
            require_streamable(self.folder)
        super().set_mode(mode)
        self._adapt_to(mode)

    def _adapt_to(self, mode: Mode) -> None:
        """Sets what the mode needs set."""
        limit_memory(mode)
        self.unpack = self.unpacks(mode)

    def unpacks(self, mode: Mode) -> bool:
        """Whether quantized weights are unpacked for a product of many rows.

        On Metal this takes memory, so it is for the mode fast. There packed weights stay so if the doctor measured that
        they are faster on this machine.
        """
        if not device.on_metal():
            return True
        figures = Figures.of_this_machine() if mode == "fast" else None
        packed = figures is not None and any(map(figures.packed_is_faster, self._bits()))
        return mode == "fast" and not packed

    def _bits(self) -> list[int]:
        """The bits of the quantized matrices of the transformer, as asked for or as stored."""
        return (
            [self.quantization.bits] if self.quantization else stored_bits(self.folder.weights["transformer"].values())
        )

    @property
    def loaded(self) -> frozenset[str]:
        """The networks that are in memory: text_encoder, transformer, vae."""
        return frozenset(self._networks)

    @property
    def text_encoder(self) -> TextEncoder:
        """The Qwen3 encoder."""
        return self._network("text_encoder", lambda stream: TextEncoder(self.folder.text_encoder, stream))

    @property
    def transformer(self) -> Transformer:
        """The denoiser."""
        return self._network("transformer", self._empty_transformer)

    @property
    def block_stream(self) -> Stream | None:
        """The reader of the blocks of the loaded transformer, in the mode stream."""
        return self._streams.get("transformer")

    @property
    def vae(self) -> VAE:
        """The autoencoder."""
        return self._network("vae", lambda stream: VAE(self.folder.vae))

    def _network(self, component: str, make: Callable[[Weights], Network]) -> Network:
        """The network `component`; if it is not in memory, `make` gives it and its weights are loaded."""
        if component not in self._networks:
            how = self.folder.weights[component], self._dtype_of(component), self.quantization, self.unpack
            if self.mode == "stream" and component in STREAMED:
                stream = Stream()
                network = make(stream)
                stream.open(network, *how)
                self._streams[component] = stream
            else:
                network = make(RESIDENT)
                load(network, *how)
            self._networks[component] = network
        return cast(Network, self._networks[component])

    def _empty_transformer(self, weights: Weights) -> Transformer:
        """A transformer that still needs weights. A lean one computes blocks in pieces."""
        return Transformer(self.folder.transformer, weights.around(self._run(weights)), weights)

    def _run(self, weights: Weights) -> RunBlock:
        return RunInPieces(on_gpu(), weights.read_ahead).block if self.lean else BlockRunner()

    def release(self, *components: str) -> None:
        for component in components:
            self._networks.pop(component, None)
            if stream := self._streams.pop(component, None):
                stream.close()
        if "transformer" in components:
            self._adapters = None
            self._networks.pop("controlnet", None)
        mx.clear_cache()

    def _encode_prompt(self, text: str) -> mx.array:
        return self.text_encoder(mx.array(self.tokenizer.encode(text)))

    def tiny_decoder(self, tensors: Mapping[str, Tensor]) -> Callable[[mx.array], Array]:
        """As `Engine`."""
        width, latents = tensors["layers.0.weight"].shape[:2]
        decoder = TinyDecoder(latents, width)
        load(decoder, tensors, mx.float32)
        return lambda x: np.array(decoder(x.astype(mx.float32))[0])

    def writer(self) -> Writer:
        """As `Engine`: the text encoder in memory, and the last layer beside it."""
        encoder, config = self.text_encoder, self.folder.text_encoder
        table = self.folder.weights["text_encoder"][EMBEDDING] if "text_encoder" in self._streams else None
        ending = Ending(config, has_head=table is not None)
        tensors = ending_tensors(config, self.folder.spare["text_encoder"], table)
        load(ending, tensors, self._dtype_of("text_encoder"), self.quantization, self.unpack)
        return Writer(encoder, ending)

    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        if self._adapters is None:
            # merging is faster for each step, branches are faster to change: a lean pipeline has nothing to change
            self._adapters = Adapters(self.transformer, self._stored, merge=self.lean, stream=self.block_stream)
        self._adapters.use([(file.updates, scale) for file, scale in loras])

    def _stored(self, name: str) -> mx.array:
        """A parameter of the transformer as its file has it, in the working dtype."""
        return to_mlx(self.folder.weights["transformer"][name], self.dtype)

    def condition(
        self, captions: Sequence[mx.array], h: int, w: int, steering: Steering[mx.array] | None = None
    ) -> Conditioning:
        """As `Engine`: caption (B, T, D) in the dtype of the stream, and a layout with the rotations and masks."""
        if steering is not None:
            return condition_steered(self.transformer, captions, h, w, steering)
        return self.transformer.condition(captions, h, w)

    def controlled(
        self, conditioning: Conditioning, file: ControlFile, context: mx.array, scale: float
    ) -> Conditioning:
        """As `Engine`. The network stays until the transformer is freed, or another is used."""
        if "controlnet" not in self._networks or self._control_stamp != file.stamp:
            self._networks.pop("controlnet", None)
            network = ControlNet(file.config, self._run(RESIDENT))
            load(network, file.tensors, self.dtype, self.quantization, self.unpack)
            self._networks["controlnet"], self._control_stamp = network, file.stamp
        own = cast(ControlNet, self._networks["controlnet"])
        return replace(conditioning, control=Control(own, context, scale))

    def cached(self, conditioning: Conditioning, cache: StepCache[mx.array]) -> Conditioning:
        """As `Engine`."""
        return replace(conditioning, cache=cache)

    def predict(self, x: mx.array, sigma: float, conditioning: Conditioning, copies: int = 1) -> mx.array:
        """As `Engine`: (copies * B, C, h, w) float32."""
        inputs = mx.concatenate([x] * copies)
        raw = self.transformer.denoise(inputs, mx.array([model_time(sigma)]), conditioning)
        return raw.astype(mx.float32)

    def to_backend(self, array: Array) -> mx.array:
        return mx.array(array)

    def guarded(self) -> AbstractContextManager[None]:
        return gpu_errors_explained()

    def memory_limit(self) -> int | None:
        return gpu_memory() or super().memory_limit()

    def settle(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return array

    def _encode(self, pixels: Array, shared: SharedMoments[mx.array] | None = None) -> mx.array:
        return self.vae.encode(mx.array(pixels), self._strips(shared)).astype(mx.float32)

    def _decode(self, x: mx.array, shared: SharedMoments[mx.array] | None = None) -> Array:
        return np.array(self.vae.decode(x, self._strips(shared))[0].astype(mx.float32))

    def _strips(self, shared: SharedMoments[mx.array] | None) -> Strips:
        return Strips(self.footprint(self.mode).strips, shared)
