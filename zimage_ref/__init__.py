"""Z-Image in pure NumPy: the reference, and everything that is definition rather than computation.

Two kinds of modules live here. The nouns (configs, names, file formats, schedule, positions, tokenizer, datasets,
options) are shared with `zimage_mlx`. The mathematics (ops, weights, transformer, text_encoder, vae, pipeline) is this
package's own, derived differently from MLX's on purpose, so that comparing the two proves something.

Letters in shape comments, in both packages:
    B batch   L image tokens   T caption tokens   S = L + T   D model width   H heads   K head width
    C channels   h w latent (or feature) grid   p patch size
"""

from importlib.metadata import version

from .config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from .errors import BackendError, ConfigError, DatasetError, FormatError, TrainingError, WeightError, ZImageError
from .model_folder import ModelFolder
from .options import GenerateConfig
from .pipeline import ZImagePipeline
from .train_config import TrainConfig

__version__ = version("zimage-mlx")

__all__ = [
    "BackendError", "ConfigError", "DatasetError", "FormatError", "GenerateConfig", "ModelFolder", "SchedulerConfig",
    "TextEncoderConfig", "TrainConfig", "TrainingError", "TransformerConfig", "VAEConfig", "WeightError",
    "ZImageError", "ZImagePipeline", "__version__",
]  # fmt: skip
