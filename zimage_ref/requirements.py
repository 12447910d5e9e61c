"""How much memory a model needs, by bits a weight: what `inspect` tells of a model's folder."""

from __future__ import annotations

from .checkpoints.folder import ModelFolder
from .formats.quantize import Quantization
from .memory import LEAN, generation, peak, trainable_parameters, training, weight_bytes
from .model.parameters import lora_modules, transformer_parameters
from .training.config import TrainConfig

WEIGHT_BITS = (16, 8, 4)
_SIDE = 1024  # pixels of the square picture that memory is estimated for


def memory_needs(folder: ModelFolder) -> dict[int, dict[str, int]]:
    """Bytes, by bits a weight, of all weights, and about the least that generating and training at 1024 x 1024 take.

    One network is in memory at a time; what is not quantized, activations too, is bfloat16.
    """
    layers = lora_modules(folder.transformer, TrainConfig.targets)
    trainable = trainable_parameters(transformer_parameters(folder.transformer), layers, TrainConfig.rank)
    tokens, needs = (_SIDE // folder.size_multiple) ** 2, {}
    for bits in WEIGHT_BITS:
        how = Quantization(bits) if bits < 16 else None
        needs[bits] = {
            "weights": sum(weight_bytes(tensors, 2, how) for tensors in folder.weights.values()),
            "generate": peak(generation(folder, "bfloat16", LEAN, width=_SIDE, height=_SIDE, quantization=how)).total,
            "train": peak(training(folder, "bfloat16", how, trainable=trainable, image_tokens=tokens)).total,
        }
    return needs
