"""Prompt to picture, whatever does the arithmetic: what the NumPy and the MLX pipeline have in common.

A request is checked, prompts are encoded, noise is denoised along the sigma schedule, latents are decoded. A backend
supplies the networks. Source: pipeline_z_image.py of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .checkpoint import find_weights
from .errors import ConfigError
from .images import to_picture, to_unit
from .lora_alpha import companions
from .lora_file import LoRAFile, read_lora
from .model_folder import ModelFolder
from .names import transformer_parameters
from .options import GenerateConfig
from .quantize import Quantization
from .schedule import euler_step, sigmas, starting_noise
from .tensors import Array
from .tokenizer import Tokenizer

OUTPUTS = ("pil", "array", "latents")
AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline")
LoRASource = str | Path | tuple[str | Path, float]  # a LoRA file, at scale 1 or as given
Progress = Callable[[str, int, int], None]  # stage (encode, denoise, decode), units done, units in all


class Pipeline(ABC):
    """A Z-Image model that makes pictures."""

    dtypes: tuple[str, ...]  # precisions that the backend offers

    def __init__(
        self, folder: ModelFolder, dtype: str | None = None, lean: bool = False, quantize: int | None = None
    ) -> None:
        """dtype: one of `dtypes`, None for the backend's default. lean: hold one network in memory at a time.

        quantize: bits (4 or 8) that the big matrices of transformer and text encoder are quantized to as they load.
        """
        if dtype not in (None, *self.dtypes):
            raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(self.dtypes)}")
        self.folder, self.lean = folder, lean
        self._lora_files: dict[tuple[Any, ...], LoRAFile] = {}
        self.quantization = Quantization(quantize) if quantize else None
        self.tokenizer = Tokenizer(folder.tokenizer)
        if self.tokenizer.vocab_size > folder.text_encoder.vocab_size:
            raise ConfigError(
                f"{folder.tokenizer}: has {self.tokenizer.vocab_size} tokens, the text encoder only "
                f"{folder.text_encoder.vocab_size}: they do not belong together"
            )

    @classmethod
    def from_pretrained(
        cls: type[AnyPipeline],
        model_dir: str | Path,
        dtype: str | None = None,
        lean: bool = False,
        quantize: int | None = None,
        parts: Mapping[str, Path | None] | None = None,
    ) -> AnyPipeline:
        """Opens the model in `model_dir`, any layout of `model_folder`, checking every name and shape.

        quantize: 4 or 8 bits, done while loading; what the files hold quantized stays as it is. `parts` names files
        that stand in for those of the folder, by transformer, text_encoder, vae, tokenizer.
        Weights are read when they are first used. Raises ConfigError, FormatError or WeightError.
        """
        return cls(ModelFolder.open(Path(model_dir), parts), dtype, lean, quantize)

    @abstractmethod
    def encode_prompt(self, text: str) -> Any:
        """(T, cap_feat_dim): the encoder's hidden_states[-2] for `text` in the chat template, without padding."""

    @abstractmethod
    def use_loras(self, loras: Sequence[tuple[LoRAFile, float]]) -> None:
        """Replaces the LoRAs in use by `loras` and their scales; () for none. The base is not loaded again."""

    @abstractmethod
    def release(self, *components: str) -> None:
        """Frees the memory of text_encoder, transformer or vae; each is loaded anew when next used."""

    @abstractmethod
    def condition(self, captions: Sequence[Any], h: int, w: int) -> Any:
        """Whatever `predict` needs of captions and latent size, once for all steps."""

    @abstractmethod
    def predict(self, x: Any, sigma: float, conditioning: Any, guidance: float) -> Any:
        """The transformer's raw output (B, C, h, w), guided.

        With guidance, `conditioning` is of 2 B captions: the prompts', then the negative ones'.
        """

    @abstractmethod
    def to_backend(self, array: Array) -> Any:
        """A NumPy array as the backend's own, to hold the state of sampling."""

    @abstractmethod
    def settle(self, array: Any) -> Any:
        """The array, computed: a lazy backend does its work here."""

    @abstractmethod
    def decode(self, x: Any) -> Array:
        """Latents (1, C, h, w) -> (3, H, W) NumPy, about [-1, 1]."""

    def read_loras(self, loras: Sequence[LoRASource]) -> list[tuple[LoRAFile, float]]:
        """The LoRA files of `loras` with their scales, checked against the transformer's layers.

        A file that was among those of the last call is not read again, unless it has changed since.
        Raises FormatError, WeightError or ConfigError.
        """
        shapes = transformer_parameters(self.folder.transformer)
        known, found = self._lora_files, []
        self._lora_files = {}
        for source in loras:
            path, scale = source if isinstance(source, tuple) else (source, 1.0)
            if not np.isfinite(scale):
                raise ConfigError(f"{path}: LoRA scale {scale} must be a finite number")
            stamp = _stamp(Path(path))
            file = self._lora_files.setdefault(stamp, known.get(stamp) or read_lora(Path(path), shapes))
            found.append((file, float(scale)))
        return found

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        width: int = 512,
        height: int = 512,
        steps: int = 8,
        guidance: float = 0.0,
        negative_prompt: str = "",
        seed: int = 0,
        loras: Sequence[LoRASource] = (),
        latents: Any | None = None,
        output: str = "pil",
        progress: Progress = lambda stage, done, total: None,
    ) -> list[Any]:
        """One picture a prompt: PIL images, (H, W, 3) float32 arrays in 0..1, or (C, h, w) latents, by `output`.

        `latents` is the starting noise (B, C, h, w); picture i of a batch otherwise starts from seed + i.
        `loras` are files, or pairs of file and scale. `progress` is called as each unit of a stage is done.
        Raises ConfigError for options out of bounds, FormatError or WeightError for LoRA files that do not fit.
        """
        batch = _requests(
            prompt, seed, width=width, height=height, steps=steps, guidance=guidance, negative_prompt=negative_prompt
        )
        if output not in OUTPUTS:
            raise ConfigError(f"output {output!r} must be one of {', '.join(OUTPUTS)}")
        noise = self._starting_latents(batch, latents)
        adapters = self.read_loras(loras)

        captions = self._encode([r.prompt for r in batch] + ([negative_prompt] if guidance else []), progress)
        captions = captions[: len(batch)] + captions[len(batch) :] * len(batch)
        self._done_with("text_encoder")

        self.use_loras(adapters)
        x = self.to_backend(noise)
        for step, latest in enumerate(self.denoise(x, captions, steps, guidance), start=1):
            progress("denoise", step, steps)
            x = latest
        self._done_with("transformer")

        pictures = [self._finish(x[i : i + 1], output) for i in _counted(range(len(batch)), "decode", progress)]
        self._done_with("vae")
        return pictures

    def denoise(self, x: Any, captions: Sequence[Any], steps: int, guidance: float) -> Iterator[Any]:
        """Yields the latents (B, C, h, w) after each of `steps` Euler steps from the noise `x`.

        captions: B of the prompts; with guidance, B more of the negative prompt.
        """
        h, w = x.shape[2:]
        tokens = h * w // self.folder.transformer.patch_size**2
        schedule = sigmas(steps, self.folder.scheduler, tokens)
        conditioning = self.condition(captions, h, w)
        for sigma, next_sigma in zip(schedule, schedule[1:], strict=False):
            raw = self.predict(x, sigma, conditioning, guidance)
            x = self.settle(euler_step(x, raw, sigma, next_sigma))
            yield x

    def _encode(self, texts: Sequence[str], progress: Progress) -> list[Any]:
        return [self.settle(self.encode_prompt(text)) for text in _counted(texts, "encode", progress)]

    def _starting_latents(self, batch: Sequence[GenerateConfig], given: Any | None) -> Array:
        """Noise (B, C, h, w) float32: `given`, or drawn from each request's seed."""
        request, factor, multiple = batch[0], self.folder.vae.factor, self.folder.size_multiple
        for side in (request.width, request.height):
            if side % multiple:
                raise ConfigError(
                    f"width and height must be multiples of {multiple} for {self.folder.path}, not {side}"
                )
        shape = (self.folder.transformer.in_channels, request.height // factor, request.width // factor)
        if given is None:
            return np.stack([starting_noise(request.seed, shape) for request in batch])
        noise = np.asarray(given, np.float32)
        if noise.shape != (len(batch), *shape):
            raise ConfigError(f"latents have shape {noise.shape}, the request needs {(len(batch), *shape)}")
        return noise

    def _done_with(self, component: str) -> None:
        if self.lean:
            self.release(component)

    def _finish(self, x: Any, output: str) -> Any:
        if output == "latents":
            return np.asarray(x[0], np.float32)
        pixels = to_unit(self.decode(x))
        return to_picture(pixels) if output == "pil" else pixels


def _requests(prompt: str | Sequence[str], seed: int, **options: Any) -> list[GenerateConfig]:
    """One checked request a prompt; picture i of a batch has seed + i, so it is the one made alone with that seed."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ConfigError("at least one prompt is needed")
    return [GenerateConfig(prompt=text, seed=seed + i, **options) for i, text in enumerate(prompts)]


def _counted(items: Sequence[Any], stage: str, progress: Progress) -> Iterator[Any]:
    """The items, telling `progress` after the work on each."""
    for i, item in enumerate(items):
        yield item
        progress(stage, i + 1, len(items))


def _stamp(path: Path) -> tuple[Any, ...]:
    """What differs once a LoRA file, or the file beside it that holds its alpha, was written anew."""
    path = find_weights(path) if path.is_dir() else path
    stats = [file.stat() for file in (path, *companions(path)) if file.exists()]
    return path, *((stat.st_mtime_ns, stat.st_size) for stat in stats)
