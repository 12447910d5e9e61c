"""The inputs that official code, reference and MLX are compared on, and access to the golden files in tests/data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support import tiny
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.updates import LoRA
from zimage_ref.model import parameters
from zimage_ref.model.config import TransformerConfig, VAEConfig

DATA = Path(__file__).parents[1] / "data"
Arrays = dict[str, np.ndarray]

CASES = {  # of the transformer: (rows, columns) of image tokens, caption lengths
    "padded": ((3, 5), (7,)),
    "exact": ((4, 8), (32,)),
    "batch": ((5, 9), (41, 6)),
}
PROMPT, NEGATIVE, STEPS, SEED = "a red fox in the snow", "soft waves", 4, 0
PICTURES = {"plain": 0.0, "guided": 2.5}  # guidance of each golden picture


def transformer_inputs(config: TransformerConfig, case: str, seed: int) -> Arrays:
    """x, t and caption0, caption1, ... for one of CASES."""
    (rows, columns), lengths = CASES[case]
    rng, p = np.random.RandomState(seed), config.patch_size
    inputs = {"x": rng.standard_normal((len(lengths), config.in_channels, rows * p, columns * p))}
    inputs["t"] = rng.uniform(0.05, 0.95, len(lengths))
    for i, length in enumerate(lengths):
        inputs[f"caption{i}"] = rng.standard_normal((length, config.cap_feat_dim)) * 3
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def read(name: str, part: str = "") -> Arrays:
    """The arrays of tests/data/{name}.npz; of those whose name starts with `part` and a dot, the rest of the name."""
    prefix = f"{part}." if part else ""
    with np.load(DATA / f"{name}.npz") as file:
        return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


def captions(inputs: Arrays) -> list[np.ndarray]:
    """The captions in `inputs`, in order."""
    return [inputs[name] for name in sorted(inputs) if name.startswith("caption")]


def block_inputs(config: TransformerConfig, seed: int) -> Arrays:
    """Tokens x, position ids, mask and time embedding of two items, the second shorter."""
    rng = np.random.RandomState(seed)
    return {
        "x": rng.standard_normal((2, 7, config.dim)).astype(np.float32),
        "ids": np.stack([rng.randint(0, n, 7) for n in config.axes_lens], -1).astype(np.int32),
        "mask": np.arange(7) < np.array([[7], [5]]),
        "adaln": rng.standard_normal((2, config.adaln_dim)).astype(np.float32),
    }


def image_batch(config: VAEConfig, seed: int) -> np.ndarray:
    """Two smooth pictures (2, 3, H, W) in [-1, 1]."""
    width, height = 4 * config.factor, 3 * config.factor
    pictures = [np.asarray(tiny.photograph(width, height, seed + i), np.float32) for i in range(2)]
    return np.stack(pictures).transpose(0, 3, 1, 2) / 127.5 - 1


LAYERS = parameters.lora_modules(tiny.TRANSFORMER, ("attention", "feed_forward", "refiners"))


def random_lora(rank: int, seed: int, layers: Sequence[str] = LAYERS) -> LoRA:
    """A LoRA for `tiny.TRANSFORMER` that changes every one of `layers` visibly."""
    rng, shapes = np.random.RandomState(seed), parameters.transformer_parameters(tiny.TRANSFORMER)
    lora = {}
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"]
        A, B = rng.standard_normal((rank, inputs)) * inputs**-0.5, rng.standard_normal((outputs, rank)) * 0.3
        lora[layer] = LowRank(A.astype(np.float32), B.astype(np.float32))
    return lora
