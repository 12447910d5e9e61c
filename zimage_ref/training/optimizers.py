"""The optimizers to train with, one entry each. All else that the project knows of an optimizer follows from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerKind:
    """What there is to know of an optimizer of MLX before MLX is there."""

    mlx_class: str  # its name in mlx.optimizers
    slots: int  # float32 values that it keeps for each trained parameter
    by_matrix: bool = False  # whether it looks at rows and columns; for the others a long vector will do


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("AdamW", slots=2),
    "adam": OptimizerKind("Adam", slots=2),
    "adamax": OptimizerKind("Adamax", slots=2),
    "adafactor": OptimizerKind("Adafactor", slots=0, by_matrix=True),  # it keeps one value for each row and column
    "adagrad": OptimizerKind("Adagrad", slots=1),
    "adadelta": OptimizerKind("AdaDelta", slots=2),
    "lion": OptimizerKind("Lion", slots=1),
    "muon": OptimizerKind("Muon", slots=1, by_matrix=True),
    "rmsprop": OptimizerKind("RMSprop", slots=1),
    "sgd": OptimizerKind("SGD", slots=1),  # a momentum, which MLX keeps although ours is 0
}
