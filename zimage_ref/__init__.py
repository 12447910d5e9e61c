"""What Z-Image is, and the NumPy engine.

The definitions are shared with `zimage_mlx`: file formats, names and shapes of parameters, the flow of time and noise,
checkpoints, LoRAs, datasets, options. The networks are this package's own. They are derived differently from those on
MLX on purpose, so that comparing the two proves something.

The names in `__all__` are public. Submodules are private: everything in them may change between versions.

Letters in shape comments, in both packages:
    B batch   L image tokens   T caption tokens   S = L + T   D model width   H heads   K head width
    C channels   h w latent (or feature) grid   p patch size
"""

from typing import TYPE_CHECKING

from . import lazy
from .version import __version__

__all__ = [
    "BackendError", "ConfigError", "DatasetError", "FormatError", "GenerateConfig", "GenerationRun", "LoRAFile",
    "ModelFolder", "Quantization", "RunSettings", "SchedulerConfig", "Target", "TextEncoderConfig", "TrainConfig",
    "TrainingError", "TransformerConfig", "VAEConfig", "WeightError", "ZImageError", "ZImagePipeline", "__version__",
    "combined", "merged", "open_source", "read_lora", "write_lora", "write_model",
]  # fmt: skip

if TYPE_CHECKING:  # for type checkers and editors; at run time the table below does the same, name by name
    from .checkpoints.convert import Target, open_source, write_model
    from .checkpoints.folder import ModelFolder
    from .errors import BackendError, ConfigError, DatasetError, FormatError, TrainingError, WeightError, ZImageError
    from .formats.quantize import Quantization
    from .generation.config import GenerateConfig
    from .generation.run import GenerationRun, RunSettings
    from .lora.file import LoRAFile, read_lora, write_lora
    from .lora.merge import combined, merged
    from .model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
    from .pipeline import ZImagePipeline
    from .training.config import TrainConfig
else:
    __getattr__, __dir__ = lazy.attributes(__name__, {
        ".checkpoints.convert": ["Target", "open_source", "write_model"],
        ".checkpoints.folder": ["ModelFolder"],
        ".errors": [
            "BackendError", "ConfigError", "DatasetError", "FormatError", "TrainingError", "WeightError", "ZImageError",
        ],
        ".formats.quantize": ["Quantization"],
        ".generation.config": ["GenerateConfig"],
        ".generation.run": ["GenerationRun", "RunSettings"],
        ".lora.file": ["LoRAFile", "read_lora", "write_lora"],
        ".lora.merge": ["combined", "merged"],
        ".model.config": ["SchedulerConfig", "TextEncoderConfig", "TransformerConfig", "VAEConfig"],
        ".pipeline": ["ZImagePipeline"],
        ".training.config": ["TrainConfig"],
    })  # fmt: skip
