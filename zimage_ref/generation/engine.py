"""What an engine supplies: the three networks of a model, in its own arrays. NumPy and MLX each have one.

`Pipeline` makes pictures with an engine. For the letters in shapes see `zimage_ref`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import Footprint, physical_memory
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.tokenizer import Tokenizer

ConditioningT = TypeVar("ConditioningT")


class Engine(ABC, Generic[ArrayT, ConditioningT]):
    """The networks of one model. ArrayT is the engine's own kind of array, ConditioningT what its transformer needs."""

    backend: ClassVar[str]  # its name
    dtypes: ClassVar[tuple[str, ...]]  # precisions that it offers

    def __init__(
        self,
        folder: ModelFolder,
        dtype: str | None = None,
        lean: bool = False,
        quantize: int | None = None,
        parts: Mapping[str, Path | None] | None = None,
    ) -> None:
        """dtype: one of `dtypes`, None for the engine's default. lean: hold one network in memory at a time.

        quantize: bits (4 or 8) that the big matrices of transformer and text encoder are quantized to as they load.
        parts: files that `folder` was opened with instead of its own, for the record.
        Raises ConfigError for an unknown dtype, and if tokenizer and text encoder do not belong together.
        """
        if dtype not in (None, *self.dtypes):
            raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(self.dtypes)}")
        self.folder, self._lean = folder, lean
        self.precision = dtype or self.default_dtype()  # that the networks compute in, by name
        self.parts = {name: path for name, path in (parts or {}).items() if path is not None}
        self.quantization = Quantization(quantize) if quantize else None
        self.tokenizer = Tokenizer(folder.tokenizer)
        if self.tokenizer.vocab_size > folder.text_encoder.vocab_size:
            raise ConfigError(
                f"{folder.tokenizer}: has {self.tokenizer.vocab_size} tokens, the text encoder only "
                f"{folder.text_encoder.vocab_size}: they do not belong together"
            )

    @property
    def lean(self) -> bool:
        """Whether memory holds one network at a time."""
        return self._lean

    def set_lean(self, lean: bool) -> None:
        """Changes `lean`. A transformer that was loaded to run the other way is freed."""
        if lean != self._lean:
            self.release("transformer")
            self._lean = lean

    @classmethod
    @abstractmethod
    def default_dtype(cls) -> str:
        """The one of `dtypes` that is best on this machine."""

    @classmethod
    @abstractmethod
    def footprint(cls, lean: bool) -> Footprint:
        """How the engine uses memory, `lean` or not."""

    def memory_limit(self) -> int | None:
        """Bytes of memory that the engine can work in, None if nothing says."""
        return physical_memory()

    def guarded(self) -> AbstractContextManager[None]:
        """A block in which an error of the engine's device becomes a BackendError."""
        return nullcontext()

    @abstractmethod
    def encode_prompt(self, text: str) -> ArrayT:
        """(T, cap_feat_dim): the encoder's hidden_states[-2] for `text` in the chat template, without padding."""

    @abstractmethod
    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        """Replaces the LoRAs in use by `loras` and their scales; () for none. The base is not loaded again."""

    @abstractmethod
    def release(self, *components: str) -> None:
        """Frees the memory of text_encoder, transformer or vae; each is loaded anew when next used."""

    @abstractmethod
    def condition(self, captions: Sequence[ArrayT], h: int, w: int) -> ConditioningT:
        """All that `predict` needs besides latents and time, made once for all steps.

        captions: B features (T_i, cap_feat_dim), as of `encode_prompt`. h, w: of the latents.
        The result holds the refined caption tokens (B, T, D), rotations of the L image tokens and of all S tokens, and
        masks (B, 1, 1, S) if captions differ in length; T is that of the longest caption, padded.
        """

    @abstractmethod
    def predict(self, x: ArrayT, sigma: float, conditioning: ConditioningT, copies: int = 1) -> ArrayT:
        """The transformer's raw output, about x_0 - noise, for `copies` of x (B, C, h, w): (copies * B, C, h, w).

        conditioning: of copies * B captions; with guidance, B prompts and then B negative prompts.
        """

    @abstractmethod
    def to_backend(self, array: Array) -> ArrayT:
        """A NumPy array as the engine's own, to hold the state of sampling. The shape stays."""

    @abstractmethod
    def settle(self, array: ArrayT) -> ArrayT:
        """The array, computed: a lazy engine does its work here."""

    @abstractmethod
    def encode(self, pixels: Array) -> ArrayT:
        """Pixels (1, 3, H, W) float32 in [-1, 1] -> latents (1, C, h, w)."""

    @abstractmethod
    def decode(self, x: ArrayT) -> Array:
        """Latents (1, C, h, w) -> pixels (3, H, W), about [-1, 1]."""
