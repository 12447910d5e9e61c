"""The interface of an engine: the three networks of a model, with the engine's own arrays. NumPy and MLX implement it.

`Pipeline` makes pictures with an engine. For the letters in shapes see `zimage_ref`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np

from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.quantize import GROUP_SIZE, Quantization
from zimage_ref.formats.tensors import Array, Tensor
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import Footprint, Mode, physical_memory
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.checks import check_maps, checked_numbers
from zimage_ref.model.shared_moments import SharedMoments
from zimage_ref.model.steering import Steering
from zimage_ref.model.step_cache import StepCache
from zimage_ref.model.tokenizer import Tokenizer

from .enhancing import Writer, Written, answer, check_can_write, checked_system, lots_of, text_of
from .tiles import Place, Tiles

ConditioningT = TypeVar("ConditioningT")


@dataclass(frozen=True)
class Terms:
    """What a request wants of the engine. It keeps its terms while other requests use the same engine."""

    mode: Mode  # the memory mode
    loras: Sequence[tuple[LoRAFile, float]]  # LoRA, scale

    def scaled(self, factor: float) -> Terms:
        """The same terms with every scale multiplied by `factor`."""
        return self if factor == 1 else replace(self, loras=[(lora, scale * factor) for lora, scale in self.loras])

    @property
    def lean(self) -> bool:
        """Whether only one network is in memory at a time."""
        return self.mode != "fast"


class Engine(ABC, Generic[ArrayT, ConditioningT]):
    """The networks of one model. ArrayT: the engine's arrays. ConditioningT: the conditioning of its transformer.

    Threads may share an engine: `turn` lets one compute at a time. `encode_prompt`, `encode` and `decode` take a turn.
    """

    backend: ClassVar[str]  # its name
    dtypes: ClassVar[tuple[str, ...]]  # names of the precisions that it offers

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
        """dtype: one of `dtypes`, or None for the engine's default. lean: keep only one network in memory at a time.

        quantize: 3, 4, 5, 6 or 8 bits for the large matrices of transformer and text encoder; they are quantized on
        loading. group_size: the weights that then share one scale.
        stream: as lean, and read the weights of a block when it is needed.
        parts: files that were used instead of those in `folder`, for the record.
        Raises ConfigError for an unknown dtype, and if the tokenizer does not belong to the text encoder.
        """
        if dtype not in (None, *self.dtypes):
            raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(self.dtypes)}")
        self.folder, self._mode = folder, _mode(lean, stream)
        self._lock = threading.RLock()
        self.precision = dtype or self.default_dtype()  # the name of the dtype that the networks compute in
        self.parts = {name: path for name, path in (parts or {}).items() if path is not None}
        self.quantization = Quantization(quantize, group_size) if quantize else None
        self.tokenizer = Tokenizer(folder.tokenizer)
        if self.tokenizer.vocab_size > folder.text_encoder.vocab_size:
            raise ConfigError(
                f"{folder.tokenizer}: has {self.tokenizer.vocab_size} tokens, the text encoder only "
                f"{folder.text_encoder.vocab_size}: they do not belong together"
            )

    @property
    def lean(self) -> bool:
        """Whether only one network is in memory at a time."""
        return self._mode != "fast"

    @property
    def mode(self) -> Mode:
        """The memory mode; see `zimage_ref.streaming`."""
        return self._mode

    def set_mode(self, mode: Mode) -> None:
        """Changes `mode`. Networks that are loaded for another mode are freed."""
        if mode != self._mode:
            self.release("transformer", *(["text_encoder"] if "stream" in (mode, self._mode) else []))
            self._mode = mode

    @classmethod
    @abstractmethod
    def default_dtype(cls) -> str:
        """The best of `dtypes` for this machine."""

    @classmethod
    @abstractmethod
    def footprint(cls, mode: Mode) -> Footprint:
        """The memory that the engine takes in `mode`, beside weights."""

    def memory_limit(self) -> int | None:
        """The bytes of memory that the engine may use. None if they are not known."""
        return physical_memory()

    def measured_seconds(self, mode: Mode, pixels: int, predictions: int) -> float | None:
        """Seconds of a picture in `mode` by measurements of this machine, without reading weights. None if not known.

        predictions: passes of the transformer, twice as many with guidance.
        """
        return None

    def guarded(self) -> AbstractContextManager[None]:
        """A block in which an error of the engine's device becomes a BackendError."""
        return nullcontext()

    @contextmanager
    def turn(self, terms: Terms | None = None) -> Iterator[None]:
        """A block in which no other thread uses the engine, and its memory mode and LoRAs are those of `terms`.

        None changes nothing. An error of the engine's device becomes a BackendError. A turn may hold another turn.
        A request takes a turn for each prompt, step and picture. So a request that waits for its user blocks nobody.
        """
        with self._lock, self.guarded():
            if terms is not None:
                self.set_mode(terms.mode)
                self.use_loras(terms.loras)
            yield

    def encode_prompt(self, text: str) -> ArrayT:
        """(T, cap_feat_dim): the encoder's hidden_states[-2] for `text` in the chat template, without padding."""
        with self.turn():
            return self.settle(self._encode_prompt(text))

    def enhance(
        self, prompt: str, seed: int = 0, system: str | None = None, written: Written = lambda done, total: None
    ) -> str:
        """A longer prompt for `prompt`, written by the text encoder. The tokens follow from `seed`.

        system: what it is told to do; None: `enhancing.SYSTEM`. written: is called after each token.
        Raises ConfigError if the text encoder cannot write, or wrote nothing.
        """
        check_can_write(self.folder)
        ids = self.tokenizer.encode_chat(checked_system(system), prompt)
        with self.turn():
            made = answer(self.writer(), ids, self.tokenizer.stops, lots_of(seed), written=written)
        return text_of(self.tokenizer, made, prompt)

    def encode(self, pixels: Array, tiles: Tiles | None = None) -> ArrayT:
        """Pixels (1, 3, H, W) float32 in [-1, 1] -> latents (1, C, h, w). Raises ConfigError for other arrays.

        tiles: of the latents, to take the memory of one; None takes that of the whole picture.
        """
        with self.turn():
            factor = self.folder.vae.factor
            check_maps("pixels", pixels.shape, self.folder.vae.in_channels, factor, batch=1)
            values = checked_numbers("pixels", pixels)
            if tiles is None or tiles.single:
                return self.settle(self._encode(values))
            shared: SharedMoments[ArrayT] = SharedMoments()
            return self.to_backend(
                tiled(tiles, shared, lambda place: np.asarray(self._encode(values[place.index(factor)], shared)))
            )

    def decode(self, x: ArrayT, tiles: Tiles | None = None) -> Array:
        """Latents (1, C, h, w) -> pixels (3, H, W), roughly in [-1, 1]; tiles as in `encode`.

        Raises ConfigError for other arrays.
        """
        with self.turn():
            check_maps("latents", x.shape, self.folder.vae.latent_channels, 1, batch=1)
            if tiles is None or tiles.single:
                return self._decode(x)
            shared: SharedMoments[ArrayT] = SharedMoments()
            factor = self.folder.vae.factor
            pixels: Array = tiled(tiles, shared, lambda place: self._decode(x[place.index()], shared)[None], factor)[0]
            return pixels

    @abstractmethod
    def _encode_prompt(self, text: str) -> ArrayT:
        """See `encode_prompt`."""

    @abstractmethod
    def tiny_decoder(self, tensors: Mapping[str, Tensor]) -> Callable[[ArrayT], Array]:
        """A decoder for previews: latents (1, C, h, w) -> pixels (3, 8 h, 8 w), roughly in [-1, 1].

        tensors: by the names of `model.tiny_decoder`. It computes in float32.
        """

    @abstractmethod
    def writer(self) -> Writer:
        """The text encoder as a language model at the beginning of a text."""

    @abstractmethod
    def _encode(self, pixels: Array, shared: SharedMoments[ArrayT] | None = None) -> ArrayT:
        """See `encode`."""

    @abstractmethod
    def _decode(self, x: ArrayT, shared: SharedMoments[ArrayT] | None = None) -> Array:
        """See `decode`."""

    @abstractmethod
    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        """Uses `loras`, (LoRA, scale), instead of the earlier ones. () means no LoRA. The base is not loaded again."""

    @abstractmethod
    def release(self, *components: str) -> None:
        """Frees the memory of text_encoder, transformer or vae. Each is loaded again on its next use."""

    @abstractmethod
    def condition(
        self, captions: Sequence[ArrayT], h: int, w: int, steering: Steering[ArrayT] | None = None
    ) -> ConditioningT:
        """The inputs of `predict` besides latents and time. They are computed once for all steps.

        captions: B arrays of features (T_i, cap_feat_dim) from `encode_prompt`. h, w: the size of the latents.
        steering: what steers the pictures; with n boxes, there are 1 + n captions for each picture.
        The result holds the refined caption tokens (B, T, D), the rotations of the L image tokens and of all S tokens,
        and masks (B, 1, 1, S) if captions differ in length. T is the padded length of the longest caption.
        """

    @abstractmethod
    def controlled(
        self, conditioning: ConditioningT, file: ControlFile, context: ArrayT, scale: float
    ) -> ConditioningT:
        """`conditioning` with the hints of a ControlNet, for `predict`. The network is loaded on its first use.

        context: its input, (1, control_in_dim, h, w). scale: of its hints. It is freed with the transformer.
        """

    @abstractmethod
    def cached(self, conditioning: ConditioningT, cache: StepCache[ArrayT]) -> ConditioningT:
        """`conditioning` with a step cache, which stands for the layers of the transformer in some steps."""

    @abstractmethod
    def predict(self, x: ArrayT, sigma: float, conditioning: ConditioningT, copies: int = 1) -> ArrayT:
        """The transformer's raw output, about x_0 - noise, for `copies` of x (B, C, h, w): (copies * B, C, h, w).

        conditioning: of copies * B captions; with guidance, B prompts and then B negative prompts.
        """

    @abstractmethod
    def to_backend(self, array: Array) -> ArrayT:
        """A NumPy array as an array of the engine, for the state of sampling. The shape does not change."""

    @abstractmethod
    def settle(self, array: ArrayT) -> ArrayT:
        """The array, fully computed. An engine with lazy arrays evaluates it here."""


def tiled(tiles: Tiles, shared: SharedMoments[ArrayT], make: Callable[[Place], Array], factor: int = 1) -> Array:
    """A picture that the autoencoder makes tile by tile, (1, C, factor h, factor w).

    shared: the statistics of its norms. make: a tile -> (1, C, factor rows, factor columns), with these statistics.
    """

    def part(place: Place) -> Array:
        shared.begin()
        return make(place)

    for place in tiles.places:
        part(place)
    shared.close()
    return tiles.blend(part, factor)


def _mode(lean: bool, stream: bool) -> Mode:
    if stream:
        return "stream"
    return "lean" if lean else "fast"
