"""The definitions of Z-Image, and the NumPy engine.

`zimage_mlx` uses the definitions of this package: file formats, names and shapes of parameters, time and noise,
checkpoints, LoRAs, datasets, options. The networks here run on NumPy only. They are written independently of those for
MLX, so that an error in one shows when tests compare the two.

The names in `__all__` are public. Submodules are private: they may change between versions.

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
    "combine_loras", "merge_loras", "open_source", "read_lora", "write_lora", "write_model",
]  # fmt: skip

if TYPE_CHECKING:  # for type checkers and editors; at run time, `attributes` imports each name on first use
    from .checkpoints.convert import Target, open_source, write_model
    from .checkpoints.folder import ModelFolder
    from .errors import BackendError, ConfigError, DatasetError, FormatError, TrainingError, WeightError, ZImageError
    from .formats.quantize import Quantization
    from .generation.config import GenerateConfig
    from .generation.run import GenerationRun, RunSettings
    from .lora.file import LoRAFile, read_lora, write_lora
    from .lora.merge import combine_loras, merge_loras
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
        ".lora.merge": ["combine_loras", "merge_loras"],
        ".model.config": ["SchedulerConfig", "TextEncoderConfig", "TransformerConfig", "VAEConfig"],
        ".pipeline": ["ZImagePipeline"],
        ".training.config": ["TrainConfig"],
    })  # fmt: skip
