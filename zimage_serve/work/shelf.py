"""The LoRAs of a server: listed, inspected, received and deleted, each by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from zimage_ref.errors import ZImageError
from zimage_ref.formats.files import atomic_write
from zimage_ref.lora.alpha import sidecar
from zimage_ref.lora.file import LoRAFile, read_lora
from zimage_ref.lora.merge import module_groups
from zimage_ref.lora.sums import trigger_of
from zimage_ref.model.config import TransformerConfig
from zimage_ref.model.parameters import transformer_parameters
from zimage_serve.refusals import RefusedError
from zimage_serve.store.names import checked_name

from .file_facts import without_folder
from .file_shelf import FileShelf

_LORA = ".safetensors"


class LoRAShelf(FileShelf):
    """The LoRAs in one folder."""

    what = "LoRA"
    suffixes = (_LORA,)
    made = _LORA

    def __init__(self, folder: Path, transformer: TransformerConfig) -> None:
        """transformer: that of the model; only LoRAs that fit it are received."""
        super().__init__(folder)
        self._shapes = transformer_parameters(transformer)

    def read(self, path: Path) -> LoRAFile:
        """The LoRA in the file `path`. Raises the errors of `read_lora`."""
        return read_lora(path, self._shapes)

    def _read(self, path: Path) -> dict[str, object]:
        return {"trigger": trigger_of(path), **self.read(path).facts()}

    def _beside(self, path: Path) -> Iterable[Path]:
        return (sidecar(path),)

    def inspect(self, name: str) -> dict[str, object]:
        """The facts, and how much the LoRA changes each module. Raises ZImageError if it cannot be read."""
        return {**self.facts(name), "changes": _changes(read_lora(self.path(name)))}

    def receive(self, name: object, data: BinaryIO) -> dict[str, object]:
        """Keeps an uploaded LoRA.

        Raises ConflictError if the name is taken, RefusedError if it is no LoRA for this model.
        """
        wanted = checked_name(name, self.what)
        if not wanted.endswith(_LORA):
            raise RefusedError(f"{wanted}: a LoRA is a {_LORA} file")
        target = self.free(wanted)
        incoming = self.folder / f".incoming-{wanted}"
        try:
            with atomic_write(incoming) as file:
                shutil.copyfileobj(data, file, 2**20)
            try:
                self.read(incoming)
            except ZImageError as error:
                raise RefusedError(f"{wanted}: {without_folder(self.folder, error)}") from None
            incoming.rename(target)
        finally:
            incoming.unlink(missing_ok=True)
        return self.facts(wanted)


def _changes(file: LoRAFile) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for group, updates in module_groups(file.updates).items():
        norms = [update.norm() for update in updates]
        ranks = sorted({rank for update in updates if (rank := update.rank) is not None})
        rows.append({"module": group, "blocks": len(updates), "ranks": ranks, "mean_norm": sum(norms) / len(norms),
                     "largest_norm": max(norms)})  # fmt: skip
    return rows
