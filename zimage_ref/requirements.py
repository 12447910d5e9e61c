"""How much memory a model needs, by bits a weight: what `inspect` tells of a model's folder."""

from __future__ import annotations

from .checkpoints.folder import ModelFolder
from .formats.quantize import Quantization
from .memory import LEAN, LoadedModel, generation_stages, lora_bytes, peak, trainable_parameters, training_stages
from .model.parameters import lora_modules, transformer_parameters
from .training.config import TrainConfig
from .training.optimizers import OPTIMIZERS

WEIGHT_BITS = (16, 8, 4)
_SIDE = 1024  # pixels of the square picture that memory is estimated for


def memory_needs(folder: ModelFolder) -> dict[int, dict[str, int]]:
    """Bytes, by bits a weight, of all weights, and about the least that generating and training at 1024 x 1024 take.

    One network is in memory at a time; what is not quantized, activations too, is bfloat16.
    """
    layers = lora_modules(folder.transformer, TrainConfig.targets)
    trainable = trainable_parameters(transformer_parameters(folder.transformer), layers, TrainConfig.rank)
    lora = lora_bytes(trainable, OPTIMIZERS[TrainConfig.optimizer].slots)
    tokens, needs = (_SIDE // folder.size_multiple) ** 2, {}
    for bits in WEIGHT_BITS:
        model = LoadedModel(folder, "bfloat16", Quantization(bits) if bits < 16 else None)
        needs[bits] = {
            "weights": sum(map(model.weight_bytes, folder.weights)),
            "generate": peak(generation_stages(model, LEAN, (_SIDE, _SIDE))).total,
            "train": peak(training_stages(model, tokens, lora)).total,
        }
    return needs
