"""The autoencoder: its dialects and its Component.

    diffusers   the official names: `model.parameters`
    ldm         CompVis's names: up blocks counted from the other end, attention as 1x1 convolutions
    burn        the original Rust tool: LDM's names, gamma and beta for norms
    mflux       the official names except at the ends of both halves; convolutions are channels last
    channels last   the official names, and such convolutions

Sources: convert_ldm_vae_checkpoint in diffusers' single_file_utils.py; burn's nn modules.
"""

from __future__ import annotations

import re
from dataclasses import replace

from zimage_ref.formats.tensors import Tensors
from zimage_ref.model.config import OFFICIAL_VAE, VAEConfig
from zimage_ref.model.parameters import vae_parameters

from .component import Component, count_numbered
from .dialects import CONVOLUTION_RANK, LINEAR_RANK, OFFICIAL, Dialect, Placement, Shape, renamed
from .mflux import MFLUX_FILES

_LDM = {
    r"\.(down|up)_blocks\.(\d+)\.resnets\.": r".\1.\2.block.",
    r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.": r".\1.\2.\3sample.conv.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.group_norm\.": ".mid.attn_1.norm.",
    r"\.mid_block\.attentions\.0\.to_([qkv])\.": r".mid.attn_1.\1.",
    r"\.mid_block\.attentions\.0\.to_out\.0\.": ".mid.attn_1.proj_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
}
_BURN = {
    r"\.mid\.": ".mid_",
    r"(norm|norm1|norm2|norm_out)\.weight$": r"\1.gamma",
    r"(norm|norm1|norm2|norm_out)\.bias$": r"\1.beta",
}
_MFLUX = {
    r"^decoder\.conv_(in|out)\.": r"decoder.conv_\1.conv.",
    r"^encoder\.conv_(in|out)\.": r"encoder.conv_\1.conv2d.",
    r"\.conv_norm_out\.": ".conv_norm_out.norm.",
}


def _mflux(name: str, shape: Shape, config: object) -> Placement:
    return Placement(renamed(name, _MFLUX), channels_last=len(shape) == CONVOLUTION_RANK)


def _channels_last(name: str, shape: Shape, config: object) -> Placement:
    return Placement(name, channels_last=len(shape) == CONVOLUTION_RANK)


def _ldm(name: str, shape: Shape, config: VAEConfig) -> Placement:
    last = len(config.block_out_channels) - 1
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda up: f".up_blocks.{last - int(up[1])}.", name)
    return Placement(renamed(name, _LDM), spatial=len(shape) == LINEAR_RANK)


def _burn(name: str, shape: Shape, config: VAEConfig) -> Placement:
    placement = _ldm(name, shape, config)
    return replace(placement, name=renamed(placement.name, _BURN))


def _sizes(dialect: Dialect[VAEConfig], tensors: Tensors) -> VAEConfig:
    groups = OFFICIAL_VAE.norm_num_groups
    levels = count_numbered(tensors, r"decoder\.up(?:_blocks)?\.(\d{1,2})\.", len(OFFICIAL_VAE.block_out_channels))
    blocks = count_numbered(tensors, r"decoder\.up(?:_blocks)?\.0\.(?:block|resnets)\.(\d{1,2})\.", 0)
    counted = replace(OFFICIAL_VAE, block_out_channels=(groups,) * levels, layers_per_block=blocks - 1)
    norms = [f"decoder.up_blocks.{level}.resnets.0.norm2.weight" for level in reversed(range(levels))]
    widths = tuple(dialect.official_shape(tensors, norm, 1, counted)[0] for norm in norms)
    _, latent, *_ = dialect.official_shape(tensors, "decoder.conv_in.weight", 4, counted)
    (channels,) = dialect.official_shape(tensors, "decoder.conv_out.bias", 1, counted)
    return replace(
        counted,
        block_out_channels=widths,
        latent_channels=latent,
        in_channels=channels,
        norm_num_groups=groups if all(width % groups == 0 for width in widths) else 1,
    )


_LDM_DIALECT = Dialect("ldm", _ldm)
_MFLUX_DIALECT = Dialect("mflux", _mflux, whole=True, files=MFLUX_FILES)

VAE = Component(
    name="vae",
    title="autoencoder",
    official=OFFICIAL_VAE,
    config_key="latent_channels",
    parameters=vae_parameters,
    sizes=_sizes,
    not_quantized="it is small and made of convolutions",
    dialects=(OFFICIAL, _LDM_DIALECT, Dialect("burn", _burn), _MFLUX_DIALECT, Dialect("channels last", _channels_last)),
    namings={"diffusers": OFFICIAL, "comfy": _LDM_DIALECT, "ldm": _LDM_DIALECT, "mflux": _MFLUX_DIALECT},
    prefixes=("first_stage_model.", "vae."),
    library=("diffusers", "AutoencoderKL"),
    flat_stems=("ae",),
    comfy_folders=("vae",),
    model_types=("autoencoder", "ae", "vae"),
)
