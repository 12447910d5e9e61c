"""The sizes and constants of a model. They are read from the JSON of the checkpoint, never assumed.

The `OFFICIAL_*` presets are the configs of Tongyi-MAI/Z-Image-Turbo. They are used if a single-file checkpoint has no
config beside it; its shapes must then match them. A config is refused, by the name of the key, if a key that changes
the mathematics has a value that this program does not implement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import Json, JsonObject

from .config_reader import Reader, block_facts, check_values

ADALN_DIM = 256  # the largest width of the time embedding; official transformer_z_image.py, ADALN_EMBED_DIM
TIME_HIDDEN_DIM = 1024  # inner width of t_embedder; the same file, mid_size
TIME_FREQUENCIES = 256  # sinusoidal features of the time; the same file, frequency_embedding_size
QK_NORM_EPS = 1e-5  # fixed in the official block, whatever norm_eps says


@dataclass(frozen=True)
class TransformerConfig:
    """The single-stream diffusion transformer (S3-DiT)."""

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    in_channels: int
    cap_feat_dim: int
    patch_size: int
    norm_eps: float
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        check_values(self)
        if self.dim % self.n_heads:
            raise ConfigError(f"transformer: dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim != sum(self.axes_dims):
            raise ConfigError(
                f"transformer: head width {self.head_dim} differs from the sum of axes_dims {sum(self.axes_dims)}"
            )
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3 or any(d % 2 for d in self.axes_dims):
            raise ConfigError(
                f"transformer: axes_dims {self.axes_dims} and axes_lens {self.axes_lens} must be three, and even"
            )

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """The inner width of the feed-forward."""
        return int(self.dim / 3 * 8)

    @property
    def adaln_dim(self) -> int:
        """The width of the time embedding that modulates the blocks."""
        return min(self.dim, ADALN_DIM)

    @property
    def patch_dim(self) -> int:
        """The number of values in one image token."""
        return self.patch_size**2 * self.in_channels

    @property
    def patch_key(self) -> str:
        """The key of this patch size in the checkpoint, "spatial-temporal", such as "2-1"."""
        return f"{self.patch_size}-1"

    @classmethod
    def from_json(cls, data: Json, source: str) -> TransformerConfig:
        """Reads diffusers' `transformer/config.json`. Raises ConfigError naming `source`."""
        read = Reader(data, source)
        patch_size = read.patch_size()
        read.require_if_there("siglip_feat_dim", None)
        return cls(
            patch_size=patch_size,
            axes_dims=tuple(read.value("axes_dims")),
            axes_lens=tuple(read.value("axes_lens")),
            **{key: read.value(key) for key in _TRANSFORMER_KEYS},
        )

    def to_json(self) -> JsonObject:
        """The official keys and their values."""
        return {
            "_class_name": "ZImageTransformer2DModel",
            **{key: getattr(self, key) for key in _TRANSFORMER_KEYS},
            **block_facts(self.n_heads, self.patch_size),
            "axes_dims": list(self.axes_dims),
            "axes_lens": list(self.axes_lens),
        }


_TRANSFORMER_KEYS = (
    "dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim",
    "norm_eps", "rope_theta", "t_scale",
)  # fmt: skip


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen3. The pipeline uses all its layers except the last one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        check_values(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text encoder: {self.num_attention_heads} heads are not a multiple of "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.num_hidden_layers < 2:
            raise ConfigError(f"text encoder: hidden_states[-2] needs 2 layers, not {self.num_hidden_layers}")

    @property
    def used_layers(self) -> int:
        """The number of layers that hidden_states[-2] depends on."""
        return self.num_hidden_layers - 1

    @classmethod
    def from_json(cls, data: Json, source: str) -> TextEncoderConfig:
        """Reads the `config.json` of transformers, version 4 (`rope_theta`) or version 5 (`rope_parameters`)."""
        read = Reader(data, source)
        read.require("model_type", "qwen3")
        read.require("hidden_act", "silu")
        read.require_if_there("attention_bias", False)
        read.require_if_there("rope_scaling", None)
        read.require_if_there("use_sliding_window", False)
        rope = data.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ConfigError(f"{source}: rope_type {rope['rope_type']!r} is not supported, only 'default'")
        theta = rope["rope_theta"] if "rope_theta" in rope else read.value("rope_theta")
        return cls(rope_theta=theta, **{key: read.value(key) for key in _TEXT_ENCODER_KEYS})

    def to_json(self) -> JsonObject:
        """The official keys and values, in the form of the published file (transformers 4)."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        }


_TEXT_ENCODER_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """The Flux autoencoder."""

    in_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float

    def __post_init__(self) -> None:
        check_values(self)
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ConfigError(f"vae: {channels} channels are not a multiple of {self.norm_num_groups} groups")

    @property
    def factor(self) -> int:
        """Pixels per latent along one side. Every level except the last halves the picture."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, data: Json, source: str) -> VAEConfig:
        """Reads diffusers' `vae/config.json`."""
        read = Reader(data, source)
        read.require("act_fn", "silu")
        read.require("use_quant_conv", False)
        read.require("use_post_quant_conv", False)
        read.require_if_there("mid_block_add_attention", True)
        read.require("out_channels", read.value("in_channels"))
        read.require_if_there("latents_mean", None)
        read.require_if_there("latents_std", None)
        widths = tuple(read.value("block_out_channels"))
        levels = len(widths)
        read.require("down_block_types", ["DownEncoderBlock2D"] * levels)
        read.require("up_block_types", ["UpDecoderBlock2D"] * levels)
        return cls(block_out_channels=widths, **{key: read.value(key) for key in _VAE_KEYS})

    def to_json(self) -> JsonObject:
        """The official keys and their values."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **{key: getattr(self, key) for key in _VAE_KEYS},
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "out_channels": self.in_channels,
            "mid_block_add_attention": True,
            "force_upcast": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }


_VAE_KEYS = (
    "in_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor", "shift_factor",
)  # fmt: skip


@dataclass(frozen=True)
class SchedulerConfig:
    """FlowMatchEulerDiscreteScheduler: the spacing of the sigmas. `flow` uses it."""

    shift: float
    use_dynamic_shifting: bool = False

    def __post_init__(self) -> None:
        check_values(self)

    @classmethod
    def from_json(cls, data: Json, source: str) -> SchedulerConfig:
        """Reads diffusers' `scheduler/scheduler_config.json`."""
        read = Reader(data, source)
        read.require("_class_name", "FlowMatchEulerDiscreteScheduler")
        read.require("num_train_timesteps", 1000)
        for key in ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            read.require_if_there(key, None)
        for key in ("invert_sigmas", "stochastic_sampling"):
            read.require_if_there(key, False)
        read.require_if_there("time_shift_type", "exponential")
        return cls(shift=read.value("shift"), use_dynamic_shifting=bool(data.get("use_dynamic_shifting", False)))

    def to_json(self) -> JsonObject:
        """The official keys and their values."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **asdict(self)}


OFFICIAL_TRANSFORMER = TransformerConfig(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, in_channels=16, cap_feat_dim=2560, patch_size=2,
    norm_eps=1e-5, rope_theta=256.0, t_scale=1000.0, axes_dims=(32, 48, 48), axes_lens=(1536, 512, 512),
)  # fmt: skip
OFFICIAL_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1_000_000,
)  # fmt: skip
OFFICIAL_VAE = VAEConfig(
    in_channels=3, latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip
OFFICIAL_SCHEDULER = SchedulerConfig(shift=3.0)  # Turbo's; the base model's file says 6


def size_multiple(transformer: TransformerConfig, vae: VAEConfig) -> int:
    """The side of one image token in pixels. Width and height of a picture must be multiples of it."""
    return vae.factor * transformer.patch_size
