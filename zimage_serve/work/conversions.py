"""New LoRAs and checkpoints made of others: checked at once, made by a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zimage_ref.checkpoints.convert import Target, open_source, write_model
from zimage_ref.checkpoints.identify import identify
from zimage_ref.checkpoints.registry import COMPONENTS
from zimage_ref.checkpoints.transformer import TRANSFORMER
from zimage_ref.errors import ZImageError, listing
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.quantize import BITS, GROUP_SIZE, GROUP_SIZES, Quantization
from zimage_ref.lora.file import LoRAFile
from zimage_ref.lora.merge import merge_loras
from zimage_ref.lora.spellings import DEFAULT_NAMING, lora_namings
from zimage_ref.lora.sums import write_sum
from zimage_ref.options import one_of
from zimage_ref.options_file import typed
from zimage_serve.refusals import ConflictError, RefusedError

from .checkpoints import OWN, CheckpointShelf
from .file_facts import without_folder
from .file_shelf import FileShelf
from .orders import scaled_loras
from .shelf import LoRAShelf
from .tasks import Progress, Task, TaskDesk

DTYPES = ("f32", "f16", "bf16")  # to write
CHECKPOINT_NAMINGS = ("diffusers", "comfy")  # that one file can have
LORA_FIELDS = {"name", "loras", "rank", "naming", "dtype"}
CHECKPOINT_FIELDS = {"name", "checkpoint", "loras", "quantize", "group_size", "naming", "dtype"}
Given = Mapping[str, object]
T = TypeVar("T")


@dataclass(frozen=True)
class ConversionDesk:
    """Turns requests for new files into tasks, or refuses them."""

    loras: LoRAShelf
    checkpoints: CheckpointShelf
    tasks: TaskDesk

    def lora(self, asked: Given) -> Task:
        """A task that writes the sum of `loras` as one LoRA, with the options of `zimage convert`.

        Raises RefusedError, UnknownError, ConflictError, BusyError, and ConfigError for values out of bounds.
        """
        given = _known(asked, LORA_FIELDS)
        target = self._free(self.loras, "lora", given)
        files = self._read(given)
        if not files:
            raise RefusedError("`loras` is missing: name the LoRAs to convert or to add up")
        rank = None if "rank" not in given else typed(given["rank"], int, "`rank`")
        naming = _choice(given, "naming", tuple(lora_namings()), DEFAULT_NAMING)
        dtype = _choice(given, "dtype", DTYPES, None)

        def making(progress: Progress) -> list[str]:
            return _without(self.loras.folder, lambda: write_sum(target, files, rank, naming or DEFAULT_NAMING, dtype))

        return self.tasks.add("lora", target.name, making)

    def checkpoint(self, asked: Given) -> Task:
        """A task that writes `checkpoint`, OWN by default, in another form or with `loras` merged in.

        Raises the errors of `lora`, and FormatError or WeightError for a file that is no checkpoint.
        """
        given = _known(asked, CHECKPOINT_FIELDS)
        path, folder = self.checkpoints.path(given.get("checkpoint", OWN)), self.checkpoints.folder
        target = self._free(self.checkpoints, "checkpoint", given)
        bits = None if "quantize" not in given else typed(given["quantize"], int, "`quantize`")
        group = typed(given.get("group_size", GROUP_SIZE), int, "`group_size`")
        if bits is not None:
            one_of("quantize", bits, BITS)
            one_of("group_size", group, GROUP_SIZES)
        files = self._read(given)
        options = {
            "naming": _choice(given, "naming", CHECKPOINT_NAMINGS, CHECKPOINT_NAMINGS[0]),
            "dtype": _choice(given, "dtype", DTYPES, None),
        }
        component = _without(folder, lambda: _component(path))
        if files and component != TRANSFORMER.name:
            raise RefusedError(f"`loras`: a LoRA changes the transformer, not the {COMPONENTS[component].title}")
        quantization = Quantization(bits, group) if bits is not None else None
        goal = _without(folder, lambda: Target(target, component, quantization=quantization, **options))  # type: ignore[arg-type]

        def making(progress: Progress) -> list[str]:
            return _without(folder, lambda: _write(path, goal, files, progress))

        return self.tasks.add("checkpoint", target.name, making)

    def _free(self, shelf: FileShelf, kind: str, given: Given) -> Path:
        target = shelf.free(given.get("name"))
        if self.tasks.makes(kind, target.name):
            raise ConflictError(f"{target.name}: is in the making already: give another `name`")
        return target

    def _read(self, given: Given) -> list[tuple[LoRAFile, float]]:
        """The LoRAs of a request with their scales. Raises WeightError if one does not fit the model."""
        named = scaled_loras(given.get("loras", []), self.loras.path)
        return _without(self.loras.folder, lambda: [(self.loras.read(path), scale) for path, scale in named])


def choices_of_field(kind: str, name: str) -> Sequence[object]:
    """The values that a field of a request for a `kind` of file may have. () if there is no list of them."""
    namings = tuple(lora_namings()) if kind == "lora" else CHECKPOINT_NAMINGS
    return {"quantize": BITS, "group_size": GROUP_SIZES, "naming": namings, "dtype": DTYPES}.get(name, ())


def _known(asked: Given, fields: set[str]) -> dict[str, object]:
    """The fields that are given. Raises RefusedError for others than `fields`."""
    if unknown := [name for name in asked if name not in fields]:
        raise RefusedError(f"`{unknown[0]}` is not known: known are {', '.join(sorted(fields))}")
    return {name: value for name, value in asked.items() if value is not None and value != ""}


def _choice(given: Given, name: str, choices: Sequence[str], usual: str | None) -> str | None:
    if name not in given:
        return usual
    value: str = typed(given[name], str, f"`{name}`")
    one_of(name, value, choices)
    return value


def _without(folder: Path, work: Callable[[], T]) -> T:
    """What `work` returns. Its errors name files without the path of `folder`."""
    try:
        return work()
    except ZImageError as error:
        raise type(error)(without_folder(folder, error)) from None


def _component(path: Path) -> str:
    """The component whose weights are in `path`. Raises RefusedError if there are none."""
    if (identity := identify(Checkpoint.open(path).tensors)) is None:
        raise RefusedError(f"{path.name}: holds no weights of Z-Image")
    return identity.component


def _write(path: Path, goal: Target, loras: Sequence[tuple[LoRAFile, float]], progress: Progress) -> list[str]:
    source = open_source(path, goal.component)
    tensors = merge_loras(source.tensors, [(file.updates, scale) for file, scale in loras], goal.dtype)
    record = {"loras": ", ".join(f"{file.path.name}:{scale:g}" for file, scale in loras)} if loras else None
    report = write_model(source, goal, tensors, record, progress)
    notes = []
    if report.overflowed:
        where = listing(report.overflowed_in, 3)
        notes.append(f"{report.overflowed} values were too large and became infinite, in {where}: write bf16")
    return notes
