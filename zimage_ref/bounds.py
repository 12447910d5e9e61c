"""The bounds of every number that an option, a config of a model or a record can have. One table for each of them.

A number from outside is checked here before anything is made of it. So no list is as long as a number says, and no
value overflows. The upper ends are far above all use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from .errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """The lowest and the highest value of a number."""

    low: float
    high: float
    whole: bool = False  # only whole numbers
    above: bool = False  # `low` itself is out of bounds
    below: bool = False  # `high` itself is out of bounds

    def fault(self, value: object) -> str:
        """The bound that `value` breaks, in words; "" if it is within bounds."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return "must be a whole number" if self.whole else "must be a number"
        number = int(value) if isinstance(value, Integral) else float(value)
        if (self.low < number if self.above else self.low <= number) and (
            number < self.high if self.below else number <= self.high
        ):
            return ""
        if self.below:
            return f"must be at least {self.low:.15g} and below {self.high:.15g}"
        if number > self.high:
            return f"must be at most {self.high:.15g}"
        return f"must be {'above' if self.above else 'at least'} {self.low:.15g}"

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError naming the field `name` if `value` is out of bounds."""
        if fault := self.fault(value):
            raise ConfigError(f"`{name}` {value} {fault}")


def check_bounds(config: object, table: Mapping[str, Bounds]) -> None:
    """Raises ConfigError if a field of `config` that is in `table` is out of bounds. None is no number to check."""
    for name, bounds in table.items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                bounds.check(name, item)


def _count(high: float, low: int = 1) -> Bounds:
    return Bounds(low, high, whole=True)


_ANY_SIZE = 1 << 24
_SEED = Bounds(0, 2**64 - 1, whole=True)
_STEPS = _count(10_000)  # of denoising: a list of so many noise levels
_SIDE = Bounds(-_ANY_SIZE, _ANY_SIZE, whole=True)  # `check_side` and `check_area` say more, and name the nearest
_SHIFT = Bounds(1e-3, 1e3)
_GUIDANCE = Bounds(0, 1e3)
_EVERY = _count(1e9)  # a number above all steps means never

LORA_SCALE = Bounds(-1e3, 1e3)
PICTURE = {  # fields of GenerateConfig
    "width": _SIDE, "height": _SIDE, "steps": _STEPS, "guidance": _GUIDANCE, "shift": _SHIFT, "seed": _SEED,
    "cfg_normalization": Bounds(0, 1e3), "cfg_truncation": Bounds(0, 1), "strength": Bounds(0, 1),
    "control_start": Bounds(0, 1), "control_end": Bounds(0, 1), "lora_scale": LORA_SCALE,
    "upscale": Bounds(1, 4, above=True), "upscale_strength": Bounds(0, 1, above=True),
    "tile_size": Bounds(64, _ANY_SIZE, whole=True),
    "nag": Bounds(1, 1e3), "variety": Bounds(0, 1), "variety_until": Bounds(0, 1, above=True),
    "cache_min_steps": _STEPS,
}  # fmt: skip
RUN = {"batch_size": _count(4096), "preview_steps": _count(10_000, low=0)}  # fields of RunSettings
CACHE_THRESHOLD, CACHE_INTERVAL, CACHE_RATIO = Bounds(0, 10), _count(1000), Bounds(0, 100, above=True)
COUNT = _count(10_000)  # pictures of one command
CONTROL_SCALE = Bounds(0, 100)
LORA_RANK = _count(65_536)
TRAINING = {  # fields of TrainConfig
    "rank": LORA_RANK, "alpha": Bounds(0, 1e8, above=True), "factor": _count(1 << 17, low=-1),
    "epochs": _count(1e6), "steps": _count(1e8),
    "lr": Bounds(0, 1e3), "resolution": _SIDE, "batch_size": _count(4096), "grad_accumulation": _count(1e5),
    "seed": _SEED, "caption_dropout": Bounds(0, 1), "repeats": _count(1e4), "max_upscale": Bounds(1, 1e3),
    "validation_every": _EVERY, "weight_decay": Bounds(0, 1e3), "warmup": _count(1e8, low=0),
    "grad_clip": Bounds(0, 1e8), "ema": Bounds(0, 1, below=True), "lora_plus": Bounds(0, 1e4, above=True),
    "rank_dropout": Bounds(0, 1, below=True), "save_every": _count(1e9, low=0), "resume_every": _EVERY,
    "keep_last": _count(1e9, low=0), "preview_every": _EVERY, "preview_size": _SIDE, "preview_steps": _STEPS,
    "preview_guidance": _GUIDANCE, "mask_outside": Bounds(0, 1), "keep_tags": _count(1e6, low=0),
    "min_sigma": Bounds(0, 1, below=True), "max_sigma": Bounds(0, 1, above=True), "noise_offset": Bounds(0, 10),
    "dropout": Bounds(0, 1, below=True), "module_dropout": Bounds(0, 1, below=True),
    "differential_guidance": Bounds(0, 1e4, above=True), "huber_delta": Bounds(0, 1e4, above=True),
    "preserve_every": _EVERY, "preserve_weight": Bounds(0, 1e4),
}  # fmt: skip
PREVIEW = {  # fields of PreviewPrompt
    name: PICTURE[name] for name in ("width", "height", "steps", "guidance", "seed")
}
DATASET = {  # fields of DatasetOptions
    "weight": Bounds(0, 1e4), "repeats": TRAINING["repeats"], "resolution": _SIDE,
    "caption_dropout": TRAINING["caption_dropout"],
}  # fmt: skip
SERVER = {  # fields of ServeSettings
    "port": _count(65_535, low=0), "queue_size": _count(1e6), "max_pixels": _count(1e9), "max_steps": _STEPS,
    "max_count": COUNT, "max_upload_mb": _count(1e6), "max_lora_mb": _count(1e6), "batch_size": RUN["batch_size"],
    "idle_minutes": Bounds(0, 1e6),
}  # fmt: skip

_WIDTH, _HEADS, _LAYERS = _count(1 << 17), _count(4096), _count(999)
_EPS, _THETA = Bounds(0, 1, above=True), Bounds(0, 1e12, above=True)
LONGEST_LIST = 16  # numbers in one value of a model's config
MODEL = {  # keys in the configs of a model
    "dim": _WIDTH, "n_layers": _LAYERS, "n_refiner_layers": _LAYERS, "n_heads": _HEADS, "in_channels": _HEADS,
    "cap_feat_dim": _WIDTH, "patch_size": _count(64), "norm_eps": _EPS, "rope_theta": _THETA,
    "t_scale": Bounds(0, 1e6, above=True), "axes_dims": _WIDTH, "axes_lens": _count(1 << 20),
    "vocab_size": _count(_ANY_SIZE), "hidden_size": _WIDTH, "intermediate_size": _WIDTH, "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "head_dim": _WIDTH, "rms_norm_eps": _EPS,
    "latent_channels": _HEADS, "block_out_channels": _WIDTH, "layers_per_block": _LAYERS, "norm_num_groups": _WIDTH,
    "control_in_dim": _HEADS, "control_layers_places": _count(998, low=0),
    "control_refiner_layers_places": _count(998, low=0),
    "scaling_factor": Bounds(1e-6, 1e6), "shift_factor": Bounds(-1e6, 1e6), "shift": _SHIFT,
}  # fmt: skip
