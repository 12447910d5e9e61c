"""The ControlNet of Z-Image: its sizes, its variants, and the names and shapes of its parameters.

A control block is a block of the transformer with a Linear layer behind it, `after_proj`. The first block of a stack
has another before it, `before_proj`. The variants of alibaba-pai differ in three things:

    variant   control blocks at layers   input channels   the first tokens come from
    1.0       0 5 10 15 20 25            16               two plain blocks
    2.0       0 2 4 ... 28               33               the control blocks of the layers, on the picture alone
    2.1       0 2 4 ... 28               33               two control blocks of their own
    2.1 lite  0 10 20                    33               as 2.1

Source: controlnet_z_image.py of diffusers (ZImageControlNetModel); config/z_image of VideoX-Fun.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import Json, JsonObject

from .config import OFFICIAL_TRANSFORMER, TransformerConfig
from .config_reader import Reader, block_facts, check_values
from .parameters import Shapes, block_parameters, linear

PLAIN, SHARED, OWN = "", "control_layers", "control_noise_refiner"  # values of `refiner`; "" is null in JSON
_FEW_LAYERS = 6  # with at most so many control blocks at OWN, a variant is called lite


@dataclass(frozen=True)
class ControlNetConfig:
    """The sizes of a ControlNet."""

    dim: int
    n_heads: int
    n_refiner_layers: int
    norm_eps: float
    patch_size: int
    control_in_dim: int  # channels of its input
    control_layers_places: tuple[int, ...]  # layers of the transformer that get a hint
    control_refiner_layers_places: tuple[int, ...]  # blocks of its noise refiner that get one
    refiner: str  # the blocks that make the first tokens: PLAIN, SHARED or OWN

    def __post_init__(self) -> None:
        check_values(self)
        places = self.control_layers_places
        if not places or places[0] != 0 or list(places) != sorted(set(places)):
            raise ConfigError(f"ControlNet: control_layers_places {places} must rise from 0")
        if self.refiner not in (PLAIN, SHARED, OWN):
            raise ConfigError(f"ControlNet: add_control_noise_refiner {self.refiner!r} is unknown")
        if self.dim % self.n_heads or self.dim // self.n_heads < 6:
            raise ConfigError(f"ControlNet: dim {self.dim} is not a multiple of n_heads {self.n_heads}")

    @property
    def inpaints(self) -> bool:
        """Whether it takes a mask and the kept part of a picture, too: the input has latents twice and one mask."""
        return self.control_in_dim == 2 * OFFICIAL_TRANSFORMER.in_channels + 1

    @property
    def patch_dim(self) -> int:
        """The number of values in one token of its input."""
        return self.patch_size**2 * self.control_in_dim

    @property
    def blocks(self) -> TransformerConfig:
        """The config of its blocks. They get rotations from the transformer, so axes and captions do not count."""
        return replace(
            OFFICIAL_TRANSFORMER, dim=self.dim, n_heads=self.n_heads, norm_eps=self.norm_eps,
            patch_size=self.patch_size, axes_dims=(self.dim // self.n_heads - 4, 2, 2),
        )  # fmt: skip

    @property
    def variant(self) -> str:
        """Its name for people: 1.0, 2.0, 2.1 or 2.1 lite, and what it takes."""
        number = {PLAIN: "1.0", SHARED: "2.0", OWN: "2.1"}[self.refiner]
        lite = " lite" if self.refiner == OWN and len(self.control_layers_places) < _FEW_LAYERS else ""
        takes = ", takes a mask" if self.inpaints else ""
        count = len(self.control_layers_places)
        return f"{number}{lite}: {count} block{'s' * (count > 1)}, {self.control_in_dim} channels{takes}"

    @classmethod
    def from_json(cls, data: Json, source: str) -> ControlNetConfig:
        """Reads diffusers' `controlnet/config.json`. Raises ConfigError naming `source`."""
        read = Reader(data, source)
        patch_size = read.patch_size()
        return cls(
            patch_size=patch_size,
            control_layers_places=tuple(read.value("control_layers_places")),
            control_refiner_layers_places=tuple(read.value("control_refiner_layers_places") or ()),
            refiner=read.value("add_control_noise_refiner") or PLAIN,
            **{key: read.value(key) for key in _KEYS},
        )

    def to_json(self) -> JsonObject:
        """The official keys and their values."""
        return {
            "_class_name": "ZImageControlNetModel",
            **{key: getattr(self, key) for key in _KEYS},
            **block_facts(self.n_heads, self.patch_size),
            "control_layers_places": list(self.control_layers_places),
            "control_refiner_layers_places": list(self.control_refiner_layers_places),
            "add_control_noise_refiner": self.refiner or None,
        }


_KEYS = ("dim", "n_heads", "n_refiner_layers", "norm_eps", "control_in_dim")

CONTROLNET_1_0 = ControlNetConfig(
    dim=3840, n_heads=30, n_refiner_layers=2, norm_eps=1e-5, patch_size=2, control_in_dim=16,
    control_layers_places=(0, 5, 10, 15, 20, 25), control_refiner_layers_places=(), refiner=PLAIN,
)  # fmt: skip
CONTROLNET_2_1 = replace(
    CONTROLNET_1_0, control_in_dim=33, control_layers_places=tuple(range(0, 30, 2)),
    control_refiner_layers_places=(0, 1), refiner=OWN,
)  # fmt: skip


def controlnet_parameters(config: ControlNetConfig) -> Shapes:
    """Every parameter of a ControlNet, with those of `controlnet_unused`."""
    dim, block = config.dim, block_parameters(config.blocks, modulated=True)
    shapes = linear(f"control_all_x_embedder.{config.blocks.patch_key}", config.patch_dim, dim)
    for name in _blocks(config):
        shapes.update({f"{name}.{part}": shape for part, shape in block.items()})
        if config.refiner == PLAIN and name.startswith(OWN):
            continue
        for projection in ("before_proj", "after_proj")[not name.endswith(".0") :]:
            shapes.update(linear(f"{name}.{projection}", dim, dim))
    return shapes


def controlnet_unused(config: ControlNetConfig) -> set[str]:
    """The parameters that a file may hold although nothing uses them: in 2.0, those of the refiner."""
    if config.refiner != SHARED:
        return set()
    return {name for name in controlnet_parameters(config) if name.startswith(f"{OWN}.")}


def _blocks(config: ControlNetConfig) -> Iterator[str]:
    """The names of all its blocks."""
    for i in range(len(config.control_layers_places)):
        yield f"{SHARED}.{i}"
    for i in range(config.n_refiner_layers):
        yield f"{OWN}.{i}"


def check_pair(config: ControlNetConfig, transformer: TransformerConfig, source: str) -> None:
    """Raises ConfigError naming `source` unless a ControlNet of `config` fits `transformer`."""
    facts = {
        "width": (config.dim, transformer.dim),
        "heads": (config.n_heads, transformer.n_heads),
        "refiner blocks": (config.n_refiner_layers, transformer.n_refiner_layers),
        "patch size": (config.patch_size, transformer.patch_size),
    }
    for what, (own, needed) in facts.items():
        if own != needed:
            raise ConfigError(f"{source}: is a ControlNet of {what} {own}, the transformer has {needed}")
    last = config.control_layers_places[-1]
    if last >= transformer.n_layers:
        raise ConfigError(f"{source}: is a ControlNet for layer {last}, the transformer has {transformer.n_layers}")
    channels = transformer.in_channels
    if config.control_in_dim not in (channels, 2 * channels + 1):
        raise ConfigError(
            f"{source}: takes {config.control_in_dim} channels: known are {channels} and {2 * channels + 1}"
        )
