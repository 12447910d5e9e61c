"""Prompt to picture with any engine. The NumPy pipeline and the MLX pipeline share this code.

    plan        options -> requests: decides and checks everything before any weights are read
    generate    requests -> pictures: encodes all prompts, then denoises all latents, then decodes all pictures

Source: pipeline_z_image.py of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, overload

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import LoadedModel, Stage, generation_stages, largest
from zimage_ref.model.arrays import ArrayT
from zimage_ref.pictures.images import Picture, to_array, to_picture, to_unit
from zimage_ref.streaming import Mode

from .config import GenerateConfig, config_of
from .denoising import DenoisingStep, denoised, plain_steps
from .engine import ConditioningT, Engine
from .jobs import Request, configs_for, in_batches, plan_requests
from .loras import LoRACache, LoRASource

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

Output = Literal["pil", "array", "latents"]
StageProgress = Callable[[str, int, int], None]  # stage (encode, denoise, decode), units done, units in all
Watch = Callable[[range, DenoisingStep[ArrayT]], None]  # indices of a batch's requests, from 0, and its step
Item = TypeVar("Item")


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Does nothing."""


class Pipeline(Engine[ArrayT, ConditioningT]):
    """A Z-Image model that makes pictures. The methods of the engine compute; the methods here plan and call them.

    `output` selects the form of pictures: "pil", PIL images; "array", (H, W, 3) float32 in 0..1; "latents", (C, h, w)
    float32.
    """

    @cached_property
    def lora_cache(self) -> LoRACache:
        """The LoRA files that were read for this pipeline."""
        return LoRACache(self.folder.transformer)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | Path,
        dtype: str | None = None,
        lean: bool = False,
        quantize: int | None = None,
        parts: Mapping[str, Path | None] | None = None,
        stream: bool = False,
    ) -> Self:
        """Opens the model in `model_dir`, in any layout of `checkpoints.folder`, and checks all names and shapes.

        quantize: 4 or 8 bits, applied on loading. Weights that are stored quantized do not change.
        parts: files to use instead of those in the folder, by transformer, text_encoder, vae, tokenizer.
        stream: as `lean`, and blocks are read from the file when they are needed.
        Weights are read on their first use. Raises ConfigError, FormatError or WeightError.
        """
        return cls(ModelFolder.open(Path(model_dir), parts), dtype, lean, quantize, parts, stream)

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        latents: ArrayT | Array | None = None,
        output: Literal["pil"] = "pil",
        progress: StageProgress = ignore_progress,
        **options: object,
    ) -> list[Picture]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        latents: ArrayT | Array | None = None,
        output: Literal["array", "latents"],
        progress: StageProgress = ignore_progress,
        **options: object,
    ) -> list[Array]: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        latents: ArrayT | Array | None = None,
        output: Output = "pil",
        progress: StageProgress = ignore_progress,
        **options: object,
    ) -> Sequence[Picture | Array]:
        """A picture for each prompt.

        seed: picture i gets the seed `seed` + i. With a list of seeds, each prompt is made with each seed.
        batch_size: the most pictures to denoise together. It costs memory and changes no picture.
        loras: files, or pairs of file and scale. latents: starting noise (N, C, h, w) instead of that of the seeds.
        progress: is called after each unit of a stage. options: the other fields of GenerateConfig.
        Raises ConfigError for options out of bounds, DatasetError for an unreadable picture, FormatError or WeightError
        for LoRA files that do not fit.
        """
        requests = self.plan(configs_for(prompt, seed, options), latents)
        made = self.generate(requests, batch_size=batch_size, loras=loras, output=output, progress=progress)
        return [picture for _, picture in made]

    def stream(
        self,
        prompt: str,
        *,
        loras: Sequence[LoRASource] = (),
        latents: ArrayT | Array | None = None,
        progress: StageProgress = ignore_progress,
        **options: object,
    ) -> Iterator[DenoisingStep[ArrayT]]:
        """Yields the steps of making one picture. You may stop after any step; `picture` turns its latents into one.

        Arguments: see `__call__`.
        """
        requests = self.plan([config_of({"prompt": prompt, **options})], latents)
        adapters = self.read_loras(loras)
        with self.guarded():
            captions, (start,) = self._prepared(requests, progress)
            self.use_loras(adapters)
            yield from denoised(self, requests, captions, start)
            self._done_with("transformer")

    def denoise(self, x: ArrayT, captions: Sequence[ArrayT], steps: int, guidance: float) -> Iterator[ArrayT]:
        """Yields the latents (B, C, h, w) after each of `steps` Euler steps from the noise `x` (B, C, h, w).

        captions: features (T_i, cap_feat_dim) of B prompts; with guidance, B more of the negative ones.
        """
        return plain_steps(self, x, captions, steps, guidance)

    def picture(self, x: ArrayT) -> Picture:
        """Latents (1, C, h, w) as a picture."""
        return to_picture(to_unit(self.decode(x)))

    def read_loras(self, loras: Sequence[LoRASource]) -> list[tuple[LoRAFile, float]]:
        """The LoRA files of `loras` with their scales. See `LoRACache.read`."""
        return [(lora.content.file, lora.scale) for lora in self.lora_cache.read(loras)]

    def plan(self, configs: Sequence[GenerateConfig], latents: ArrayT | Array | None = None) -> list[Request]:
        """The requests for `configs`; see `plan_requests`. latents: (N, C, h, w), instead of the noise of the seeds."""
        requests = plan_requests(configs, self.folder)
        if latents is None:
            return requests
        noise, shape = np.asarray(latents, np.float32), (len(requests), *requests[0].noise.shape)
        if noise.shape != shape:
            raise ConfigError(f"latents have shape {noise.shape}, the request needs {shape}")
        return [replace(request, noise=own) for request, own in zip(requests, noise, strict=True)]

    @overload
    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        output: Literal["pil"] = "pil",
        progress: StageProgress = ignore_progress,
        watch: Watch[ArrayT] = lambda places, step: None,
    ) -> Iterator[tuple[Request, Picture]]: ...

    @overload
    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        output: Literal["array", "latents"],
        progress: StageProgress = ignore_progress,
        watch: Watch[ArrayT] = lambda places, step: None,
    ) -> Iterator[tuple[Request, Array]]: ...

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int | None = None,
        loras: Sequence[LoRASource] = (),
        output: Output = "pil",
        progress: StageProgress = ignore_progress,
        watch: Watch[ArrayT] = lambda places, step: None,
    ) -> Iterator[tuple[Request, Picture | Array]]:
        """Yields each request and its picture, in order. Each comes as soon as it is decoded.

        All prompts are encoded, then all latents denoised, then all pictures decoded, so each network is loaded once.
        watch: is called with every step of every batch. Raises the errors of `__call__`, before any weights are read.
        """
        if output not in get_args(Output):
            raise ConfigError(f"output {output!r} must be one of {', '.join(get_args(Output))}")
        size = len(requests) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch size {size} must be at least 1")
        adapters = self.read_loras(loras)
        with self.guarded():
            for place, made in enumerate(self._made(requests, size, adapters, output, progress, watch)):
                yield requests[place], made

    def memory(self, requests: Sequence[Request], batch_size: int, mode: Mode | None = None) -> list[Stage]:
        """The estimated memory of each stage of making `requests`. mode: None means the current one."""
        mode = mode or self.mode
        model, footprint = LoadedModel(self.folder, self.precision, self.quantization), self.footprint(mode)
        batch = min(batch_size, len(requests))
        sizes = {(r.width, r.height, r.guidance.scale > 0) for r in requests}
        return largest(
            generation_stages(model, footprint, (width, height), batch * (1 + guided), mode != "fast")
            for width, height, guided in sizes
        )

    def _made(
        self,
        requests: Sequence[Request],
        size: int,
        adapters: Sequence[tuple[LoRAFile, float]],
        output: Output,
        progress: StageProgress,
        watch: Watch[ArrayT],
    ) -> Iterator[Picture | Array]:
        """What `generate` makes of each request, in batches of at most `size`."""
        captions, starts = self._prepared(requests, progress)

        self.use_loras(adapters)
        latents: list[ArrayT] = []  # (1, C, h, w) each
        done, total = 0, sum(len(requests[places[0]].sigmas) - 1 for places in in_batches(requests, size))
        for places in in_batches(requests, size):
            batch = requests[places.start : places.stop]
            for step in denoised(self, batch, captions, starts[places[0]]):
                watch(places, step)
                done += 1
                progress("denoise", done, total)
            latents += [step.x[i : i + 1] for i in range(len(batch))]
        self._done_with("transformer")

        for request, x in _counted(list(zip(requests, latents, strict=True)), "decode", progress):
            yield self._finish(request, x, output)
        self._done_with("vae")

    def _prepared(
        self, requests: Sequence[Request], progress: StageProgress
    ) -> tuple[dict[str, ArrayT], list[ArrayT | None]]:
        """The features of every text, and for each request the latents of the picture that it starts from."""
        if self.lean:  # an interrupted run may have left it loaded
            self.release("transformer", "vae")
        guided = [request for request in requests if request.guidance.scale]
        texts = dict.fromkeys([r.config.prompt for r in requests] + [r.config.negative_prompt for r in guided])
        captions = {text: self.settle(self.encode_prompt(text)) for text in _counted(list(texts), "encode", progress)}
        self._done_with("text_encoder")
        return captions, self._starts(requests)

    def _starts(self, requests: Sequence[Request]) -> list[ArrayT | None]:
        """The latents (1, C, h, w) of the picture that each request starts from, or None. A picture is encoded once."""
        starts: list[ArrayT | None] = []
        before: Picture | None = None
        for request in requests:
            if request.picture is None:
                starts.append(None)
            elif request.picture is before:  # `plan_requests` reads a file once, so equal pictures are one object
                starts.append(starts[-1])
            else:
                starts.append(self.settle(self.encode(to_array(request.picture)[None])))
            before = request.picture
        return starts

    def _done_with(self, component: str) -> None:
        if self.lean:
            self.release(component)

    def _finish(self, request: Request, x: ArrayT, output: Output) -> Picture | Array:
        if output == "latents":
            latents: Array = np.asarray(x, np.float32)[0]
            return latents
        pixels = to_unit(self.decode(x))  # (H, W, 3)
        if request.picture is not None and request.mask is not None:
            pixels = np.where(request.mask[..., None], pixels, np.asarray(request.picture, np.float32) / 255)
        return to_picture(pixels) if output == "pil" else pixels


AnyPipeline = Pipeline[Any, Any]  # a pipeline of any engine


def _counted(items: Sequence[Item], stage: str, progress: StageProgress) -> Iterable[Item]:
    """Yields the items, and calls `progress` after the work on each."""
    for i, item in enumerate(items):
        yield item
        progress(stage, i + 1, len(items))
