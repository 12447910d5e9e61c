"""The server without its interfaces: what all of them call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ZImageError
from zimage_ref.generation.presets import defaults_for
from zimage_serve.engines import Engines
from zimage_serve.refusals import INTERRUPTED, UnknownError
from zimage_serve.settings import ServeSettings
from zimage_serve.store.database import Row
from zimage_serve.store.names import checked_id, new_id
from zimage_serve.store.store import Store

from .checkpoints import CheckpointShelf
from .controls import ControlShelf
from .conversions import ConversionDesk
from .datasets import DatasetShelf
from .jobs import Job, State
from .maker import Maker
from .orders import OrderDesk, facts_of
from .queue import FairQueue
from .runs import RunDesk, RunSources
from .shelf import LoRAShelf
from .tasks import TaskDesk
from .worker import GRACE, Worker

_REMEMBERED = 200  # ended jobs that stay in memory; the database has all


class Studio:
    """Jobs, pictures, LoRAs, datasets and runs of one server."""

    def __init__(self, settings: ServeSettings, engines: Engines) -> None:
        """Opens the model's headers and the store. Raises ConfigError, FormatError or WeightError."""
        self.settings, self.engines = settings, engines
        self.model = ModelFolder.open(engines.model_dir, engines.parts)
        self.store = Store(settings.folder, settings.loras, settings.controls)
        self.loras = LoRAShelf(settings.loras, self.model.transformer)
        self.datasets = DatasetShelf(self.store.datasets)
        self.checkpoints = CheckpointShelf(self.store.checkpoints, self.model)
        self.tasks = TaskDesk()
        self.conversions = ConversionDesk(self.loras, self.checkpoints, self.tasks)
        self.controls = ControlShelf(settings.controls, self.model)
        self.desk = OrderDesk(
            self.model, settings, engines.defaults, self.store.upload_path, self.loras.path, self.controls.path
        )
        self._queue = FairQueue(settings.queue_size)
        self._maker = Maker(engines.open, settings, self.store)
        sources = RunSources(
            engines.model_dir, engines.parts, settings.loras, settings.folder / "cache", self.datasets.path,
            self.loras.path,
        )  # fmt: skip
        self.runs = RunDesk(engines.trainer, sources, self.store.database, self._queue.wake)
        self._worker = Worker(settings, self._queue, self._maker, self.runs)
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self.closing = threading.Event()

    def start(self) -> None:
        """Begins to work."""
        self._worker.start()

    def close(self) -> None:
        """Takes no more jobs, ends those that wait, and asks the worker to end. Returns at once."""
        if not self.closing.is_set():
            self.closing.set()
            for job in self._queue.close():
                self._give_up(job, State.FAILED, INTERRUPTED)
            self.tasks.close()
            self._worker.stop()

    def join(self) -> None:
        """Waits until the worker has saved what it must."""
        if self._worker.is_alive():
            self._worker.join(2 * GRACE)
        self.tasks.join(GRACE)
        self.store.close()

    def submit(self, asked: Mapping[str, object], client: str) -> Job:
        """Queues a job for the fields in `asked`. Raises the errors of `OrderDesk.order`, BusyError or ClosingError."""
        order = self.desk.order(asked)
        job = Job(new_id(), client, order, dict(asked))
        job.feed.tell("queued", {"id": job.id, "seeds": [config.seed for config in order.configs]})
        self.store.database.add_job(job.id, client, job.asked)
        with self._lock:
            self._jobs[job.id] = job
            ended = [id for id, each in self._jobs.items() if each.ended.is_set()]
            for id in ended[: max(0, len(ended) - _REMEMBERED)]:
                del self._jobs[id]
        try:
            self._queue.put(job)
        except ZImageError:
            with self._lock:
                del self._jobs[job.id]
            self.store.database.forget_job(job.id)
            raise
        return job

    def job(self, id: object) -> Job | None:
        """The job `id`, if it is in memory."""
        with self._lock:
            return self._jobs.get(checked_id(id, "job"))

    def job_facts(self, id: object) -> dict[str, object]:
        """The facts of the job `id`. Raises UnknownError."""
        job = self.job(id)
        if job is not None:
            return self._facts(job)
        row = self.store.database.job(checked_id(id, "job"))
        if row is None:
            raise UnknownError("job: there is no job with this id")
        return _kept_facts(row)

    def last_jobs(self, limit: int) -> list[dict[str, object]]:
        """The facts of the last `limit` jobs, the newest first."""
        rows = self.store.database.jobs(limit)
        return [self._facts(job) if (job := self.job(row["id"])) else _kept_facts(row) for row in rows]

    def _facts(self, job: Job) -> dict[str, object]:
        return {**job.facts(), "position": self._queue.position(job)}

    def cancel(self, id: object) -> None:
        """Cancels the job `id`: at once if it waits, after the step if it runs. Raises UnknownError."""
        job = self.job(id)
        if job is None:
            self.job_facts(id)
            return
        job.cancelled.set()
        if self._queue.remove(job):
            self._give_up(job, State.CANCELLED)

    def running(self) -> list[Job]:
        """The jobs in the making."""
        with self._lock:
            return [job for job in self._jobs.values() if job.state is State.RUNNING]

    def status(self) -> dict[str, object]:
        """Waiting and running jobs, the run that trains, whether the model is loaded."""
        run = self.runs.running
        return {
            "waiting": len(self._queue),
            "running": [job.id for job in self.running()],
            "training": run.facts() if run else None,
            "model_loaded": self._maker.loaded,
            "closing": self.closing.is_set(),
        }

    @property
    def usual_steps(self) -> int:
        """The denoising steps of a picture, if a client does not say."""
        return int(self._usual("steps"))

    @property
    def usual_guidance(self) -> float:
        """The guidance of a picture, if a client does not say."""
        return self._usual("guidance")

    def _usual(self, name: str) -> float:
        own = defaults_for(self.model.scheduler)
        return float(str(self.engines.defaults.get(name, getattr(own, name))))

    def model_facts(self) -> dict[str, object]:
        """The model, its defaults and the limits of this server."""
        limits = self.settings
        return {
            **facts_of(self.model),
            "backend": self.engines.backend,
            "defaults": {"steps": self.usual_steps, "guidance": self.usual_guidance, **self.engines.defaults},
            "limits": {
                "pixels": limits.max_pixels, "steps": limits.max_steps, "count": limits.max_count,
                "upload_mb": limits.max_upload_mb, "lora_mb": limits.max_lora_mb, "queue": limits.queue_size,
            },
        }  # fmt: skip

    def _give_up(self, job: Job, state: State, error: str | None = None) -> None:
        """Ends a job that did not begin."""
        self.store.database.end_job(job.id, state.value, error)
        job.end(state, error)


def _kept_facts(row: Row) -> dict[str, object]:
    """The facts of a job that is no longer in memory."""
    return {name: row[name] for name in ("id", "state", "created", "asked", "pictures", "error")}
