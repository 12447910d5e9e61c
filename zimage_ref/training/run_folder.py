"""The folder <stem>.run/ that a training run keeps beside its output. Its files are always either complete or absent.

lock                     locked while a run is active
resume/step<N>/          lora, optimizer, ema: .safetensors; state.json with their checksums and the run's facts.
                         A run of the kind full saves its weights in place of a lora
metrics.jsonl            one line for each step, measurement or preview
report.html              the same for people
previews/                pictures
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zimage_ref.errors import FormatError, TrainingError, reason
from zimage_ref.formats import safetensors
from zimage_ref.formats.files import disk_is_full, sha256, sync
from zimage_ref.formats.json_file import read_json, write_json
from zimage_ref.formats.temporary import remove_stale
from zimage_ref.formats.tensors import Array, Tensors

from .dataset_files import RUN_SUFFIX
from .facts import SavedFacts, checked_facts

if sys.platform != "win32":
    import fcntl

_KEPT = 2  # resume folders: the latest, and the one before it in case the latest is damaged
_PARTS = {"lora.safetensors", "optimizer.safetensors"}  # every resume folder has these files
_WHOLE = {"weights.safetensors", "optimizer.safetensors"}  # or these
_MARGIN = 2**20  # bytes that a save needs in addition to its tensors


@dataclass(frozen=True)
class SavedState:
    """The content of a resume folder."""

    step: int
    facts: SavedFacts
    tensors: dict[str, dict[str, Array]]  # lora, optimizer, and ema if the run averages the LoRA; maybe mapped


class RunFolder:
    """The folder of the run that writes `output`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_suffix(RUN_SUFFIX)
        self.metrics, self.report = self.path / "metrics.jsonl", self.path / "report.html"
        self.previews, self._resume = self.path / "previews", self.path / "resume"

    def result(self, step: int) -> Path:
        """The name of the result as it is after `step`, before the end."""
        return self._with(f"step{step}")

    def results(self) -> dict[int, Path]:
        """The results of steps before the end that exist, by step."""
        before, after = self._with("step*").name.split("*")
        found = {}
        for path in self.output.parent.glob(f"{before}*{after}"):
            digits = path.name.removeprefix(before).removesuffix(after)
            if digits.isdecimal():
                found[int(digits)] = path
        return found

    def _with(self, step: str) -> Path:
        """The name of the output with `step` in it. A folder has no suffix, and gets none."""
        if not self.output.suffix:
            return self.output.with_name(f"{self.output.name}-{step}")
        return self.output.with_suffix(f".{step}{self.output.suffix}")

    def names(self, total: int) -> list[Path]:
        """The longest names that a run of `total` steps writes into this folder."""
        return [self._resume / f"step{total}" / "optimizer.safetensors", self.previews / f"step{total}-0.png"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run for this process. The system unlocks it when the process ends in any way.

        Raises TrainingError if another process has locked it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            if sys.platform != "win32":
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise TrainingError(
                        f"{self.output}: another run is writing it: wait for it or give another `output`"
                    ) from None
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Deletes incomplete files of a run that was killed."""
        for half in (*self._resume.glob(".step*.tmp"), *self._resume.glob(".step*.old")):
            shutil.rmtree(half)
        remove_stale(self.path, deep=True)
        remove_stale(self.output.parent)

    def save(self, step: int, tensors: Mapping[str, Tensors], facts: SavedFacts) -> Path:
        """Writes a resume folder, a tensor at a time, and deletes all except the last two.

        The folder gets its name after every byte is on disk. Raises TrainingError if the disk has too little room.
        """
        target = self._resume / f"step{step}"
        temporary = self._resume / f".step{step}.tmp"
        with self.room_for(sum(tensor.nbytes for part in tensors.values() for tensor in part.values())):
            remove_folder(temporary)
            temporary.mkdir(parents=True)
            digests = {}
            for name, part in tensors.items():
                file = temporary / f"{name}.safetensors"
                safetensors.write(file, part)
                digests[file.name] = sha256(file)
            write_json(temporary / "state.json", {"step": step, "files": digests, "facts": facts})
            _sync(temporary)
            remove_folder(target)
            temporary.rename(target)
            _sync(self._resume)
        for _, old in self._saves()[:-_KEPT]:
            remove_folder(old)
        return target

    def latest(self) -> tuple[SavedState | None, list[str]]:
        """The state in the last undamaged resume folder, and a notice for each damaged one after it."""
        faults: list[str] = []
        for step, folder in reversed(self._saves()):
            try:
                return _read_save(step, folder), faults
            except FormatError as error:
                faults.append(f"{folder}: cannot be used to resume: {error}")
        return None, faults

    def unfinished(self) -> int:
        """The step from which you can resume an interrupted run. 0 if there is no run, or if it is complete.

        A run is complete when all its steps are made and its LoRA was written after the last save.
        """
        saved, _ = self.latest()
        if not saved or (saved.step >= saved.facts["total"] and self._written_after(saved.step)):
            return 0
        return saved.step

    def _written_after(self, step: int) -> bool:
        state = self._resume / f"step{step}" / "state.json"
        return self.output.exists() and self.output.stat().st_mtime_ns >= state.stat().st_mtime_ns

    def clear(self) -> None:
        """Deletes the state, metrics and previews of an earlier run."""
        remove_folder(self._resume)
        remove_folder(self.previews)
        for file in (self.metrics, self.report):
            file.unlink(missing_ok=True)

    @contextmanager
    def room_for(self, nbytes: int) -> Iterator[None]:
        """A block that writes `nbytes`. Raises TrainingError, before or after it, if the disk has too little room."""
        needed = nbytes + _MARGIN
        self.path.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.path).free) < needed:
            raise self._full(needed, free)
        try:
            yield
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise self._full(needed, shutil.disk_usage(self.path).free) from error

    def _full(self, needed: int, free: int) -> TrainingError:
        step = self._saves()[-1][0] if self._saves() else 0
        return TrainingError(
            f"{self.path}: the disk is full: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free, "
            f"{max(needed - free, 0) / 1e6:,.1f} MB are missing: make room and go on with `resume`, from step {step}"
        )

    def _saves(self) -> list[tuple[int, Path]]:
        """(step, resume folder), the oldest first."""
        found = [(p.name.removeprefix("step"), p) for p in self._resume.glob("step*")]
        return sorted((int(step), folder) for step, folder in found if step.isdecimal())


def remove_folder(folder: Path) -> None:
    """Deletes `folder`. It is renamed first, so that its name never shows an incomplete folder.

    If it is a link, such as one to another disk, the link stays, and what is in the folder is deleted.
    """
    if folder.is_symlink():
        for inside in folder.iterdir():
            remove_folder(inside) if inside.is_dir() else inside.unlink()
        return
    with suppress(FileNotFoundError):
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _read_save(step: int, folder: Path) -> SavedState:
    """The state in `folder`. Raises FormatError if a part is missing, damaged or has another type."""
    state = read_json(folder / "state.json")
    facts, files = checked_facts(state.get("facts")), state.get("files")
    if not isinstance(files, dict) or not (files.keys() >= _PARTS or files.keys() >= _WHOLE):
        raise FormatError(f"its state.json must list the files {', '.join(sorted(_PARTS))}")
    tensors = {}
    try:
        for name, digest in files.items():
            file = folder / name
            if sha256(file) != digest:
                raise FormatError(f"{file}: is damaged: its checksum differs")
            stored, _ = safetensors.read(file)
            tensors[file.stem] = {key: tensor.read() for key, tensor in stored.items()}
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {reason(error)}") from error
    return SavedState(step, facts, tensors)


def _sync(folder: Path) -> None:
    """Writes the names in `folder` to disk, so that a power failure does not lose them."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)
