"""Prompt to picture with any engine. Source: pipeline_z_image.py of diffusers.

plan        options -> requests: decides and checks everything before any weights are read
generate    requests -> pictures: encodes all prompts, then denoises and decodes one batch after the other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from zimage_ref.bounds import RUN
from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.quantize import GROUP_SIZE
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.file import LoRAFile
from zimage_ref.memory import LoadedModel, Mode, Stage, generation_stages, largest
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.checks import checked_numbers
from zimage_ref.pictures.images import Picture, to_picture

from .caching import kept_values
from .config import GenerateConfig, config_of
from .denoising import DenoisingStep, plain_steps
from .engine import ConditioningT, Engine, Terms
from .jobs import Request, configs_for, in_batches, plan_requests
from .loras import LoRACache, LoRASource
from .passes import Output, Passes, decoded, done_with, units_of
from .starts import Start, starts_of
from .steering import all_texts, predictions_of

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

StageProgress = Callable[[str, int, int], None]  # stage (encode, denoise, decode), units done, units in all
Watch = Callable[[range, DenoisingStep[ArrayT]], None]  # indices of a batch's requests, from 0, and its step


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Does nothing."""


class Pipeline(Engine[ArrayT, ConditioningT]):
    """A Z-Image model that makes pictures. The methods of the engine compute; the methods here plan and call them.

    Several threads and open streams may share a pipeline. They take turns, and each keeps its own LoRAs. `output` is
    the form of pictures: "pil", PIL images; "array", (H, W, 3) float32 in 0..1; "latents", (C, h, w) float32.
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
        group_size: int = GROUP_SIZE,
        stream: bool = False,
    ) -> Self:
        """Opens the model in `model_dir`, in any layout of `checkpoints.folder`, and checks all names and shapes.

        quantize: 3, 4, 5, 6 or 8 bits, applied on loading. Weights that are stored quantized do not change.
        group_size: the weights that share one scale then: 32, 64 or 128. stream: as `lean`, but reads blocks at need.
        parts: files to use instead of those in the folder, by transformer, text_encoder, vae, tokenizer.
        Weights are read on their first use. Raises ConfigError, FormatError or WeightError.
        """
        return cls(ModelFolder.open(Path(model_dir), parts), dtype, lean, quantize, parts, group_size, stream)

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
        progress: is called after each unit of a stage. options: the other fields of GenerateConfig;
        control may be [(path, picture, scale)].
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
        return self._streamed(requests, Terms(self.mode, self.read_loras(loras)), progress)

    def _streamed(
        self, requests: Sequence[Request], terms: Terms, progress: StageProgress
    ) -> Iterator[DenoisingStep[ArrayT]]:
        captions, (start,) = self._prepared(requests, terms.lean, progress)
        for _, step in Passes(self, captions, terms, terms.lean).steps(requests, start):
            yield step
        done_with(self, "transformer", terms.lean)

    def denoise(self, x: ArrayT, captions: Sequence[ArrayT], steps: int, guidance: float) -> Iterator[ArrayT]:
        """Yields the latents (B, C, h, w) after each of `steps` Euler steps from the noise `x` (B, C, h, w).

        captions: features (T_i, cap_feat_dim) of B prompts; with guidance, B more of the negative ones. The LoRAs are
        those of the last `use_loras`: nothing else may use the pipeline until the last step.
        """
        return plain_steps(self, x, captions, steps, guidance)

    def picture(self, x: ArrayT) -> Picture:
        """Latents (1, C, h, w) as a picture. Raises ConfigError if they are not, or the picture is not finite."""
        return to_picture(decoded(self, x))

    def read_loras(self, loras: Sequence[LoRASource]) -> list[tuple[LoRAFile, float]]:
        """The LoRA files of `loras` with their scales. See `LoRACache.read`."""
        return [(lora.content.file, lora.scale) for lora in self.lora_cache.read(loras)]

    def plan(self, configs: Sequence[GenerateConfig], latents: ArrayT | Array | None = None) -> list[Request]:
        """The requests for `configs`; see `plan_requests`. latents: (N, C, h, w), instead of the noise of the seeds."""
        requests = plan_requests(configs, self.folder)
        if latents is None:
            return requests
        noise, shape = checked_numbers("latents", latents), (len(requests), *requests[0].shape)
        if noise.shape != shape:
            raise ConfigError(f"latents have shape {noise.shape}, the request needs {shape}")
        return [replace(request, given_noise=own) for request, own in zip(requests, noise, strict=True)]

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

        All prompts are encoded first. Then each batch is denoised and decoded, so that a stop keeps what is made.
        watch: is called with every step of every batch. Raises the errors of `__call__`, before any weights are read.
        """
        if output not in get_args(Output):
            raise ConfigError(f"output {output!r} must be one of {', '.join(get_args(Output))}")
        size = max(1, len(requests)) if batch_size is None else batch_size
        RUN["batch_size"].check("batch_size", size)
        terms = Terms(self.mode, self.read_loras(loras))
        return zip(requests, self._made(requests, size, terms, output, progress, watch), strict=True)

    def memory(self, requests: Sequence[Request], batch_size: int, mode: Mode | None = None) -> list[Stage]:
        """The estimated memory of each stage of making `requests`. mode: None means the current one."""
        mode, batch = mode or self.mode, min(batch_size, len(requests))
        footprint = self.footprint(mode)
        loads = {
            (tiles, predictions_of(each), kept_values(each, self.folder), 1 if each is request.second else batch,
             each.control.file if each.control else None)
            for request in requests for each in request.passes for tiles in (each.tiles,)
        }  # fmt: skip
        return largest(
            generation_stages(
                self._loaded_with(file), footprint, tiles.pixels(self.folder.vae.factor), count * predictions,
                mode != "fast", 0 if tiles.single else tiles.pixels_in_all(self.folder.vae.factor), count * kept,
            )
            for tiles, predictions, kept, count, file in loads
        )  # fmt: skip

    def _loaded_with(self, file: ControlFile | None) -> LoadedModel:
        return LoadedModel(file.beside(self.folder) if file else self.folder, self.precision, self.quantization)

    def _made(
        self,
        requests: Sequence[Request],
        size: int,
        terms: Terms,
        output: Output,
        progress: StageProgress,
        watch: Watch[ArrayT],
    ) -> Iterator[Picture | Array]:
        """What `generate` makes of each request, in batches of at most `size`."""
        captions, starts = self._prepared(requests, terms.lean, progress)
        batches = [(places, requests[places.start : places.stop]) for places in in_batches(requests, size)]
        apart = terms.lean and not self._fit_together(requests, size, terms.mode)  # then each batch loads all anew
        done, total = 0, sum(units_of(batch) for _, batch in batches)

        def unit_done() -> None:
            nonlocal done
            done += 1
            progress("denoise", done, total)

        passes = Passes(self, captions, terms, apart, unit_done)
        for places, batch in batches:
            latents: dict[int, ArrayT] = {}
            for those, step in passes.steps(batch, starts[places.start]):
                watch(places[those.start : those.stop], step)
                latents |= {i: step.x[n : n + 1] for n, i in enumerate(those)}
            done_with(self, "transformer", apart or (terms.lean and places.stop == len(requests)))
            for i, request in enumerate(batch):
                with self.turn():
                    made = passes.finished(request, latents[i], output)
                yield made
                progress("decode", places[i] + 1, len(requests))
            done_with(self, "vae", apart)
        done_with(self, "vae", terms.lean)

    def _fit_together(self, requests: Sequence[Request], size: int, mode: Mode) -> bool:
        """Whether transformer and autoencoder fit into memory together, while one of them computes."""
        limit, (_, denoise, decode) = self.memory_limit(), self.memory(requests, size, mode)
        return limit is None or max(denoise.total + decode.weights, decode.total + denoise.weights) <= limit

    def _prepared(
        self, requests: Sequence[Request], lean: bool, progress: StageProgress
    ) -> tuple[dict[str, ArrayT], list[Start[ArrayT]]]:
        """The features of every text, and for each request what was encoded of its pictures."""
        done_with(self, "transformer", lean)  # an interrupted run may have left both loaded
        done_with(self, "vae", lean)
        texts = all_texts(request.config for request in requests)
        captions = {}
        for i, text in enumerate(texts, start=1):
            captions[text] = self.encode_prompt(text)
            progress("encode", i, len(texts))
        done_with(self, "text_encoder", lean)
        return captions, starts_of(self, requests)


AnyPipeline = Pipeline[Any, Any]  # a pipeline of any engine
