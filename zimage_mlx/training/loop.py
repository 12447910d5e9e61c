"""The steps of a run on one machine, and what is due after each: see the drawing in `run`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.networks.weights import to_mlx
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.errors import TrainingError
from zimage_ref.training.batches import ItemBatch
from zimage_ref.training.events import Done, Encoded, Event, Notice, Saving, Started, Step, Stopped
from zimage_ref.training.facts import RunFacts
from zimage_ref.training.kinds import FULL
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.run_folder import RunFolder, SavedState

from .encode import EncodedDataset
from .feed import Feed
from .full import WholeLearner
from .held import on_disk
from .learner import Learner
from .learning import Learning, Outcome
from .machines import Machines
from .measure import Measurer
from .precision import resolve_base_precision
from .preview import Previewer
from .saver import Saver

_PATIENCE = 3  # steps in a row that may fail before the run is given up
_MEMORY = 0.98  # share of the smoothed loss that a step keeps
# from one save to the next, at most and about: a Mac may end a run at any time. A whole transformer takes longer
_SAVE_SECONDS = {False: 300.0, True: 1800.0}
_ABOUT = 0.1  # how far the memory of a resumed run may be from before, as a share
_USABLE = 0.7  # share of memory that the base, the LoRA and what the gradient keeps may fill; the rest is for a block
_LARGE = 10**9  # bytes, from which on saving is announced


clock = time.monotonic  # for saves by time; a test has its own


class Loop:
    """All parts that make the steps, put together when the loop is made."""

    def __init__(
        self,
        plan: TrainPlan,
        pipeline: ZImagePipeline,
        data: EncodedDataset,
        machines: Machines,
        facts: RunFacts,
        saved: SavedState | None,
    ) -> None:
        """Loads the base and puts a new LoRA beside it.

        facts: what the run is. saved: what the first machine will go on from. Raises ConfigError if it does not fit.
        """
        run = RunFolder(plan.config.output)
        if plan.config.kind == FULL and pipeline.mode == "stream":  # blocks are changed in a file
            weights = plan.model.weights
            weights["transformer"] = on_disk(weights["transformer"], pipeline.dtype, run.path)
        model, feed = pipeline.transformer, Feed(plan, data)
        self._plan, self._machines = plan, machines
        budget = _same_budget(_budget(plan, pipeline), saved)
        make = WholeLearner if plan.config.kind == FULL else Learner
        self._learner: Learning = make(plan, model, feed, machines.group, budget)
        if saved:
            self._learner.check(saved.tensors)
        tensors = plan.model.weights["transformer"]
        adapter = TrainingAdapter(
            model, plan.adapter, lambda name: to_mlx(tensors[name], pipeline.dtype), pipeline.block_stream
        )
        adapter.merge()
        previewer = Previewer(plan, pipeline, data, self._learner, adapter) if machines.first else None
        self._measurer = Measurer(plan, feed, self._learner, previewer)
        self._saver = Saver(plan, run, self._learner, facts, budget, pipeline.unpack)
        self._saved_at = clock()
        self.done, self._losses = 0, _Losses()  # steps that are made already, and how they went

    def prepare(self, done: int) -> Iterator[Encoded]:
        """Computes what needs the base as it is, for the steps after the first `done` ones."""
        return self._learner.prepare(done)

    def begin(self, facts: RunFacts, saved: SavedState | None) -> None:
        """Takes up what the first machine has in `saved`."""
        if saved := self._machines.told_by_first(saved, facts, self._learner.state()):
            self._learner.restore(saved.tensors)
            self.done, self._losses = saved.step, _Losses(saved.facts["smoothed"], saved.facts["failures"])
        self._saved_at = clock()
        mx.reset_peak_memory()

    def events(self) -> Iterator[Event]:
        """Every step that is left, what is due after it, and the end: Done or Stopped.

        Raises TrainingError if three steps in a row fail, after saving, or if the disk is full.
        """
        total, upcoming = self._plan.total, self._plan.batches.since(self.done)
        yield from () if self.done else map(Notice, self._learner.notices)
        yield Started(self.done, total)
        if not self.done:
            yield from self._measurer.due(0)
        for step in range(self.done + 1, total + 1):
            yield self._step(step, *next(upcoming))
            if self._losses.failures >= _PATIENCE:
                yield from self._save(step)
                raise self._not_finite(step)
            if step < total:
                yield from self._measurer.due(step)
                yield from self._save_if_due(step)
                if self._machines.asked_to_stop():
                    yield from self._save(step)
                    yield Stopped(step)
                    return
        yield from self._measurer.due(total)
        yield from self._save(total)
        if self._machines.first:
            yield self._saver.result(self._plan.config.output, total, Done)

    def _step(self, step: int, epoch: int, batches: Sequence[ItemBatch]) -> Step:
        """Makes step `step`, from 1, of `epoch`, from 0."""
        began = time.perf_counter()
        outcome = self._learner.step(step - 1, epoch, batches)
        self._losses.add(outcome)
        return Step(
            step=step,
            total=self._plan.total,
            epoch=epoch + 1,
            loss=outcome.loss,
            seconds=time.perf_counter() - began,
            smoothed=outcome.loss if self._losses.smoothed is None else self._losses.smoothed,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
            pictures=outcome.pictures,
            peak_memory=mx.get_peak_memory(),
            skipped=not outcome.finite,
        )

    def _save_if_due(self, step: int) -> Iterator[Event]:
        config = self._plan.config
        if config.save_every and step % config.save_every == 0:
            yield from self._save(step, RunFolder(config.output).result(step))
        elif step % config.resume_every == 0 or clock() - self._saved_at >= _SAVE_SECONDS[config.kind == FULL]:
            yield from self._save(step)

    def _save(self, step: int, result: Path | None = None) -> Iterator[Event]:
        """Writes the result to `result`, if that is given, and the resume folder. Only the first machine does."""
        if not self._machines.first:
            return
        if self._learner.file_bytes >= _LARGE:
            yield Saving(step, self._learner.file_bytes)
        if result:
            yield self._saver.result(result, step)
        yield self._saver.state(step, self._losses.smoothed, self._losses.failures)
        self._saved_at = clock()

    def _not_finite(self, step: int) -> TrainingError:
        run = RunFolder(self._plan.config.output)
        return TrainingError(
            f"step {step}: loss or gradient was not finite {_PATIENCE} times in a row: what was learned before "
            f"that is saved in {run.path}: try a lower `lr`, or `base_precision` bf16"
        )


@dataclass
class _Losses:
    """How the steps went so far."""

    smoothed: float | None = None  # the loss, None before the first finite one
    failures: int = 0  # steps in a row without a finite loss or gradient

    def add(self, outcome: Outcome) -> None:
        """Takes a step into account."""
        self.failures = 0 if outcome.finite else self.failures + 1
        if outcome.finite:
            previous = outcome.loss if self.smoothed is None else self.smoothed
            self.smoothed = _MEMORY * previous + (1 - _MEMORY) * outcome.loss


def _same_budget(budget: float, saved: SavedState | None) -> float:
    """The budget that the run was saved with, if the one that it would get now is about the same.

    A little more or less memory may be in use when a run is resumed. With the same budget, the same blocks keep what
    they make, and the same programs compute the steps. Another machine, or another `memory`, gets its own.
    """
    before = saved.facts.get("kept_bytes") if saved else None
    return before if before is not None and math.isclose(before, budget, rel_tol=_ABOUT) else budget


def _budget(plan: TrainPlan, pipeline: ZImagePipeline) -> float:
    """Bytes that the gradient may keep of the forward pass, now that the base is loaded."""
    limit = pipeline.memory_limit()
    if plan.config.memory == "fast" or limit is None:
        return math.inf
    if plan.config.memory == "lean" or pipeline.mode == "stream":
        return 0
    lora = plan.memory(*resolve_base_precision(plan.config), "lean")[-1].lora
    return max(0, _USABLE * limit - mx.get_active_memory() - lora)
