"""A run for pictures: what is decided and kept around a pipeline, for a command line, a server or a script.

    run = GenerationRun(pipeline, RunSettings(batch_size=2), loras=["fox.safetensors"])
    requests = run.plan([GenerateConfig("a fox", seed=seed) for seed in range(4)], notify=log.warning)
    for made in run.make(requests):
        save_picture(made.picture, Path(f"{made.index}.png"), made.record)

A run decides whether networks stay in memory, refuses what does not fit, warns of prompts that are cut, and writes down
how each picture was made. It prints nothing: it returns values, raises errors and calls what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

from zimage_ref.errors import ConfigError
from zimage_ref.memory import Stage, peak, require_memory
from zimage_ref.model.arrays import ArrayT
from zimage_ref.model.tokenizer import MAX_TOKENS
from zimage_ref.options import MEMORY, one_of
from zimage_ref.pictures.images import Picture
from zimage_ref.version import __version__

from .config import GenerateConfig
from .denoising import DenoisingStep
from .jobs import Request
from .loras import LoadedLoRA, LoRASource, with_scale
from .pipeline import AnyPipeline, StageProgress, ignore_progress
from .provenance import ModelChoice, Recorder, Repeat, identity

_SHOWN = 60  # characters of a prompt in a notice
Notify = Callable[[str], None]  # takes a line that the user should see
Preview = Callable[[int, Picture], None]  # takes a request's place, from 0, and its picture under way
PipelineT = TypeVar("PipelineT", bound=AnyPipeline)


@dataclass(frozen=True)
class RunSettings:
    """What is the same for all pictures of a run. Raises ConfigError for values out of bounds."""

    batch_size: int = 1  # pictures denoised together; changes none of them
    memory: str = MEMORY[0]  # one of MEMORY: one network at a time (lean), all (fast), or by `decide_memory_mode`
    keep_model: bool = False  # more pictures will be asked for: networks stay in memory if they fit
    force: bool = False  # go on if memory seems too small
    preview_steps: int = 0  # steps from one preview to the next, 0 for none
    metadata: bool = True  # make records

    def __post_init__(self) -> None:
        one_of("memory", self.memory, MEMORY)
        if self.batch_size < 1 or self.preview_steps < 0:
            raise ConfigError("`batch_size` must be at least 1 and `preview_steps` at least 0")


@dataclass(frozen=True)
class MadePicture:
    """A picture, and how it was made."""

    index: int  # the place of its request, from 0
    request: Request
    picture: Picture
    record: dict[str, object] | None  # for `save_picture`; None without `metadata`


def decide_memory_mode(
    settings: RunSettings, all_networks: Sequence[Stage], limit: int | None
) -> Literal["lean", "fast"]:
    """How a run uses memory: one network at a time (lean), or all (fast).

    all_networks: the memory that fast takes. limit: bytes that there are, None if nothing says.
    """
    if settings.memory == "auto":
        if not settings.keep_model:  # then no network is needed twice
            return "lean"
        return "fast" if limit is None or peak(all_networks).total <= limit else "lean"
    return "lean" if settings.memory == "lean" else "fast"


def open_pipeline(engine: type[PipelineT], asked: ModelChoice, recorded: ModelChoice | None = None) -> PipelineT:
    """The model that is asked for, as a pipeline of `engine`; what `asked` leaves open is as it was `recorded`.

    Raises ConfigError if no model is named, and as `Pipeline.from_pretrained`.
    """
    choice = asked.otherwise(recorded or ModelChoice(), engine.dtypes)
    if choice.model is None:
        raise ConfigError("`model_dir` must be given: a folder with the Z-Image model")
    return engine.from_pretrained(choice.model, choice.dtype, quantize=choice.quantize, parts=choice.parts)


class GenerationRun:
    """Pictures from one pipeline, planned and made as often as asked.

    Between two pictures, other LoRAs can be used. A LoRA is read and hashed once; it is read anew if its file changes.
    """

    def __init__(
        self, pipeline: AnyPipeline, settings: RunSettings = RunSettings(), loras: Sequence[LoRASource] = ()
    ) -> None:
        """loras: read when there is something to plan or to compare, not before."""
        self.pipeline, self.settings = pipeline, settings
        self.loras = [with_scale(source) for source in loras]

    @cached_property
    def facts(self) -> dict[str, object]:
        """What every record of this run says of the model and the engine."""
        pipe = self.pipeline
        bits = pipe.quantization.bits if pipe.quantization else None
        opened = ModelChoice(pipe.folder.path, pipe.backend, pipe.precision, bits, pipe.parts)
        return {**opened.facts(), **identity(pipe.folder), "version": __version__}

    def read_loras(self) -> list[LoadedLoRA]:
        """What the LoRAs in use hold. Raises FormatError, WeightError or ConfigError for one that cannot be used."""
        return self.pipeline.lora_cache.read(self.loras)

    def use_loras(self, loras: Sequence[LoRASource]) -> None:
        """Uses other LoRAs from here on. Raises as `read_loras`, and then keeps those in use."""
        self.pipeline.lora_cache.read(loras)
        self.loras = [with_scale(source) for source in loras]

    def changes(self, repeat: Repeat) -> list[str]:
        """A notice for each file that is not the one that the picture of `repeat` was made from.

        Raises FormatError for a file that cannot be read.
        """
        model = {name: str(self.facts[name]) for name in ("model", "model_fingerprint")}
        changed = repeat.changes(model, [lora.recorded for lora in self.read_loras()])
        return [f"{path}: is not what {repeat.source} was made from: the picture will differ" for path in changed]

    def plan(self, configs: Sequence[GenerateConfig], notify: Notify = lambda notice: None) -> list[Request]:
        """What to do for `configs`, checked as a whole before any weights are read.

        notify: is told of prompts that are cut. Raises ConfigError for what does not fit together, the model or
        memory, DatasetError for a picture that cannot be read, and as `read_loras`.
        """
        requests = self.pipeline.plan(configs)
        self.read_loras()
        for request in requests:
            request.config.check_guidance()
        for text in dict.fromkeys(t for config in configs for t in (config.prompt, config.negative_prompt)):
            # Tokenized once more when it is encoded: 2 ms for the longest, so ids need not be kept until then
            tokens = self.pipeline.tokenizer.count(text)
            if tokens > MAX_TOKENS:
                notify(f"prompt cut after {MAX_TOKENS} of {tokens} tokens: {text[:_SHOWN]}...")
        if not self.settings.force:
            stages = self._memory(requests, lean=self.memory_mode(requests) == "lean")
            require_memory(stages, self.pipeline.memory_limit())
        return requests

    def memory_mode(self, requests: Sequence[Request]) -> Literal["lean", "fast"]:
        """How `make` will use memory for `requests`; see `decide_memory_mode`."""
        return decide_memory_mode(self.settings, self._memory(requests, lean=False), self.pipeline.memory_limit())

    def make(
        self,
        requests: Sequence[Request],
        progress: StageProgress = ignore_progress,
        preview: Preview = lambda index, picture: None,
    ) -> Iterator[MadePicture]:
        """Yields the picture of each request in turn, as it is decoded. Sets the pipeline's `lean` by `memory_mode`.

        progress: as of `Pipeline.__call__`. preview: is shown each picture under way, every `preview_steps` steps.
        Raises FormatError for a picture or LoRA that cannot be read any more.
        """
        loras, pipe = self.read_loras(), self.pipeline
        records = self._records(requests, loras)
        pipe.set_lean(self.memory_mode(requests) == "lean")
        every = self.settings.preview_steps

        def watch(places: range, step: DenoisingStep[ArrayT]) -> None:
            if every and step.index % every == 0 and step.index < step.total:
                for i, place in enumerate(places):
                    preview(place, pipe.picture(step.x_0[i : i + 1]))

        made = pipe.generate(
            requests,
            batch_size=self.settings.batch_size,
            loras=[(lora.content.file, lora.scale) for lora in loras],
            progress=progress,
            watch=watch,
        )
        for index, (request, picture) in enumerate(made):
            yield MadePicture(index, request, picture, records[index])

    def _records(self, requests: Sequence[Request], loras: Sequence[LoadedLoRA]) -> list[dict[str, object] | None]:
        """The record of each request, made before the work: a file may change while it goes on."""
        if not self.settings.metadata:
            return [None] * len(requests)
        recorder = Recorder(self.facts, [lora.recorded for lora in loras])
        return [recorder.record(request.config) for request in requests]

    def _memory(self, requests: Sequence[Request], lean: bool) -> list[Stage]:
        return self.pipeline.memory(requests, self.settings.batch_size, lean)
