"""LoRA training: the loop, and what is saved when.

A run is a sequence of steps that each follow from the saved state before it, the options and the cached data alone.
So `resume` gives the same bytes as no interruption, wherever that came.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from zimage_mlx.device import number
from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.networks.weights import to_mlx
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError, TrainingError
from zimage_ref.formats.files import check_writable
from zimage_ref.model.flow import VALIDATION_SIGMAS
from zimage_ref.training.config import TrainConfig, free_options
from zimage_ref.training.dataset import Example
from zimage_ref.training.events import (
    Checkpointed,
    Done,
    Encoded,
    Event,
    Notice,
    Previewed,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
)
from zimage_ref.training.metrics import Metrics
from zimage_ref.training.plan import TURBO_WARNING, TrainPlan, changes, list_examples, make_plan
from zimage_ref.training.run_folder import RunFolder
from zimage_ref.training.run_folder import Saved as SavedState

from . import machines
from .encode import EncodedDataset
from .feed import Feed
from .learner import Learner
from .loss import flow_matching_loss
from .precision import base_precision
from .preview import Previewer
from .saver import Saver, environment

_PATIENCE = 3  # steps in a row that may fail before the run is given up
_MEMORY = 0.98  # of the smoothed loss
_USABLE = 0.7  # share of memory that the base, the LoRA and what the gradient keeps may fill; the rest is for a block


def train(config: TrainConfig, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Trains a LoRA and writes it, yielding an event for each thing done.

    Everything is checked before any weights are read. The text encoder and the autoencoder are freed before the
    transformer is loaded. `should_stop` is asked after each step: the run then saves, yields Stopped and ends. Under
    `mlx.launch` the machines share the work, and only the first writes and yields.
    Raises DatasetError, ConfigError, FormatError, WeightError or TrainingError.
    """
    group = mx.distributed.init()
    events = _Run(config, group, should_stop).events()
    with machines.losses():
        if group.rank() == 0:
            with RunFolder(config.output).locked():
                yield from events
        else:
            for _ in events:
                pass


def plan_of(config: TrainConfig, ranks: int = 1) -> Iterator[Encoded | TrainPlan]:
    """Checks options, pictures and headers, reading no weights: yields progress, and the plan at the end."""
    parts = list_examples(config)
    total, opened = sum(map(len, parts)), ([], [])  # type: tuple[int, tuple[list[Example], list[Example]]]
    for listed, examples in zip(parts, opened, strict=True):
        for picture, caption in listed:
            examples.append(Example.open(picture, caption))
            yield Encoded(sum(map(len, opened)), total, "pictures")
    yield make_plan(config, ModelFolder.open(config.model_dir, config.parts), *opened, ranks)


class _Run:
    """One call of `train` on one machine."""

    def __init__(self, config: TrainConfig, group: mx.distributed.Group, should_stop: Callable[[], bool]) -> None:
        self._config, self._group, self._should_stop = config, group, should_stop
        self._run = RunFolder(config.output)
        self._first = group.rank() == 0
        self._smoothed: float | None = None
        self._failures = 0  # steps in a row without a finite loss

    def events(self) -> Iterator[Event]:
        """The whole run."""
        config = self._config
        for event in plan_of(config, self._group.size()):
            if isinstance(event, TrainPlan):
                self._plan = event
            else:
                yield event
                if self._group.size() == 1 and self._should_stop():
                    yield Stopped(0)
                    return
        if self._plan.turbo and not config.training_adapter:
            yield Notice(TURBO_WARNING)
        self._facts = {**self._plan.facts(), "environment": environment()}
        if self._group.size() > 1:
            machines.agree(self._group, self._facts, free_options())
        saved, notices = self._earlier_run() if self._first else (None, [])
        yield from map(Notice, notices)

        dtype, how = base_precision(config)
        bits = how.bits if how else None
        self._pipeline = ZImagePipeline(self._plan.model, dtype, quantize=bits)
        self._plan.require_memory(dtype, how, self._pipeline.memory_limit())
        if self._first and not config.resume:
            self._run.clear()
        self._data = EncodedDataset(self._plan, ZImagePipeline(self._plan.model, dtype, lean=True, quantize=bits))
        for encoded in self._data.build(self._group.rank(), self._group.size()):
            yield encoded
            if self._asked_to_stop():
                yield Stopped(saved.step if saved else 0)
                return
        yield from self._recorded(self._prepare(saved))

    def _earlier_run(self) -> tuple[SavedState | None, list[str]]:
        """What to go on from, and what to say about it. Raises ConfigError where it does not fit this run."""
        config, run = self._config, self._run
        if not config.resume:
            if (step := run.unfinished()) and not config.overwrite:
                raise ConfigError(
                    f"{run.path}: holds a run that stopped at step {step}: `resume` goes on with it, "
                    f"`overwrite` starts anew"
                )
            if config.output.exists() and not config.overwrite:
                raise ConfigError(f"{config.output}: exists: give `overwrite` to replace it, or another `output`")
            check_writable(config.output)
            return None, []
        saved, notices = run.latest()
        if not saved:
            return None, [*notices, f"{run.path}: has nothing to resume yet: starting at the first step"]
        if different := changes(saved.facts, self._facts):
            text = f"{run.path}: the run that stopped at step {saved.step} was another: {'; '.join(different)}"
            if not config.resume_anyway:
                raise ConfigError(f"{text}: `resume_anyway` goes on all the same")
            notices.append(text)
        if saved.facts["environment"] != self._facts["environment"]:
            notices.append("the run began with other software or on another machine: results may differ in last digits")
        return saved, notices

    def _prepare(self, saved: SavedState | None) -> int:
        """Loads the base and puts the LoRA, fresh or saved, beside it. Returns the steps that are made already."""
        plan, pipeline, feed = self._plan, self._pipeline, Feed(self._plan, self._data)
        model, tensors = pipeline.transformer, plan.model.weights["transformer"]
        self._feed, self._learner = feed, Learner(plan, model, feed, self._group, self._budget())
        self._adapter = TrainingAdapter(model, plan.adapter, lambda name: to_mlx(tensors[name], pipeline.dtype))
        self._adapter.merge()
        self._saver = Saver(plan, self._run, self._learner, self._facts)
        self._previewer = Previewer(plan, pipeline, self._learner, self._adapter, self._run.previews)
        if self._group.size() > 1:
            saved = machines.told_by_first(self._group, saved, self._learner.state())
        if saved:
            self._learner.restore(saved.tensors)
            self._smoothed, self._failures = saved.facts["smoothed"], saved.facts["failures"]
        mx.reset_peak_memory()
        return saved.step if saved else 0

    def _budget(self) -> float:
        """Bytes that the gradient may keep of the forward pass, now that the base is loaded."""
        limit = self._pipeline.memory_limit()
        if self._config.memory == "fast" or limit is None:
            return math.inf
        if self._config.memory == "lean":
            return 0
        training = self._plan.memory(*base_precision(self._config), lean=True)[-1]
        return max(0, _USABLE * limit - mx.get_active_memory() - training.lora)

    def _recorded(self, done: int) -> Iterator[Event]:
        """The steps, their events written to metrics and report by the first machine."""
        if not self._first:
            yield from self._steps(done)
            return
        with self._run.room_for(0):
            metrics = Metrics(self._run, self._facts, environment(), done)
            try:
                for event in self._steps(done):
                    metrics.write(event)
                    if isinstance(event, Saved | Previewed | Checkpointed):
                        metrics.refresh()
                    yield event
            finally:
                metrics.close()

    def _steps(self, done: int) -> Iterator[Event]:
        """Everything from step `done` on."""
        total = self._plan.total
        yield Started(done, total)
        if not done:
            yield from self._measure(0)
        upcoming = self._plan.batches.since(done)
        for step in range(done + 1, total + 1):
            epoch, batches = next(upcoming)
            yield self._step(step, epoch, batches)
            if self._failures >= _PATIENCE:
                yield from self._save(step)
                raise TrainingError(
                    f"step {step}: loss or gradient was not finite {_PATIENCE} times in a row: the LoRA before that "
                    f"is saved in {self._run.path}: try a lower `lr`, or `base_precision` bf16"
                )
            yield from self._after(step)
            if step < total and self._asked_to_stop():
                yield from self._save(step)
                yield Stopped(step)
                return
        yield from self._finish(total)

    def _step(self, step: int, epoch: int, batches: list[list[int]]) -> Step:
        began = time.perf_counter()
        outcome = self._learner.step(step - 1, epoch, batches)
        self._failures = 0 if outcome.finite else self._failures + 1
        if outcome.finite:
            previous = outcome.loss if self._smoothed is None else self._smoothed
            self._smoothed = _MEMORY * previous + (1 - _MEMORY) * outcome.loss
        return Step(
            step, self._plan.total, epoch + 1, outcome.loss, time.perf_counter() - began,
            self._smoothed if self._smoothed is not None else outcome.loss, outcome.lr, outcome.grad_norm,
            outcome.pictures, mx.get_peak_memory(), skipped=not outcome.finite,
        )  # fmt: skip

    def _after(self, step: int) -> Iterator[Event]:
        """What is due after a step that is not the last."""
        config = self._config
        if step == self._plan.total:
            return
        if step % config.validation_every == 0 or step % config.preview_every == 0:
            yield from self._measure(step)
        if config.save_every and step % config.save_every == 0:
            yield from self._save(step, config.output.with_suffix(f".step{step}.safetensors"))
        elif step % config.resume_every == 0:
            yield from self._save(step)

    def _measure(self, step: int) -> Iterator[Event]:
        """Held-out loss and previews, those that are due at `step`; all of them at the first and the last."""
        config, edge = self._config, step in (0, self._plan.total)
        if self._plan.held_out and (edge or step % config.validation_every == 0):
            yield Validated(step, self._held_out_loss())
        if self._first and config.preview_prompt and (edge or step % config.preview_every == 0):
            yield from self._previewer.draw(step, self._data)

    def _held_out_loss(self) -> dict[float, float]:
        sums = dict.fromkeys(VALIDATION_SIGMAS, 0.0)
        with self._learner.result() as model:
            for index in range(len(self._plan.held_out)):
                for sigma, batch in self._feed.held_out(index):
                    loss = flow_matching_loss(model, batch)
                    sums[sigma] += number(loss)
        return {sigma: total / len(self._plan.held_out) for sigma, total in sums.items()}

    def _finish(self, total: int) -> Iterator[Event]:
        yield from self._measure(total)
        yield from self._save(total)
        if self._first:
            yield self._saver.lora(self._config.output, total, Done)

    def _save(self, step: int, lora: Path | None = None) -> Iterator[Event]:
        """Writes the LoRA to `lora`, where given, and the resume folder. Only the first machine does."""
        if not self._first:
            return
        if lora:
            yield self._saver.lora(lora, step)
        yield self._saver.state(step, {"smoothed": self._smoothed, "failures": self._failures})

    def _asked_to_stop(self) -> bool:
        """Whether any machine was asked to; all learn it at the same step."""
        asked = self._should_stop()
        if self._group.size() == 1:
            return asked
        return bool(mx.distributed.all_sum(mx.array(float(asked)), group=self._group).item())
