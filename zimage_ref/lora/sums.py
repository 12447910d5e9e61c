"""LoRA files made of others: converted, or added up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zimage_ref.formats.checkpoint import Checkpoint

from .clients import losses
from .file import LoRAFile, write_lora
from .merge import combine_loras
from .spellings import DEFAULT_NAMING

TRIGGER = "trigger"  # the key in the metadata of a LoRA for the words that call it up


def trigger_of(path: Path) -> str:
    """The words that call up what the LoRA in `path` knows, if its file says so. Raises FormatError."""
    return str(Checkpoint.open(path).metadata.get(TRIGGER, ""))


def write_sum(
    output: Path,
    files: Sequence[tuple[LoRAFile, float]],
    rank: int | None = None,
    naming: str = DEFAULT_NAMING,
    dtype: str | None = None,
) -> list[str]:
    """Writes the sum of LoRAs at their scales as one LoRA. Returns what programs are known to lose of it, in sentences.

    rank: reduces it to this rank. dtype: None keeps that of the files, or takes float32 if they differ. The triggers of
    all stay in its metadata. Raises the errors of `combine_loras` and `write_lora`.
    """
    lora = combine_loras([(file.updates, scale) for file, scale in files], rank)
    record = {"sources": ", ".join(f"{file.path.name}:{scale:g}" for file, scale in files)}
    triggers = dict.fromkeys(words for file, _ in files if (words := trigger_of(file.path)))
    if triggers:
        record[TRIGGER] = ", ".join(triggers)
    write_lora(output, lora, record, naming, dtype or _widest([file for file, _ in files]), with_sidecar=False)
    return losses(lora, naming)


def _widest(files: Sequence[LoRAFile]) -> str:
    """The dtype of the files if all have the same, else float32, which can hold all values."""
    dtypes = {file.dtype for file in files}
    return dtypes.pop() if len(dtypes) == 1 else "f32"
