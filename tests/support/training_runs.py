"""Short training runs on the small random model, for the tests of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import zimage_mlx  # whose names are imported when they are used: a test without MLX may import this
from support import tiny
from zimage_ref import TrainConfig
from zimage_ref.formats import safetensors
from zimage_ref.formats.tensors import Array, cast
from zimage_ref.training.events import Event, Notice, Saved, Step

FAST = {  # at a constant rate, so that runs of different lengths begin alike
    "rank": 2, "alpha": 2.0, "lr": 1e-2, "warmup": 0, "schedule": "constant", "resolution": 32, "caption_dropout": 0.0
}  # fmt: skip
PLAIN = {"optimizer": "sgd", "weight_decay": 0.0, "grad_clip": 0.0}  # so that one step is lr times the gradient


# Options that all play a part in a short run
EVERYTHING = {
    "rank": 3, "batch_size": 2, "grad_accumulation": 2, "ema": 0.9, "caption_dropout": 0.3, "rank_dropout": 0.3,
    "flip": True, "resolution": (32, 48), "schedule": "cosine", "warmup": 2, "optimizer": "adamw",
    "lora_plus": 4.0, "steps": 5,
    "resume_every": 2, "validation": "0.2", "validation_every": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run did."""

    events: list[Event]
    output: Path

    @property
    def steps(self) -> list[Step]:
        return self.of(Step)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def notices(self) -> str:
        return "\n".join(notice.text for notice in self.of(Notice))

    @property
    def saved(self) -> list[Path]:
        return [event.path for event in self.of(Saved)]

    @property
    def bytes(self) -> bytes:
        return self.output.read_bytes()

    def matrices(self, half: str) -> dict[str, Array]:
        """All A or all B of the result, by layer."""
        tensors, _ = safetensors.read(self.output)
        ending = f".lora_{half}.weight"
        return {
            name.removeprefix("diffusion_model.").removesuffix(ending): cast(tensor.read(), np.dtype("<f4"))
            for name, tensor in tensors.items()
            if name.endswith(ending)
        }

    def vector(self, half: str) -> Array:
        """All A or all B as one vector."""
        return np.concatenate([matrix.ravel() for matrix in self.matrices(half).values()])


@dataclass(frozen=True)
class Workshop:
    """A model and pictures to train on."""

    folder: Path
    model: Path
    data: Path

    def config(self, name: str, **options: Any) -> TrainConfig:
        """A quick run into <name>.safetensors; all runs share one cache."""
        given = {"model_dir": self.model, "dataset": self.data, "cache": self.folder / "cache", **FAST, **options}
        return TrainConfig(output=self.folder / f"{name}.safetensors", **given)

    def train(self, name: str, should_stop: Callable[[], bool] = lambda: False, **options: Any) -> Run:
        """Runs it to its end, or until `should_stop`."""
        config = self.config(name, **options)
        return Run(list(zimage_mlx.train(config, should_stop)), config.output)


def workshop(folder: Path) -> Workshop:
    """A new one in `folder`: four pictures of four shapes."""
    return Workshop(folder, tiny.write_model_folder(folder / "model"), tiny.write_dataset(folder / "data"))


WHOLE = {  # of a quick run that trains the transformer itself
    "kind": "full", "resolution": 32, "caption_dropout": 0.0, "warmup": 0, "schedule": "constant", "lr": 1e-3
}  # fmt: skip


class WholeShop(Workshop):
    """A workshop whose runs train the transformer itself."""

    def config(self, name: str, **options: Any) -> TrainConfig:
        given = {"model_dir": self.model, "dataset": self.data, "cache": self.folder / "cache", **WHOLE, **options}
        return TrainConfig(**{"output": self.folder / f"{name}.safetensors", **given})


def whole_workshop(folder: Path) -> WholeShop:
    """A new one in `folder`."""
    made = workshop(folder)
    return WholeShop(made.folder, made.model, made.data)


def pictures(folder: Path, *sizes: tuple[int, int], captions: list[str] | None = None) -> Path:
    """A dataset of pictures of `sizes` with captions of different lengths."""
    folder.mkdir(parents=True)
    for i, size in enumerate(sizes):
        tiny.photograph(*size, seed=20 + i).save(folder / f"p{i:04}.png")
        caption = captions[i] if captions else f"picture {i}" + " of more soft waves" * (2 * i)
        (folder / f"p{i:04}.txt").write_text(caption, encoding="utf-8")
    return folder


def after(steps: int) -> Callable[[], bool]:
    """A `should_stop` that says so when steps have been made, given that no preparation is left to ask about it."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= steps
