"""Prompts that the text encoder writes, for one command: which it is told to write, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.errors import reason
from zimage_ref.formats.reading import read_text
from zimage_ref.generation.enhancing import check_can_write, checked_system
from zimage_ref.generation.run import GenerationRun

from .console import Console


@dataclass(frozen=True)
class Enhancer:
    """Writes the prompts of a run anew, or leaves them as they are."""

    run: GenerationRun
    console: Console
    system: str | None  # what the text encoder is told; None: leave prompts as they are

    @classmethod
    def of(cls, on: bool, file: Path | None, run: GenerationRun, console: Console) -> Enhancer:
        """That of the options --enhance and --enhance-with.

        Raises ConfigError if the file cannot be read or holds no text, or if the text encoder cannot write.
        """
        if not on and file is None:
            return cls(run, console, None)
        check_can_write(run.pipeline.folder)
        try:
            return cls(run, console, checked_system(read_text(file) if file else None))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read as UTF-8 text: {reason(error)}") from error

    def enhanced(self, configs: Sequence[GenerateConfig]) -> list[GenerateConfig]:
        """`configs` with the prompts of this run, under a progress bar."""
        if self.system is None:
            return list(configs)
        with self.console.progress() as bars:
            return self.run.enhanced(configs, self.system, bars.update)
