"""The optimizers for training, and the schedules of the rate. An entry holds all that the project knows about one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerKind:
    """Facts about an optimizer that are needed without MLX."""

    mlx_class: str  # its name in mlx.optimizers, or in zimage_mlx.training.optimizers
    slots: float  # the number of float32 values that it keeps for each trained parameter
    by_matrix: bool = False  # whether it needs rows and columns; the others may get all parameters as one vector
    lr: float | None = None  # its own default of the learning rate
    one_rate: bool = False  # whether it must see all parameters at once, and gives them one rate
    passing: int = 8  # float32 arrays of the size of a parameter that are in memory at once while it changes it
    averages: bool = False  # whether its result is an average that it makes; it then needs no falling rate


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("AdamW", slots=2),
    "adam": OptimizerKind("Adam", slots=2),
    "adamax": OptimizerKind("Adamax", slots=2),
    "adafactor": OptimizerKind(
        "Adafactor", slots=0, by_matrix=True, passing=6
    ),  # it keeps one value for each row and each column
    "adagrad": OptimizerKind("Adagrad", slots=1),
    "adadelta": OptimizerKind("AdaDelta", slots=2),
    "lion": OptimizerKind("Lion", slots=1),
    "muon": OptimizerKind("Muon", slots=1, by_matrix=True),
    "rmsprop": OptimizerKind("RMSprop", slots=1),
    "sgd": OptimizerKind("SGD", slots=1),  # MLX keeps a momentum, although the momentum is 0 here
    "adamw8bit": OptimizerKind(
        "AdamW8bit", slots=0.5, passing=20
    ),  # two bytes; a scale for each block adds a hundredth
    "prodigy": OptimizerKind("Prodigy", slots=4, lr=1.0, one_rate=True),
    "schedulefree": OptimizerKind("ScheduleFreeAdamW", slots=2, averages=True),
}

# Schedule -> function from progress (0 after the warmup, 1 at the last step) to a share of the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
}
