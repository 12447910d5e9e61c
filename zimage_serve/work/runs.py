"""Training runs: planned, started, stopped and resumed by clients; trained in the worker's thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_type_hints

from zimage_ref.errors import ZImageError
from zimage_ref.options_file import to_json, typed
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.dataset_options import REGULARIZATION, DatasetOptions
from zimage_ref.training.events import Done, Encoded, Event, Notice, Previewed, Saved, Started, Step, Stopped, Validated
from zimage_ref.training.kinds import FULL
from zimage_ref.training.metrics_lines import line_of, read_lines, step_lines
from zimage_ref.training.run_folder import RunFolder
from zimage_serve.engines import Trainer
from zimage_serve.refusals import BUG, ConflictError, RefusedError, UnknownError
from zimage_serve.store.database import Database, Row
from zimage_serve.store.names import checked_name, new_id

from .feed import Feed
from .plan_facts import checked_plan, pixel_seconds, plan_facts
from .presets import presets

log = logging.getLogger("zimage.serve")
ENDED = ("done", "failed", "stopped")
# Options of `zimage train` that name files, or overwrite them: here the server decides them
NOT_ASKED = {
    "model_dir", "dataset", "datasets", "output", "cache", "transformer", "text_encoder", "vae", "tokenizer",
    "training_adapter", "init_lora", "resume", "resume_anyway", "overwrite", "force",
    "master_weights",
}  # fmt: skip
MASKS_HERE = ("none", "file")  # pictures are kept without their alpha
BY_NAME = ("training_adapter", "init_lora")  # of these, clients give the name of a LoRA


@dataclass(frozen=True)
class RunSources:
    """Where the files of runs are found: only by name."""

    model: Path
    parts: Mapping[str, Path]
    loras: Path  # results go here, so that pictures can use them at once
    cache: Path
    find_dataset: Callable[[object], Path]
    find_lora: Callable[[object], Path]


@dataclass(eq=False)
class Run:
    """One training run. Only the worker changes it after its start."""

    id: str
    name: str
    config: TrainConfig
    state: str = "queued"  # queued, running, paused, or one of ENDED
    step: int = 0
    total: int = 0
    error: str | None = None
    feed: Feed = field(default_factory=Feed)
    stop_asked: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> RunFolder:
        """Its files: metrics, previews, states to resume from."""
        return RunFolder(self.config.output)

    def facts(self) -> dict[str, object]:
        """What clients see."""
        steps = sorted(self.config.output.parent.glob(f"{self.name}.step*.safetensors"))
        return {
            "id": self.id, "name": self.name, "state": self.state, "step": self.step, "total": self.total,
            "error": self.error, "can_resume": self.state in ("stopped", "failed"), "options": _shown(self.config),
            "lora": self.config.output.name if self.state == "done" else None,
            "checkpoints": [path.name for path in steps],
        }  # fmt: skip


class RunDesk:
    """All runs of a server."""

    def __init__(self, trainer: Trainer, sources: RunSources, database: Database, wake: Callable[[], None]) -> None:
        """Finds the runs in `database`. Those that were not over when the server ended can be resumed."""
        self._trainer, self._sources, self._database, self._wake = trainer, sources, database, wake
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        for row in reversed(database.runs()):
            run = self._restored(row)
            self._runs[run.id] = run

    def _restored(self, row: Row) -> Run:
        hints = get_type_hints(TrainConfig)
        config = TrainConfig(**{name: typed(value, hints[name], name) for name, value in row["config"].items()})
        run = Run(row["id"], row["name"], config, row["state"], row["step"], row["total"], row["error"])
        if run.state not in ENDED:
            run.state = "stopped"
            self._keep(run)
        run.feed.tell(run.state, {}, last=True)
        return run

    def config(self, asked: Mapping[str, object]) -> tuple[str, TrainConfig]:
        """The name and the options of a run: `name`, those of `_datasets` and BY_NAME, other fields of TrainConfig.

        Raises RefusedError, UnknownError or ConfigError.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        name = checked_name(given.pop("name", None), "`name` of the LoRA").removesuffix(".safetensors")
        sources, hints = self._sources, get_type_hints(TrainConfig)
        options: dict[str, object] = {
            "model_dir": sources.model, **self._datasets(given),
            "output": sources.loras / f"{name}.safetensors", "cache": sources.cache, **sources.parts,
        }  # fmt: skip
        for field_name in BY_NAME:
            if field_name in given:
                options[field_name] = sources.find_lora(given.pop(field_name))
        for field_name, value in given.items():
            if field_name not in hints or field_name in NOT_ASKED:
                raise RefusedError(f"`{field_name}` is not an option of a run here")
            options[field_name] = typed(value, hints[field_name], f"`{field_name}`")
        if options.get("kind") == FULL:
            raise RefusedError("`kind` full writes a whole transformer, not a LoRA: use zimage train for it")
        if options.get("mask", MASKS_HERE[0]) not in MASKS_HERE:
            raise RefusedError(f"`mask` {options['mask']}: pictures of this server have masks beside them: give file")
        if options.get("validation"):
            _check_share(options["validation"])
        return name, TrainConfig(**options)  # type: ignore[arg-type]

    def _datasets(self, given: dict[str, object]) -> dict[str, object]:
        """Takes `dataset` and `regularization`, names of datasets, out of `given`. Returns them as options of a run."""
        names = [given.pop("dataset", None), given.pop("regularization", None)]
        folders = [self._sources.find_dataset(name) for name in names[: 1 if names[1] is None else 2]]
        if len(folders) == 1:
            return {"dataset": folders[0]}
        return {"datasets": (DatasetOptions(folder=folders[0]), DatasetOptions(folder=folders[1], kind=REGULARIZATION))}

    def plan(self, asked: Mapping[str, object]) -> dict[str, object]:
        """What a run would do: crops, steps, memory, time, warnings. Nothing is started and no weights are read."""
        _, config = self.config(asked)
        return plan_facts(config, self._trainer, self._rate())

    def presets(self, own: Mapping[str, object]) -> list[dict[str, object]]:
        """Sets of options to begin with. own: those for the model of this server."""
        return presets(own)

    def _rate(self) -> float | None:
        """Seconds of a pixel in the last run that was measured."""
        rates = (pixel_seconds(step_lines(read_lines(run.folder)), run.config) for run in self.all())
        return next((rate for rate in rates if rate is not None), None)

    def start(self, asked: Mapping[str, object]) -> Run:
        """Queues a new run. Raises ConflictError if its LoRA exists, and the errors of `plan`."""
        name, config = self.config(asked)
        self._trainer.precision(config)  # raises if nothing can train here
        checked_plan(config)
        with self._lock:
            taken = config.output.exists() or any(run.name == name for run in self._runs.values())
            if taken:
                raise ConflictError(f"{name}: there is a LoRA or a run with this name: give another `name`")
            run = Run(new_id(), name, config)
            self._database.add_run(run.id, name, to_json(config))
            self._runs[run.id] = run
        self._wake()
        return run

    def find(self, id: str) -> Run:
        """The run `id`. Raises UnknownError."""
        with self._lock:
            if id not in self._runs:
                raise UnknownError("run: there is no run with this id")
            return self._runs[id]

    def all(self) -> list[Run]:
        """All runs, the newest first."""
        with self._lock:
            return list(reversed(self._runs.values()))

    def stop(self, id: str) -> Run:
        """Asks a run to save its state and end. Raises UnknownError, or ConflictError if it has ended."""
        run = self.find(id)
        with self._lock:
            if run.state in ENDED:
                raise ConflictError(f"{run.name}: the run has ended already")
            run.stop_asked.set()
            if run.state != "running":
                self._end(run, "stopped")
        return run

    def resume(self, id: str) -> Run:
        """Queues a run again that was stopped. Raises UnknownError, or ConflictError if it cannot go on."""
        run = self.find(id)
        with self._lock:
            if run.state not in ("stopped", "failed"):
                raise ConflictError(f"{run.name}: the run is {run.state}: only a stopped run can be resumed")
            run.stop_asked.clear()
            run.state, run.error, run.feed = "queued", None, Feed()
            run.config = replace(run.config, resume=True)
            self._keep(run)
        self._wake()
        return run

    def next(self) -> Run | None:
        """The run to train now: the oldest that waits or is paused."""
        with self._lock:
            return next((run for run in self._runs.values() if run.state in ("queued", "paused")), None)

    @property
    def running(self) -> Run | None:
        """The run that is trained now, or is paused for pictures."""
        with self._lock:
            return next((run for run in self._runs.values() if run.state in ("running", "paused")), None)

    def close(self) -> None:
        """Ends the streams of all runs: the server stops. A restart can resume them."""
        for run in self.all():
            run.feed.tell("closing", {"step": run.step, "total": run.total}, last=True)

    def work(self, run: Run, pause: Callable[[], bool]) -> None:
        """Trains until the run ends, or until `pause` says after a step that others need the model: then it saves."""
        with self._lock:
            if run.state in ENDED:
                return
            run.state = "running"
            self._keep(run)
        run.feed.tell("running", {"step": run.step, "total": run.total})
        try:
            for event in self._trainer.train(run.config, lambda: run.stop_asked.is_set() or pause()):
                self._tell(run, event)
        except ZImageError as error:
            self._end(run, "failed", str(error))
        except Exception:
            log.exception("a training run failed")
            self._end(run, "failed", BUG)

    def _tell(self, run: Run, event: Event) -> None:
        """Passes an event of the trainer on to clients, and notes what must survive a restart."""
        match event:
            case Step():
                run.step, run.total = event.step, event.total
                run.feed.tell("step", dict(line_of(event, run.folder) or {}))
            case Validated() | Previewed():
                kind = "held_out" if isinstance(event, Validated) else "preview"
                run.feed.tell(kind, dict(line_of(event, run.folder) or {}))
            case Started(step, total):
                run.step, run.total = step, total
                run.config = replace(run.config, resume=True)  # from now on there is something to go on with
                self._keep(run)
                run.feed.tell("begun", {"step": step, "total": total})
            case Encoded(done, total, what):
                run.feed.tell("prepared", {"what": what, "done": done, "total": total})
            case Notice(text):
                run.feed.tell("notice", {"text": text})
            case Done():
                self._end(run, "done")
            case Saved(path, step):
                run.feed.tell("saved", {"lora": path.name, "step": step})
            case Stopped():
                if run.stop_asked.is_set():
                    self._end(run, "stopped")
                else:
                    run.state = "paused"
                    self._keep(run)
                    run.feed.tell("paused", {"step": run.step, "total": run.total})

    def _end(self, run: Run, state: str, error: str | None = None) -> None:
        run.state, run.error = state, error
        self._keep(run)
        run.feed.tell(state, run.facts(), last=True)

    def _keep(self, run: Run) -> None:
        self._database.update_run(run.id, run.state, run.step, run.total, run.error)


def measurements(run: Run) -> list[dict[str, object]]:
    """Every line of the metrics of a run: steps, held-out losses, previews."""
    return [dict(line) for line in read_lines(run.folder)]


def _shown(config: TrainConfig) -> dict[str, object]:
    """The options of a run without the paths of this machine."""
    values = to_json(config)
    names = [each.name for each in fields(TrainConfig) if each.name not in NOT_ASKED]
    files = {name: getattr(config, name) for name in BY_NAME}
    loras = {name: file.name if file else None for name, file in files.items()}
    others = [each.folder.name for each in config.sets[1:]]
    sets = {"dataset": config.sets[0].folder.name, "regularization": others[0] if others else None}
    return {**sets, **loras, **{name: values[name] for name in names}}


def _check_share(validation: object) -> None:
    """Refuses a folder: a request names no paths."""
    try:
        share = float(str(validation))
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise RefusedError("`validation` is a share here, such as 0.1")
