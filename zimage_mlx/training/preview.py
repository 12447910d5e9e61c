"""Pictures of prompts while training goes on: always from the same noise, so that they show what changes.

Prompts are encoded before training; the autoencoder is in memory only while a preview is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.generation.presets import defaults_for
from zimage_ref.model.flow import starting_noise
from zimage_ref.pictures.images import save_picture, to_picture, to_unit
from zimage_ref.training.events import Previewed
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.run_folder import RunFolder

from .encode import EncodedDataset
from .learning import Learning


class Previewer:
    """Draws the previews of a plan."""

    def __init__(
        self,
        plan: TrainPlan,
        pipeline: ZImagePipeline,
        data: EncodedDataset,
        learner: Learning,
        adapter: TrainingAdapter,
    ) -> None:
        self._plan, self._pipeline, self._data, self._learner, self._adapter = plan, pipeline, data, learner, adapter
        self._folder = RunFolder(plan.config.output).previews

    def draw(self, step: int) -> Iterator[Previewed]:
        """Draws every prompt, if there are any, with the LoRA as it would be saved and without the training adapter."""
        if not self._prompts:
            return
        with self._adapter.removed(), self._learner.result():
            drawn = [self._latents(index, prompt) for index, prompt in enumerate(self._prompts)]
        for index, (prompt, latents) in enumerate(zip(self._prompts, drawn, strict=True)):
            path = self._folder / f"step{step}-{index}.png"
            save_picture(to_picture(to_unit(self._pipeline.decode(latents))), path)
            yield Previewed(step, index, prompt, path)
        self._pipeline.release("vae")

    @property
    def _prompts(self) -> tuple[str, ...]:
        return self._plan.config.preview_prompt

    def _latents(self, index: int, prompt: str) -> mx.array:
        """(1, C, h, w) of the finished picture."""
        config, model = self._plan.config, self._plan.model
        defaults = defaults_for(model.scheduler)
        steps = defaults.preview_steps if config.preview_steps is None else config.preview_steps
        guidance = defaults.guidance if config.preview_guidance is None else config.preview_guidance
        pixels = max(config.resolution) if config.preview_size is None else config.preview_size
        side = pixels // model.vae.factor
        x = mx.array(starting_noise(config.seed + index, (model.transformer.in_channels, side, side)))[None]
        captions = [self._data.caption(text) for text in ((prompt, "") if guidance else (prompt,))]
        for latest in self._pipeline.denoise(x, captions, steps, guidance):
            x = latest
        return x
