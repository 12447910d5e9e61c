"""Pictures of prompts while training goes on: always from the same noise, so that they show what changes.

Prompts are encoded before training; the autoencoder is in memory only while a preview is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from zimage_mlx.lora.adapter import TrainingAdapter
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.model.flow import starting_noise
from zimage_ref.pictures.images import save_picture, to_picture, to_unit
from zimage_ref.training.events import Previewed
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.preview_prompts import Preview
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
        self._run = RunFolder(plan.config.output)

    def draw(self, step: int) -> Iterator[Previewed]:
        """Draws every prompt, if there are any, with the LoRA as it would be saved and without the training adapter.

        Before the first step of a run that goes on from a LoRA, draws them without it as well.
        """
        previews = self._plan.previews
        if not previews:
            return
        without: list[mx.array] = []
        with self._adapter.removed():
            if step == 0 and (resting := self._learner.without()):
                with resting:
                    without = [self._latents(preview) for preview in previews]
            with self._learner.result():
                drawn = [self._latents(preview) for preview in previews]
        for index, latents in enumerate(without):
            self._save(latents, self._run.preview_without(index))
        for index, (preview, latents) in enumerate(zip(previews, drawn, strict=True)):
            path = self._run.preview(step, index)
            self._save(latents, path)
            yield Previewed(step, index, preview.text, path)
        self._pipeline.release("vae")

    def _save(self, latents: mx.array, path: Path) -> None:
        save_picture(to_picture(to_unit(self._pipeline.decode(latents))), path)

    def _latents(self, preview: Preview) -> mx.array:
        """(1, C, h, w) of the finished picture."""
        model = self._plan.model
        shape = (model.transformer.in_channels, preview.height // model.vae.factor, preview.width // model.vae.factor)
        x = mx.array(starting_noise(preview.seed, shape))[None]
        captions = [self._data.caption(text) for text in preview.texts]
        for latest in self._pipeline.denoise(x, captions, preview.steps, preview.guidance):
            x = latest
        return x
