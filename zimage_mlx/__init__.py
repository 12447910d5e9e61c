"""Z-Image on MLX: generation and LoRA training on Apple Silicon (and wherever else MLX runs).

The same modules under the same names as `zimage_ref`, whose definitions it shares and whose mathematics it does not.

The names in `__all__` are public: all of those of `zimage_ref`, and training. Submodules are private: everything in
them may change between versions. Importing this package does not load MLX; using its names does. On Linux, importing
it loads a fast BLAS for MLX, if the machine has one.
"""

from typing import TYPE_CHECKING

import zimage_ref
from zimage_ref import __version__, lazy

from . import blas

blas.preload()  # here, because it has to come before MLX

__all__ = [
    "BackendError",
    "Checkpointed",
    "ConfigError",
    "DatasetError",
    "Done",
    "Encoded",
    "Event",
    "FormatError",
    "GenerateConfig",
    "GenerationRun",
    "LoRAFile",
    "ModelFolder",
    "Notice",
    "Previewed",
    "Quantization",
    "RunSettings",
    "Saved",
    "Saving",
    "SchedulerConfig",
    "Started",
    "Step",
    "Stopped",
    "Target",
    "TextEncoderConfig",
    "TrainConfig",
    "TrainPlan",
    "TrainingError",
    "TransformerConfig",
    "VAEConfig",
    "Validated",
    "WeightError",
    "ZImageError",
    "ZImagePipeline",
    "__version__",
    "combine_loras",
    "diagnose",
    "is_first",
    "make_plan",
    "merge_loras",
    "open_source",
    "read_lora",
    "resolve_base_precision",
    "train",
    "write_lora",
    "write_model",
]  # fmt: skip

if TYPE_CHECKING:  # for type checkers and editors; at run time the table below does the same, name by name
    from zimage_ref import (
        BackendError,
        ConfigError,
        DatasetError,
        FormatError,
        GenerateConfig,
        GenerationRun,
        LoRAFile,
        ModelFolder,
        Quantization,
        RunSettings,
        SchedulerConfig,
        Target,
        TextEncoderConfig,
        TrainConfig,
        TrainingError,
        TransformerConfig,
        VAEConfig,
        WeightError,
        ZImageError,
        combine_loras,
        merge_loras,
        open_source,
        read_lora,
        write_lora,
        write_model,
    )
    from zimage_ref.training.events import (
        Checkpointed,
        Done,
        Encoded,
        Event,
        Notice,
        Previewed,
        Saved,
        Saving,
        Started,
        Step,
        Stopped,
        Validated,
    )
    from zimage_ref.training.plan import TrainPlan, make_plan

    from .doctor.run import diagnose
    from .pipeline import ZImagePipeline
    from .training.machines import is_first
    from .training.precision import resolve_base_precision
    from .training.run import train
else:
    __getattr__, __dir__ = lazy.attributes(__name__, {
        "zimage_ref": zimage_ref.__all__,  # the pipeline is this package's own, further down
        "zimage_ref.training.events": [
            "Checkpointed", "Done", "Encoded", "Event", "Notice", "Previewed", "Saved", "Saving", "Started", "Step",
            "Stopped", "Validated",
        ],
        "zimage_ref.training.plan": ["TrainPlan", "make_plan"],
        ".doctor.run": ["diagnose"],
        ".pipeline": ["ZImagePipeline"],
        ".training.machines": ["is_first"],
        ".training.precision": ["resolve_base_precision"],
        ".training.run": ["train"],
    })  # fmt: skip
