"""The memory that a model needs at 16, 8 and 4 bits for each weight. `inspect` shows it for the folder of a model."""

from __future__ import annotations

from .checkpoints.folder import ModelFolder
from .formats.quantize import Quantization
from .memory import (
    LoadedModel,
    Mode,
    footprint_of_mlx,
    generation_stages,
    lora_bytes,
    on_apple_silicon,
    peak,
    trainable_parameters,
    training_stages,
)
from .model.parameters import lora_modules, transformer_parameters
from .streaming import can_stream
from .training.config import TrainConfig
from .training.kinds import learning_kind
from .training.optimizers import OPTIMIZERS

WEIGHT_BITS = (16, 8, 4)
_MODES: tuple[Mode, ...] = ("lean", "stream")
_SIDE = 1024  # pixels of the square picture that memory is estimated for


def memory_needs(folder: ModelFolder) -> dict[int, dict[str, int]]:
    """The bytes of all weights, and the bytes that generating and training at 1024 x 1024 take at least, by bits.

    The estimates are for one network in memory at a time, and for blocks that are read when they are needed if the
    files allow that. Activations and weights that are not quantized are bfloat16. On an Apple Silicon Mac they have the
    margin that `generate` and `train` have there.
    """
    footprint, streamed = (footprint_of_mlx(mode, on_apple_silicon()) for mode in _MODES)
    layers = lora_modules(folder.transformer, learning_kind(TrainConfig.kind).targets)
    trainable = trainable_parameters(transformer_parameters(folder.transformer), layers, TrainConfig.rank)
    lora = lora_bytes(trainable, OPTIMIZERS[learning_kind(TrainConfig.kind).optimizer].slots)
    tokens, needs = (_SIDE // folder.size_multiple) ** 2, {}
    for bits in WEIGHT_BITS:
        model = LoadedModel(folder, "bfloat16", Quantization(bits) if bits < 16 else None)
        needs[bits] = {
            "weights": sum(map(model.weight_bytes, folder.weights)),
            "generate": peak(generation_stages(model, footprint, (_SIDE, _SIDE))).total,
            "train": peak(training_stages(model, tokens, lora, footprint=footprint)).total,
        }
        if can_stream(folder):
            needs[bits]["generate, streamed"] = peak(generation_stages(model, streamed, (_SIDE, _SIDE))).total
            needs[bits]["train, streamed"] = peak(training_stages(model, tokens, lora, footprint=streamed)).total
    return needs
