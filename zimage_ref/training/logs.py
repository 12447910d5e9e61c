"""Logs for other programs: TensorBoard and Weights & Biases. Each gets the figures of metrics.jsonl, and the previews.

A resumed run goes on in the same log. A log that the run did not have before begins with the lines of the steps that
are made already. To add a program, write a class like these, and name it in LOGS and LOG_NAMES.

Formats: tensorboard/compat/proto (event.proto, summary.proto); wandb's public functions `init` and `log`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeAlias

from zimage_ref.errors import BackendError, ConfigError, TrainingError, ZImageError
from zimage_ref.extras import optional_import
from zimage_ref.formats.files import atomic_write, sync
from zimage_ref.pictures.images import Picture, read_picture

from .check_options import LOG_NAMES
from .facts import RunFacts
from .metrics_lines import MetricsLine, figures, read_lines
from .run_folder import RunFolder

Figures: TypeAlias = Mapping[str, float]
Shown: TypeAlias = tuple[str, Path, Picture]  # the name of a picture in the log, its file, and what the file holds
_OFFLINE = "run `wandb login`, or set WANDB_MODE=offline to keep the log on this machine"


class Log(Protocol):
    """A log of another program."""

    begun: bool  # whether it held earlier steps of the run when it was opened
    notice: str  # for the user: the folder or the address that holds it

    def __init__(self, run: RunFolder, facts: RunFacts, done: int) -> None:
        """Opens the log of `run`, which has made `done` steps. Later steps that it holds will be made again."""

    @staticmethod
    def require() -> None:
        """Raises BackendError if a package is missing."""

    def write(self, step: int, values: Figures, picture: Shown | None) -> None:
        """Adds the figures of a step, and a picture with its name."""

    def close(self) -> None:
        """Writes everything to disk, or sends it."""


class TensorBoardLog:
    """A file of events in <run>/tensorboard. Each session of a run adds a file, as TensorBoard expects it."""

    def __init__(self, run: RunFolder, facts: RunFacts, done: int) -> None:
        self._folder = run.tensorboard
        self.begun = any(self._folder.glob("events.*"))
        self.notice = f"the log for TensorBoard is {self._folder}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events = _tensorboard("compat.proto.event_pb2")
        self._summaries = _tensorboard("compat.proto.summary_pb2")
        self._file = (self._folder / f"events.out.tfevents.{time.time_ns():020}.zimage").open("xb")
        self._records = _tensorboard("summary.writer.record_writer").RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        # TensorBoard then drops what it has of this step and later ones
        session = self._events.SessionLog
        self._add(done + 1 if self.begun else 0, session_log=session(status=session.START))

    @staticmethod
    def require() -> None:
        _tensorboard("summary.writer.record_writer")

    def write(self, step: int, values: Figures, picture: Shown | None) -> None:
        make = self._summaries.Summary
        found = [make.Value(tag=name, simple_value=value) for name, value in values.items()]
        if picture:
            name, path, shown = picture
            encoded = make.Image(
                width=shown.width, height=shown.height, colorspace=3, encoded_image_string=path.read_bytes()
            )
            found.append(make.Value(tag=name, image=encoded))
        self._add(step, summary=make(value=found))

    def close(self) -> None:
        with self._file:
            self._file.flush()
            sync(self._file.fileno())

    def _add(self, step: int, **content: object) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._file.flush()


class WandbLog:
    """A run of Weights & Biases, with its files in <run>/wandb. Its id is kept there, so that a resumed run finds it.

    wandb's own environment variables say which server and project get it, and whether it stays on this machine.
    """

    def __init__(self, run: RunFolder, facts: RunFacts, done: int) -> None:
        self._wandb = _wandb()
        file = run.wandb / "id.txt"
        self.begun = file.is_file()
        run_id = file.read_text(encoding="utf-8").strip() if self.begun else secrets.token_hex(8)
        file.parent.mkdir(parents=True, exist_ok=True)  # else wandb chooses another folder
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "zimage"), id=run_id, name=run.output.stem, dir=str(run.path),
                config={**facts["config"], "environment": facts["environment"]}, resume="allow",
                settings=self._wandb.Settings(console="off", silent=True, save_code=False),
            )  # fmt: skip
        except self._wandb.Error as error:
            raise TrainingError(f"`log` wandb: {_first_line(error)}: {_OFFLINE}") from error
        with atomic_write(file) as out:
            out.write(f"{run_id}\n".encode())
        self._run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back to a saved step
        self.notice = f"the log for Weights & Biases is {run.wandb if self._run.offline else self._run.url}"

    @staticmethod
    def require() -> None:
        wandb = _wandb()
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError(f"`log` wandb: nobody is logged in: {_OFFLINE}")

    def write(self, step: int, values: Figures, picture: Shown | None) -> None:
        shown = {picture[0]: self._wandb.Image(str(picture[1]))} if picture else {}
        try:
            self._run.log({"step": step, **values, **shown})
        except self._wandb.Error as error:
            raise BackendError(f"`log` wandb ends at step {step}, the run goes on: {_first_line(error)}") from error

    def close(self) -> None:
        with suppress(self._wandb.Error):
            self._run.finish()


LOGS: dict[str, type[Log]] = dict(zip(LOG_NAMES, (TensorBoardLog, WandbLog), strict=True))


class Logs:
    """All logs of a run."""

    def __init__(self, run: RunFolder, names: Sequence[str], facts: RunFacts, done: int) -> None:
        """names: in LOGS. Raises TrainingError if one cannot be opened."""
        self._run, self._logs = run, {name: LOGS[name](run, facts, done) for name in names}
        self.notices = [log.notice for log in self._logs.values()]
        for log in self._logs.values():
            for line in () if log.begun else read_lines(run):
                if line["step"] <= done:
                    self._add(log, line)

    def write(self, line: MetricsLine) -> list[str]:
        """Adds a line of metrics.jsonl to each log. Returns a notice for each log that fails, which then ends."""
        failed = {}
        for name, log in self._logs.items():
            try:
                self._add(log, line)
            except BackendError as error:
                failed[name] = str(error)
        for name in failed:
            self._logs.pop(name).close()
        return list(failed.values())

    def close(self) -> None:
        """Ends every log, even if one fails."""
        with ExitStack() as stack:
            for log in self._logs.values():
                stack.callback(log.close)

    def _add(self, log: Log, line: MetricsLine) -> None:
        picture = None
        if "preview" in line:
            path = self._run.path / line["preview"]
            with suppress(ZImageError):  # the file may be gone, or damaged, since an earlier session of the run
                picture = f"previews/{line['index']} {line['prompt']}", path, read_picture(path)
        if (values := figures(line)) or picture:
            log.write(line["step"], values, picture)


@contextmanager
def opened_logs(run: RunFolder, names: Sequence[str], facts: RunFacts, done: int) -> Iterator[Logs]:
    """The logs `names` of a run that has made `done` steps, until the block ends."""
    logs = Logs(run, names, facts, done)
    try:
        yield logs
    finally:
        logs.close()


def require_logs(names: Sequence[str]) -> None:
    """Raises BackendError if a log in `names` needs a package that is missing, or ConfigError if it needs a login."""
    for name in names:
        LOGS[name].require()


def _tensorboard(module: str) -> ModuleType:
    return optional_import(f"tensorboard.{module}", "`log` tensorboard needs the package tensorboard")


def _wandb() -> ModuleType:
    return optional_import("wandb", "`log` wandb needs the package wandb")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
