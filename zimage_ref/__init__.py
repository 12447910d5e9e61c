"""What Z-Image is, and the NumPy engine.

The definitions are shared with `zimage_mlx`: file formats, names and shapes of parameters, the flow of time and noise,
checkpoints, LoRAs, datasets, options. The networks are this package's own. They are derived differently from those on
MLX on purpose, so that comparing the two proves something.

The names in `__all__` are public. Everything else may change between versions.

Letters in shape comments, in both packages:
    B batch   L image tokens   T caption tokens   S = L + T   D model width   H heads   K head width
    C channels   h w latent (or feature) grid   p patch size
"""

from importlib.metadata import version

from .checkpoints.folder import ModelFolder
from .errors import BackendError, ConfigError, DatasetError, FormatError, TrainingError, WeightError, ZImageError
from .generation.config import GenerateConfig
from .model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from .pipeline import ZImagePipeline
from .training.config import TrainConfig

__version__ = version("zimage-mlx")

__all__ = [
    "BackendError", "ConfigError", "DatasetError", "FormatError", "GenerateConfig", "ModelFolder", "SchedulerConfig",
    "TextEncoderConfig", "TrainConfig", "TrainingError", "TransformerConfig", "VAEConfig", "WeightError",
    "ZImageError", "ZImagePipeline", "__version__",
]  # fmt: skip
