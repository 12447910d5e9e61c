"""Makes the pictures of jobs. It lives in the worker's thread, and so does the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zimage_ref.errors import ZImageError, reason
from zimage_ref.generation.pipeline import AnyPipeline
from zimage_ref.generation.run import GenerationRun, MadePicture, RunSettings
from zimage_ref.pictures.images import Picture, encoded
from zimage_serve.refusals import BUG, INTERRUPTED
from zimage_serve.settings import ServeSettings
from zimage_serve.store.store import Store

from .jobs import Job, State

log = logging.getLogger("zimage.serve")
_GATHERED = 4  # pictures that share one loading of the networks, if only one network is in memory at a time


class _NobodyWaitsError(Exception):
    """All jobs of the work were cancelled, or the server stops and its patience is over."""


@dataclass
class _Place:
    """A picture of the work: its job, and its place among the pictures of the job."""

    job: Job
    place: int


class Maker:
    """The model, and the making of pictures with it."""

    def __init__(self, open_model: Callable[[], AnyPipeline], settings: ServeSettings, store: Store) -> None:
        """open_model: opens the model; its weights are read when they are first used."""
        self._open, self._settings, self._store = open_model, settings, store
        self._run: GenerationRun | None = None
        self.deadline: float | None = None  # time.monotonic() after which work is given up

    @property
    def loaded(self) -> bool:
        """Whether the model is open."""
        return self._run is not None

    def unload(self) -> None:
        """Frees the memory of the model."""
        if self._run is not None:
            self._run.pipeline.release("text_encoder", "transformer", "vae")
            self._run = None

    @property
    def gathered(self) -> int:
        """The most pictures to make in one go."""
        lean = self._run is None or self._run.pipeline.lean
        return max(self._settings.batch_size, _GATHERED if lean else 1)

    def make(self, jobs: Sequence[Job]) -> float:
        """Makes the pictures of jobs with equal settings, and ends each job. Returns the seconds of a picture."""
        began, count = time.monotonic(), 0
        for job in jobs:
            if job.cancelled.is_set():
                self._end(job, State.CANCELLED)
            else:
                job.start()
                count += len(job.order.configs)
        self._attempt([job for job in jobs if not job.ended.is_set()])
        return (time.monotonic() - began) / max(1, count)

    def _attempt(self, jobs: Sequence[Job]) -> None:
        """Makes the pictures. An error of several jobs together becomes one of each that has it alone."""
        if not jobs:
            return
        try:
            self._produce(jobs)
        except _NobodyWaitsError:
            for job in jobs:
                stopped = None if job.cancelled.is_set() else INTERRUPTED
                self._end(job, State.FAILED if stopped else State.CANCELLED, stopped)
        except Exception as error:
            left = [job for job in jobs if not job.ended.is_set()]
            if len(jobs) > 1:
                for job in left:
                    self._drop(job)
                    self._attempt([job])
                return
            if not isinstance(error, (ZImageError, OSError)):
                log.exception("a job failed")
                self._run = None
            for job in left:
                self._end(job, State.FAILED, _said(error))

    def _produce(self, jobs: Sequence[Job]) -> None:
        order = jobs[0].order
        run = self._run or self._opened()
        self._run = run
        run.settings = replace(run.settings, preview_steps=order.preview_steps)
        run.use_loras(order.loras)
        places = [_Place(job, i) for job in jobs for i in range(len(job.order.configs))]
        configs = [job.order.configs[i] for job in jobs for i in range(len(job.order.configs))]
        requests = run.plan(configs, lambda text: _tell_all(jobs, "notice", {"text": text}))

        def progress(stage: str, done: int, total: int) -> None:
            if all(job.cancelled.is_set() for job in jobs) or self._late():
                raise _NobodyWaitsError
            _tell_all(jobs, "progress", {"stage": stage, "done": done, "total": total})

        def preview(index: int, picture: Picture) -> None:
            place = places[index]
            place.job.feed.tell("preview", {"place": place.place}, encoded(picture, "JPEG"))

        for made in run.make(requests, progress, preview):
            self._keep(places[made.index], made)

    def _keep(self, place: _Place, made: MadePicture) -> None:
        """Saves a picture. With the last one of a job, the job ends."""
        job = place.job
        if not job.cancelled.is_set():
            row = self._store.save(job.id, place.place, made.picture, made.record or {})
            job.pictures.append(row)
            job.feed.tell("picture", {"place": place.place, "seed": made.request.config.seed})
        if place.place == len(job.order.configs) - 1:
            self._end(job, State.CANCELLED if job.cancelled.is_set() else State.DONE)

    def _end(self, job: Job, state: State, error: str | None = None) -> None:
        """Ends a job: first on disk, then for its clients."""
        if job.ended.is_set():
            return
        if state is not State.DONE:
            self._drop(job)
        self._store.database.end_job(job.id, state.value, error, job.pictures)
        job.end(state, error)

    def _drop(self, job: Job) -> None:
        """Forgets the pictures that were made for a job."""
        self._store.discard(job.pictures)
        job.pictures.clear()

    def _opened(self) -> GenerationRun:
        settings = RunSettings(batch_size=self._settings.batch_size, memory=self._settings.memory, keep_model=True)
        return GenerationRun(self._open(), settings)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def _said(error: Exception) -> str:
    """The line about an error that the client gets."""
    if isinstance(error, OSError):
        return f"the picture cannot be saved: {reason(error)}"  # without the path of a file of this machine
    return str(error) if isinstance(error, ZImageError) else BUG


def _tell_all(jobs: Sequence[Job], kind: str, facts: dict[str, object]) -> None:
    for job in jobs:
        job.feed.tell(kind, facts)
