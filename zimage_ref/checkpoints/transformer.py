"""The diffusion transformer: its dialects and its Component.

    diffusers      the official names: `model.parameters`
    comfy          ComfyUI's single file: q, k and v are one matrix, names have no patch size
    burn           the original Rust tool: comfy's names, Linear weights (in, out), gamma for norms
    burn of 2025   the same, with the patch size in the names
    mflux          the official names except three, as mflux-save writes them

Sources: convert_z_image_transformer_checkpoint_to_diffusers in diffusers' single_file_utils.py; burn's nn modules.
"""

from __future__ import annotations

import re
from dataclasses import replace

from zimage_ref.formats.tensors import Tensors
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, TransformerConfig
from zimage_ref.model.parameters import transformer_parameters

from .component import Component, count_numbered
from .dialects import LINEAR_RANK, OFFICIAL, Dialect, Placement, Shape, renamed
from .mflux import MFLUX_FILES

_COMFY = {
    r"^all_(x_embedder|final_layer)\.\d+-\d+\.": r"\1.",
    r"\.attention\.to_out\.0\.": ".attention.out.",
    r"\.attention\.norm_([qk])\.": r".attention.\1_norm.",
}
_QKV = re.compile(r"\.attention\.to_([qkv])\.")
_BURN = {
    r"\.attention\.out\.": ".attention.to_out.",
    r"\badaLN_modulation\.\d\.": "adaln_modulation.",
    r"^cap_embedder\.0\.weight$": "cap_embedder_0.gamma",
    r"^cap_embedder\.1\.": "cap_embedder_1.",
    r"^t_embedder\.mlp\.0\.": "t_embedder.mlp_1.",
    r"^t_embedder\.mlp\.2\.": "t_embedder.mlp_2.",
    r"(norm[12]?)\.weight$": r"\1.gamma",
}
_MFLUX = {
    r"^t_embedder\.mlp\.0\.": "t_embedder.linear1.",
    r"^t_embedder\.mlp\.2\.": "t_embedder.linear2.",
    r"^(all_final_layer\..*)\.adaLN_modulation\.1\.": r"\1.adaLN_modulation.0.",
}


def _mflux(name: str, shape: Shape, config: object) -> Placement:
    return Placement(renamed(name, _MFLUX))


def _comfy(name: str, shape: Shape, config: object) -> Placement:
    name = renamed(name, _COMFY)
    fused = _QKV.search(name)
    if fused:
        return Placement(_QKV.sub(".attention.qkv.", name), "qkv".index(fused[1]), 3)
    return Placement(name)


def _burn(name: str, shape: Shape, config: object) -> Placement:
    placement = _comfy(name, shape, config)
    linear = len(shape) == LINEAR_RANK and name.endswith(".weight")
    return replace(placement, name=renamed(placement.name, _BURN), transposed=linear)


def _burn_of_2025(name: str, shape: Shape, config: object) -> Placement:
    placement = _burn(name, shape, config)
    key = re.match(r"all_(?:x_embedder|final_layer)\.(\d+)-(\d+)\.", name)
    if key is None:
        return placement
    return replace(placement, name=re.sub(r"^(\w+)\.", rf"all_\1.r{key[1]}_{key[2]}.", placement.name))


def _sizes(dialect: Dialect[TransformerConfig], tensors: Tensors) -> TransformerConfig:
    keys = {int(m[1]) for name in tensors if (m := re.match(r"all_x_embedder\.r?(\d{1,3})[-_]1\.", name))}
    counted = replace(
        OFFICIAL_TRANSFORMER,
        n_layers=count_numbered(tensors, r"layers\.(\d{1,4})\.", OFFICIAL_TRANSFORMER.n_layers),
        n_refiner_layers=count_numbered(tensors, r"noise_refiner\.(\d{1,4})\.", OFFICIAL_TRANSFORMER.n_refiner_layers),
        patch_size=keys.pop() if len(keys) == 1 else OFFICIAL_TRANSFORMER.patch_size,
    )
    embedder = f"all_x_embedder.{counted.patch_key}.weight"
    dim, patch_dim = dialect.official_shape(tensors, embedder, 2, counted)
    (head_dim,) = dialect.official_shape(tensors, "layers.0.attention.norm_q.weight", 1, counted)
    (cap_feat_dim,) = dialect.official_shape(tensors, "cap_embedder.0.weight", 1, counted)
    third = head_dim // 6 * 2
    known = head_dim == OFFICIAL_TRANSFORMER.head_dim
    return replace(
        counted,
        dim=dim,
        n_heads=dim // head_dim,
        cap_feat_dim=cap_feat_dim,
        in_channels=patch_dim // counted.patch_size**2,
        axes_dims=OFFICIAL_TRANSFORMER.axes_dims if known else (head_dim - 2 * third, third, third),
    )


COMFY = Dialect("comfy", _comfy)
_MFLUX_DIALECT = Dialect("mflux", _mflux, whole=True, files=MFLUX_FILES)

TRANSFORMER = Component(
    name="transformer",
    title="transformer",
    official=OFFICIAL_TRANSFORMER,
    config_key="axes_dims",
    parameters=transformer_parameters,
    sizes=_sizes,
    dialects=(OFFICIAL, COMFY, Dialect("burn", _burn), Dialect("burn of 2025", _burn_of_2025), _MFLUX_DIALECT),
    namings={"diffusers": OFFICIAL, "comfy": COMFY, "mflux": _MFLUX_DIALECT},
    prefixes=("model.diffusion_model.", "diffusion_model."),
    ignored=("norm_final.weight", "final_layer.norm_final.weight"),
    library=("diffusers", "ZImageTransformer2DModel"),
    flat_stems=("z_image_turbo_f16", "z_image_turbo_bf16", "z_image_turbo", "z_image_bf16", "z_image"),
    comfy_folders=("diffusion_models", "unet"),
    model_types=("transformer", "t"),
)
