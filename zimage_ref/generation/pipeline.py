"""Prompt to picture, whatever does the arithmetic: what the NumPy and the MLX pipeline have in common.

A request is checked, prompts are encoded, noise is denoised along the sigma schedule, latents are decoded. A backend
supplies the networks. Source: pipeline_z_image.py of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.checkpoint import find_weights
from zimage_ref.formats.quantize import Quantization
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.file import LoRAFile, read_lora
from zimage_ref.lora.spellings import companions
from zimage_ref.memory import Footprint, Stage, generation, largest, physical_memory
from zimage_ref.model.parameters import transformer_parameters
from zimage_ref.model.tokenizer import Tokenizer
from zimage_ref.pictures.images import Picture, to_array, to_picture, to_unit

from .config import GenerateConfig
from .denoising import Step, denoised, plain_steps
from .jobs import Request, batches, configs, plan

OUTPUTS = ("pil", "array", "latents")
AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline")
LoRASource = str | Path | tuple[str | Path, float]  # a LoRA file, at scale 1 or as given
Progress = Callable[[str, int, int], None]  # stage (encode, denoise, decode), units done, units in all
Watch = Callable[[Sequence[Request], Step], None]


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""


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
        """Opens the model in `model_dir`, any layout of `checkpoints.folder`, checking every name and shape.

        quantize: 4 or 8 bits, done while loading; what the files hold quantized stays as it is. `parts` names files
        that stand in for those of the folder, by transformer, text_encoder, vae, tokenizer.
        Weights are read when they are first used. Raises ConfigError, FormatError or WeightError.
        """
        return cls(ModelFolder.open(Path(model_dir), parts), dtype, lean, quantize)

    @property
    @abstractmethod
    def precision(self) -> str:
        """The dtype that the networks compute in, by name."""

    @property
    @abstractmethod
    def footprint(self) -> Footprint:
        """How it uses memory, as it is set now."""

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
    def predict(self, x: Any, sigma: float, conditioning: Any, copies: int = 1) -> Any:
        """The transformer's raw output for `copies` of x (B, C, h, w): (copies * B, C, h, w).

        `conditioning` is of copies * B captions.
        """

    @abstractmethod
    def to_backend(self, array: Array) -> Any:
        """A NumPy array as the backend's own, to hold the state of sampling."""

    @abstractmethod
    def settle(self, array: Any) -> Any:
        """The array, computed: a lazy backend does its work here."""

    @abstractmethod
    def encode(self, pixels: Array) -> Any:
        """Pixels (1, 3, H, W) in [-1, 1] -> latents (1, C, h, w)."""

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
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        latents: Any | None = None,
        output: str = "pil",
        progress: Progress = _silent,
        **options: Any,
    ) -> list[Any]:
        """A picture for each prompt: PIL images, (H, W, 3) float32 in 0..1, or (C, h, w) latents, by `output`.

        Picture i starts from seed + i; a list of seeds makes each prompt with each. `options` are the other fields of
        GenerateConfig. At most `batch_size` are denoised together, which costs memory and changes no picture. `loras`
        are pairs of file and scale. `latents` is the starting noise (N, C, h, w), instead of the seeds'. `progress` is
        called as each unit of a stage is done.
        Raises ConfigError for options out of bounds, DatasetError for an unreadable picture, FormatError or WeightError
        for LoRA files that do not fit.
        """
        requests = self.plan(configs(prompt, seed, **options), latents)
        made = self.generate(requests, batch_size=batch_size, loras=loras, output=output, progress=progress)
        return [picture for _, picture in made]

    def stream(
        self,
        prompt: str,
        *,
        loras: Sequence[LoRASource] = (),
        latents: Any | None = None,
        progress: Progress = _silent,
        **options: Any,
    ) -> Iterator[Step]:
        """Yields each step of making one picture, and may be left at any; `picture` shows it. Options as of a call."""
        requests, adapters = self.plan([GenerateConfig(prompt, **options)], latents), self.read_loras(loras)
        captions, starts = self._prepared(requests, progress)
        self.use_loras(adapters)
        yield from denoised(self, requests, captions, starts)
        self._done_with("transformer")

    def denoise(self, x: Any, captions: Sequence[Any], steps: int, guidance: float) -> Iterator[Any]:
        """Yields the latents (B, C, h, w) after each of `steps` Euler steps from the noise `x`.

        captions: features of B prompts; with guidance, B more of the negative ones.
        """
        return plain_steps(self, x, captions, steps, guidance)

    def picture(self, x: Any) -> Picture:
        """Latents (1, C, h, w) as a picture."""
        return to_picture(to_unit(self.decode(x)))

    def plan(self, configs: Sequence[GenerateConfig], latents: Any | None = None) -> list[Request]:
        """What there is to do for `configs`, as `jobs.plan`; `latents` (N, C, h, w) replaces the seeds' noise."""
        requests = plan(configs, self.folder)
        if latents is None:
            return requests
        noise, shape = np.asarray(latents, np.float32), (len(requests), *requests[0].noise.shape)
        if noise.shape != shape:
            raise ConfigError(f"latents have shape {noise.shape}, the request needs {shape}")
        return [replace(request, noise=own) for request, own in zip(requests, noise, strict=True)]

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        output: str = "pil",
        progress: Progress = _silent,
        watch: Watch = lambda batch, step: None,
    ) -> Iterator[tuple[Request, Any]]:
        """Yields each request with what was made of it, by `output`, as it is decoded.

        All prompts are encoded, then all latents denoised, then all pictures decoded: each network is loaded once.
        `watch` is shown every step of every batch. Raises as a call does, before any weights are read.
        """
        if output not in OUTPUTS:
            raise ConfigError(f"output {output!r} must be one of {', '.join(OUTPUTS)}")
        size = len(requests) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch size {size} must be at least 1")
        adapters = self.read_loras(loras)
        captions, starts = self._prepared(requests, progress)

        self.use_loras(adapters)
        latents, done = [], 0
        total = sum(len(batch[0].sigmas) - 1 for batch in batches(requests, size))
        for batch in batches(requests, size):
            for step in denoised(self, batch, captions, starts):
                watch(batch, step)
                done += 1
                progress("denoise", done, total)
            latents += [step.x[i : i + 1] for i in range(len(batch))]
        self._done_with("transformer")

        for request, x in _counted(list(zip(requests, latents, strict=True)), "decode", progress):
            yield request, self._finish(request, x, output)
        self._done_with("vae")

    def memory(self, requests: Sequence[Request], batch_size: int) -> list[Stage]:
        """An estimate of the memory that each stage of making `requests` takes."""
        sizes = {(r.width, r.height, r.guidance.scale > 0) for r in requests}
        return largest(
            generation(
                self.folder,
                self.precision,
                self.footprint,
                width=width,
                height=height,
                batch=min(batch_size, len(requests)),
                guided=guided,
                quantization=self.quantization,
                one_at_a_time=self.lean,
            )
            for width, height, guided in sizes
        )

    def memory_limit(self) -> int | None:
        """Bytes of memory that the pipeline can work in, None where nothing says."""
        return physical_memory()

    def _prepared(self, requests: Sequence[Request], progress: Progress) -> tuple[dict[str, Any], dict[int, Any]]:
        """Features of every text, and latents of every picture to start from (by its id), each made once."""
        if self.lean:  # what an interrupted run left
            self.release("transformer", "vae")
        guided = [request for request in requests if request.guidance.scale]
        texts = dict.fromkeys([r.config.prompt for r in requests] + [r.config.negative_prompt for r in guided])
        captions = {text: self.settle(self.encode_prompt(text)) for text in _counted(list(texts), "encode", progress)}
        self._done_with("text_encoder")
        pictures = {id(r.picture): r.picture for r in requests if r.picture is not None}
        return captions, {key: self.settle(self.encode(to_array(p)[None])) for key, p in pictures.items()}

    def _done_with(self, component: str) -> None:
        if self.lean:
            self.release(component)

    def _finish(self, request: Request, x: Any, output: str) -> Any:
        if output == "latents":
            return np.asarray(x[0], np.float32)
        pixels = to_unit(self.decode(x))  # (H, W, 3)
        if request.picture is not None and request.mask is not None:
            pixels = np.where(request.mask[..., None], pixels, np.asarray(request.picture, np.float32) / 255)
        return to_picture(pixels) if output == "pil" else pixels


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
