"""A run that makes pictures with one pipeline, for a command line, a server or a script.

    run = GenerationRun(pipeline, RunSettings(batch_size=2), loras=["fox.safetensors"])
    requests = run.plan([GenerateConfig("a fox", seed=seed) for seed in range(4)], notify=log.warning)
    for made in run.make(requests):
        save_picture(made.picture, Path(f"{made.index}.png"), made.record)

A run decides whether networks stay in memory, refuses pictures that need too much of it, warns of prompts that are cut,
and records how each picture was made. It prints nothing. It returns values, raises errors and calls your functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from zimage_ref.bounds import RUN, check_bounds
from zimage_ref.checkpoints.tiny_decoder import read_tiny_decoder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.quantize import GROUP_SIZE
from zimage_ref.formats.tensors import Array
from zimage_ref.memory import LoadedModel, Mode, Stage, require_memory, writing_stage
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.tokenizer import MAX_TOKENS
from zimage_ref.options import MEMORY, one_of
from zimage_ref.pictures.images import Picture
from zimage_ref.streaming import Choice, can_stream, choose, require_streamable
from zimage_ref.version import __version__

from .config import GenerateConfig
from .denoising import DenoisingStep
from .enhancing import check_can_write
from .jobs import Request
from .loras import LoadedLoRA, LoRASource, with_scale
from .pipeline import AnyPipeline, StageProgress, ignore_progress
from .previews import quick_picture, with_previews, with_tiny_decoder
from .provenance import ModelChoice, Recorder, Repeat, identity
from .steering import passes_of, prompts_of

_SHOWN = 60  # characters of a prompt in a notice
Notify = Callable[[str], None]  # takes a line that the user should see
Preview = Callable[[int, Picture], None]  # takes the index of a request, from 0, and its unfinished picture
PipelineT = TypeVar("PipelineT", bound=AnyPipeline)


@dataclass(frozen=True)
class RunSettings:
    """The settings for all pictures of a run. Raises ConfigError for values out of bounds."""

    batch_size: int = 1  # pictures denoised together; changes none of them
    memory: str = MEMORY[0]  # see `zimage_ref.streaming`; auto: `GenerationRun.memory` decides
    keep_model: bool = False  # more pictures will follow, so networks stay in memory if they fit
    force: bool = False  # go on even if memory seems too small
    preview_steps: int = 0  # steps from one preview to the next; 0: no previews
    metadata: bool = True  # whether to make records
    preview_decoder: Path | None = None  # file of TAEF1's decoder; None: the autoencoder makes previews
    enhance: bool = False  # whether `GenerationRun.enhanced` will be called, so that memory counts it

    def __post_init__(self) -> None:
        if self.preview_decoder is not None and not self.preview_steps:
            raise ConfigError("`preview_decoder` needs `preview_steps`")
        one_of("memory", self.memory, MEMORY)
        check_bounds(self, RUN)


@dataclass(frozen=True)
class MadePicture:
    """A picture and its record."""

    index: int  # the index of its request, from 0
    request: Request
    picture: Picture
    record: dict[str, object] | None  # for `save_picture`; None without `metadata`
    reused: float = 0.0  # the share of the passes that a step cache spared


def open_pipeline(engine: type[PipelineT], asked: ModelChoice, recorded: ModelChoice | None = None) -> PipelineT:
    """Opens the model `asked` as a pipeline of `engine`. Choices that `asked` leaves open come from `recorded`.

    Raises ConfigError if no model is named, and the errors of `Pipeline.from_pretrained`.
    """
    choice = asked.otherwise(recorded or ModelChoice(), engine.dtypes)
    if choice.model is None:
        raise ConfigError("`model_dir` must be given: a folder with the Z-Image model")
    return engine.from_pretrained(
        choice.model, choice.dtype, quantize=choice.quantize, parts=choice.parts,
        group_size=choice.group_size or GROUP_SIZE,
    )  # fmt: skip


class GenerationRun:
    """Plans and makes pictures with one pipeline, as often as you ask.

    You can change the LoRAs between two pictures, or give each request its own. A LoRA is read and hashed once, and
    again only if its file changes. Threads may share a run: each gets the pictures that it asked for.
    """

    def __init__(
        self, pipeline: AnyPipeline, settings: RunSettings = RunSettings(), loras: Sequence[LoRASource] = ()
    ) -> None:
        """loras: they are read when `plan` or `changes` first needs them."""
        self.pipeline, self.settings = pipeline, settings
        self.loras = [with_scale(source) for source in loras]

    @cached_property
    def facts(self) -> dict[str, object]:
        """The fields for the model and the engine in every record of this run."""
        pipe = self.pipeline
        how = pipe.quantization
        bits, group_size = (how.bits, how.group_size) if how else (None, None)
        opened = ModelChoice(pipe.folder.path, pipe.backend, pipe.precision, bits, pipe.parts, group_size)
        return {**opened.facts(), **identity(pipe.folder), "version": __version__}

    def read_loras(self, loras: Sequence[LoRASource] | None = None) -> list[LoadedLoRA]:
        """The LoRAs `loras`; None: those of the run. Raises FormatError, WeightError or ConfigError for a bad one."""
        return self.pipeline.lora_cache.read(self.loras if loras is None else loras)

    def use_loras(self, loras: Sequence[LoRASource]) -> None:
        """Uses other LoRAs from now on. If it raises (see `read_loras`), the earlier LoRAs stay in use."""
        self.pipeline.lora_cache.read(loras)
        self.loras = [with_scale(source) for source in loras]

    def changes(self, repeat: Repeat) -> list[str]:
        """A notice for each file that differs from the one that the picture of `repeat` was made from.

        Raises FormatError if a file cannot be read.
        """
        model = {name: str(self.facts[name]) for name in ("model", "model_fingerprint")}
        changed = repeat.changes(model, [lora.recorded for lora in self.read_loras()])
        return [
            f"{path}: is not the same as when {repeat.source} was made: the picture will differ" for path in changed
        ]

    def plan(
        self,
        configs: Sequence[GenerateConfig],
        notify: Notify = lambda notice: None,
        loras: Sequence[LoRASource] | None = None,
    ) -> list[Request]:
        """The requests for `configs`. All are checked before any weights are read.

        notify: is called with a notice for each prompt that is cut, and for each part of a picture that is not used.
        loras: as in `make`. Raises ConfigError if options do not fit each other, the model or memory, DatasetError if a
        picture cannot be read, and the errors of `read_loras`.
        """
        requests = self.pipeline.plan(configs)
        if self.settings.preview_decoder is not None:  # refuses a wrong file before the work
            read_tiny_decoder(self.settings.preview_decoder, self.pipeline.folder)
        adapters = self.read_loras(loras)
        for request in requests:
            request.config.check_guidance()
            if request.config.lora_scale != 1 and not adapters:
                raise ConfigError("`lora_scale` needs `lora`: there is no LoRA to scale")
        for text in dict.fromkeys(t for config in configs for t in (*prompts_of(config), config.negative_prompt)):
            # The prompt is tokenized again when it is encoded. This takes at most 2 ms, so the ids are not kept
            tokens = self.pipeline.tokenizer.count(text)
            if tokens > MAX_TOKENS:
                notify(f"prompt cut after {MAX_TOKENS} of {tokens} tokens: {text[:_SHOWN]}...")
        for remark in dict.fromkeys(text for request in requests for text in request.remarks):
            notify(remark)
        if not self.settings.force:
            require_memory(self._memory(requests, self.memory(requests).mode), self.pipeline.memory_limit())
        return requests

    def enhanced(
        self,
        configs: Sequence[GenerateConfig],
        system: str | None = None,
        progress: StageProgress = ignore_progress,
    ) -> list[GenerateConfig]:
        """`configs` with prompts that the text encoder writes from theirs, each by the seed of its picture.

        They are checked first, as in `plan`. The former prompts become `original_prompt`. Arguments: see
        `Engine.enhance`. Raises its errors too.
        """
        check_can_write(self.pipeline.folder)
        pipe, requests = self.pipeline, self.plan(configs)
        mode = self.memory(requests).mode
        if not self.settings.force:
            require_memory([self._writing(self._memory(requests, mode), mode)], pipe.memory_limit())
        texts: dict[tuple[str, int], str] = {}
        with pipe.turn():
            pipe.set_mode(mode)
            for key in dict.fromkeys(map(_idea, configs)):
                texts[key] = pipe.enhance(*key, system, lambda done, most: progress("enhance", done, most))
        return [replace(c, prompt=texts[_idea(c)], original_prompt=_idea(c)[0]) for c in configs]

    def memory(self, requests: Sequence[Request]) -> Choice:
        """The memory mode that `make` will use for `requests`, and why.

        Raises ConfigError if the mode stream is asked for and the model's files do not allow it.
        """
        pipe, asked = self.pipeline, self.settings.memory
        streams = not pipe.footprint("stream").mapped  # weights that are mapped are streamed in any mode
        if asked == "stream" and streams:
            require_streamable(pipe.folder)
        modes: list[Mode] = ["fast", "lean"] if self.settings.keep_model else ["lean"]  # else nothing is used twice
        if streams and can_stream(pipe.folder):
            modes.append("stream")
        first = requests[0]
        return choose(
            asked,
            {mode: self._memory(requests, mode) for mode in modes},
            pipe.memory_limit(),
            lambda mode: self.seconds(first, mode),
        )

    def seconds(self, request: Request, mode: Mode) -> float | None:
        """The seconds of a picture in `mode` by measurements of this machine. None if they are not known."""
        total = 0.0
        for each in request.passes:
            width, height = each.tiles.pixels(self.pipeline.folder.vae.factor)
            one = self.pipeline.measured_seconds(mode, width * height, passes_of(each))
            if one is None:
                return None
            total += one
        return total

    def make(
        self,
        requests: Sequence[Request],
        progress: StageProgress = ignore_progress,
        preview: Preview = lambda index, picture: None,
        loras: Sequence[LoRASource] | None = None,
    ) -> Iterator[MadePicture]:
        """Yields the picture of each request, in order, as soon as it is decoded. Sets the mode that `memory` chooses.

        progress: as in `Pipeline.__call__`. preview: takes each unfinished picture every `preview_steps` steps.
        loras: those of these requests; None: those of the run. All that is set when you call this stays so until the
        last picture. Raises FormatError if a picture or LoRA is no longer readable.
        """
        adapters, pipe, decoder = self.read_loras(loras), self.pipeline, self._preview_decoder()
        records = self._records(requests, adapters)
        every = self.settings.preview_steps
        spared: dict[int, list[tuple[int, float]]] = {}  # of each picture: the steps of its passes, and shares

        def watch(places: range, step: DenoisingStep[ArrayT]) -> None:
            for place in places:
                passes = spared.setdefault(place, [])
                passes[-1 if step.index > 1 else len(passes) :] = [(step.total, step.reused)]
            if every and step.index % every == 0 and step.index < step.total:
                for i, place in enumerate(places):
                    preview(place, quick_picture(pipe, step.x_0[i : i + 1], decoder))

        with pipe.turn():  # no other thread may change the mode before `generate` has read it
            pipe.set_mode(self.memory(requests).mode)
            made = pipe.generate(
                requests,
                batch_size=self.settings.batch_size,
                loras=[(lora.content.file, lora.scale) for lora in adapters],
                progress=progress,
                watch=watch,
            )
        return (
            MadePicture(i, request, picture, records[i], _mean(spared.get(i, [])))
            for i, (request, picture) in enumerate(made)
        )

    def _preview_decoder(self) -> Callable[[Any], Array] | None:
        file = self.settings.preview_decoder
        return self.pipeline.tiny_decoder(read_tiny_decoder(file, self.pipeline.folder)) if file else None

    def _records(self, requests: Sequence[Request], loras: Sequence[LoadedLoRA]) -> list[dict[str, object] | None]:
        """The record of each request. They are made before the work, because a file may change during the work."""
        if not self.settings.metadata:
            return [None] * len(requests)
        recorder = Recorder(self.facts, [lora.recorded for lora in loras])
        return [recorder.record(request.config, request.digests) for request in requests]

    def _memory(self, requests: Sequence[Request], mode: Mode) -> list[Stage]:
        pipe, settings = self.pipeline, self.settings
        stages = pipe.memory(requests, settings.batch_size, mode)
        width, height = max(((r.width, r.height) for r in requests), key=lambda size: size[0] * size[1])
        if settings.preview_decoder is not None:
            stages = with_tiny_decoder(stages, width * height)
        elif settings.preview_steps:
            stages = with_previews(stages, self._loaded, pipe.footprint(mode), (width, height), mode)
        return [*stages, self._writing(stages, mode)] if settings.enhance else stages

    def _writing(self, stages: Sequence[Stage], mode: Mode) -> Stage:
        """The memory of writing a prompt. stages: of the pictures; the first is that of encoding."""
        return writing_stage(self._loaded, self.pipeline.footprint(mode), stages[0].weights, 2 * MAX_TOKENS)

    @property
    def _loaded(self) -> LoadedModel:
        return LoadedModel(self.pipeline.folder, self.pipeline.precision, self.pipeline.quantization)


def _idea(config: GenerateConfig) -> tuple[str, int]:
    """The prompt of the user, and the seed."""
    return config.original_prompt or config.prompt, config.seed


def _mean(shares: Sequence[tuple[int, float]]) -> float:
    """The mean of shares, each with its weight."""
    return sum(weight * share for weight, share in shares) / max(sum(weight for weight, _ in shares), 1)
