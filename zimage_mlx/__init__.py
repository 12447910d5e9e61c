"""Z-Image on MLX: generation and LoRA training on Apple Silicon (and wherever else MLX runs).

The same modules under the same names as `zimage_ref`, whose definitions it shares and whose mathematics it does not.
"""

from zimage_ref.training.config import TrainConfig
from zimage_ref.training.events import (
    Checkpointed,
    Done,
    Encoded,
    Event,
    Notice,
    Previewed,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
)
from zimage_ref.training.plan import make_plan

from .pipeline import ZImagePipeline
from .training.machines import is_first
from .training.precision import resolve_base_precision
from .training.run import train

__all__ = [
    "Checkpointed", "Done", "Encoded", "Event", "Notice", "Previewed", "Saved", "Started", "Step", "Stopped",
    "TrainConfig", "Validated", "ZImagePipeline", "is_first", "make_plan", "resolve_base_precision", "train",
]  # fmt: skip
