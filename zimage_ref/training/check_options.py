"""The options of a training run about what it shows of itself. They change nothing in the LoRA.

`TrainConfig` adds all others. The traits of a field are described in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_ref.generation.presets import by_model
from zimage_ref.generation.sizes import check_area, check_side
from zimage_ref.options import option

from .groups import TrainGroup
from .preview_prompts import PreviewPrompt

LOG_NAMES = ("tensorboard", "wandb")  # each is also its extra; `logs` writes them
_CHECKS = TrainGroup.CHECKS


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of the held-out loss, of previews and of logs for other programs."""

    validation: str = option(
        "",
        "Pictures to test on, not to learn: a folder, or a share such as 0.1.",
        _CHECKS,
        value="FOLDER|SHARE",
        essential=True,
    )
    validation_every: int = option(50, "Steps between two measurements of the held-out loss.", _CHECKS, free=True)
    preview_prompt: tuple[str, ...] = option(
        (),
        "Prompt to draw during training. Its own settings may follow it, as in `zimage generate`. You can repeat it.",
        _CHECKS,
        value="TEXT",
        essential=True,
        free=True,
        repeatable=True,
    )
    preview_every: int = option(250, "Steps between two previews.", _CHECKS, free=True)
    preview_first: bool = option(
        True, "Draw previews before the first step, too: what the model makes without the LoRA.", _CHECKS, free=True
    )
    preview_size: int | None = option(
        None, "Side of a preview in pixels. With auto, the largest `resolution`.", _CHECKS, free=True, auto=True
    )
    preview_steps: int | None = option(
        None, f"Denoising steps of a preview. With auto, {by_model('preview_steps')}.", _CHECKS, free=True, auto=True
    )
    preview_guidance: float | None = option(
        None, f"Guidance of a preview. 0 is none. With auto, {by_model('guidance')}.", _CHECKS, free=True, auto=True
    )
    log: tuple[str, ...] = option(
        (),
        "Write the figures and previews for these programs, too. Each needs the extra of its name.",
        _CHECKS,
        choices=LOG_NAMES,
        free=True,
    )

    def check_previews(self) -> None:
        """Raises ConfigError for sizes that no picture has, and for prompts with wrong settings."""
        for text in self.preview_prompt:
            PreviewPrompt.parse(text)
        if self.preview_size is not None:
            check_side("preview_size", self.preview_size)
            check_area(self.preview_size, self.preview_size)
