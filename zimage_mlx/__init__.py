"""Z-Image on MLX: generation and LoRA training on Apple Silicon (and wherever else MLX runs).

The same modules under the same names as `zimage_ref`, whose definitions it shares and whose mathematics it does not.
"""

from zimage_ref.options import TrainConfig

from .pipeline import ZImagePipeline
from .training import Encoded, Saved, Step, train

__all__ = ["Encoded", "Saved", "Step", "TrainConfig", "ZImagePipeline", "train"]
