"""Pictures and captions, encoded once by the autoencoder and the text encoder, and read from disk while training.

Memory holds one picture and one network at a time, whatever the size of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.weights import from_stored, to_stored
from zimage_mlx.pipeline import ZImagePipeline
from zimage_ref.errors import FormatError, TrainingError
from zimage_ref.formats.files import disk_is_full
from zimage_ref.formats.temporary import remove_stale
from zimage_ref.formats.tensors import Array
from zimage_ref.memory import LEAN
from zimage_ref.training.buckets import Size
from zimage_ref.training.cache import TrainCache, is_entry, read_entry, write_entry
from zimage_ref.training.config import TrainConfig
from zimage_ref.training.dataset import Example
from zimage_ref.training.events import Encoded
from zimage_ref.training.plan import TrainPlan
from zimage_ref.training.variants import Variants

_Work = tuple[Path, Callable[[], mx.array]]  # an entry, and what computes it


class EncodedDataset:
    """Latents, masks, caption features and predictions of a plan's pictures, and of its previews' prompts."""

    def __init__(self, plan: TrainPlan, pipeline: ZImagePipeline) -> None:
        engine = f"mlx {mx.default_device().type} {pipeline.dtype}"
        self._plan, self._pipeline = plan, pipeline
        self.cache = TrainCache(plan.config.cache_folder, plan.model, engine, pipeline.quantization)

    def build(self, rank: int = 0, ranks: int = 1) -> Iterator[Encoded]:
        """Computes every entry that is missing or damaged; each network is freed when its part is done.

        Machines that share a disk begin at different places and find each other's entries. Raises TrainingError if the
        disk is full.
        """
        remove_stale(self.cache.folder, deep=True)
        for what, network, work in (
            ("captions", "text_encoder", self._caption_work()),
            ("latents", "vae", self._latent_work()),
        ):
            first = rank * len(work) // ranks
            for done, (path, compute) in enumerate(work[first:] + work[:first], start=1):
                if not is_entry(path):
                    self.write(path, to_stored(compute()), len(work) - done + 1)
                yield Encoded(done, len(work), what)
            self._pipeline.release(network)
        for example in (*self._plan.examples, *self._plan.held_out):
            example.forget()

    def write(self, path: Path, value: Array, left: int) -> None:
        """Writes an entry. left: entries like it that are missing. Raises TrainingError if the disk is full."""
        try:
            write_entry(path, value)
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise TrainingError(
                f"{self.cache.folder}: the disk is full: about {left * value.nbytes / 1e6:,.1f} MB are missing: make "
                f"room or give `cache` on another disk"
            ) from error

    def latents(self, example: Example, size: Size, flip: bool = False) -> mx.array:
        """(C, h, w) float32. Raises TrainingError if the entry is gone or damaged since `build`."""
        return _read(self.cache.latents(example, size, flip))

    def mask(self, example: Example, size: Size, flip: bool = False) -> mx.array:
        """(h, w) float32 in 0..1: the mask of a picture that has one. Raises as `latents` does."""
        return _read(self.cache.mask(example, size, flip, self._plan.model.vae.factor))

    def caption(self, text: str) -> mx.array:
        """(T, cap_feat_dim) in the text encoder's precision. Raises as `latents` does."""
        return _read(self.cache.caption(text))

    def prediction(self, path: Path) -> mx.array:
        """(C, h, w) float32: an entry of `BasePredictions`. Raises as `latents` does."""
        return _read(path).astype(mx.float32)

    def _caption_work(self) -> list[_Work]:
        plan, config = self._plan, self._plan.config
        texts = [*drawn_captions(plan), *(Variants(config).first(example.caption) for example in plan.held_out)]
        texts += [text for preview in plan.previews for text in preview.texts]
        dropped = any(example.settings.caption_dropout for example in plan.examples)
        if dropped or config.preserve_blank:
            texts.append("")
        return [(self.cache.caption(text), partial(self._encode_caption, text)) for text in dict.fromkeys(texts)]

    def _latent_work(self) -> list[_Work]:
        plan = self._plan
        wanted = [(plan.examples[item.example], item.size) for item in plan.batches.items]
        seen = [
            (example, size, flip) for example, size in wanted for flip in (False, True)[: 1 + example.settings.flip]
        ]
        masks = {self.cache.mask(*p, plan.model.vae.factor): partial(self._mask, *p) for p in seen if p[0].mask}
        seen += [(example, size, False) for example, size in zip(plan.held_out, plan.held_out_sizes, strict=True)]
        work = {self.cache.latents(*picture): partial(self._encode_picture, *picture) for picture in seen}
        return list((work | masks).items())

    def _encode_caption(self, text: str) -> mx.array:
        return self._pipeline.encode_prompt(text)

    def _mask(self, example: Example, size: Size, flip: bool) -> mx.array:
        """(h, w) float32."""
        return mx.array(example.latent_mask(*size, flip, self._plan.model.vae.factor))

    def _encode_picture(self, example: Example, size: Size, flip: bool) -> mx.array:
        """(C, h, w) float32. Each picture is encoded once, so memory matters more than time: strips are small."""
        pixels = mx.array(example.pixels(*size, flip))[None]  # (1, 3, H, W)
        return self._pipeline.vae.encode(pixels, Strips(LEAN.strips)).astype(mx.float32)[0]


def drawn_captions(plan: TrainPlan) -> list[str]:
    """The different captions that the whole run may draw, in order, with those to preserve."""
    config, variants = plan.config, Variants(plan.config)
    epochs = -(-plan.total // plan.batches.steps_per_epoch) if variants.vary else 1
    texts: dict[str, None] = {}
    for epoch in range(epochs):
        for number, item in enumerate(plan.batches.items):
            example = plan.examples[item.example]
            drawn = variants.draw(example.caption, epoch, number)
            texts[drawn] = None
            if config.preserve and example.settings.trigger:
                texts[preserving_caption(config, example, drawn)] = None
    return [*texts, *(prompt for prompt in config.preserve_prompt if prompt not in texts)]


def preserving_caption(config: TrainConfig, example: Example, drawn: str) -> str:
    """A caption that was drawn for `example`, with the words of `preserve` in place of the trigger."""
    return drawn.replace(example.settings.trigger, config.preserve)


def _read(path: Path) -> mx.array:
    try:
        return from_stored(read_entry(path))
    except FormatError as error:
        raise TrainingError(f"{path}: the cache was changed during the run: go on with `resume`") from error
