"""Files of TAEF1's decoder, for previews: those of diffusers, and the single files of its author.

diffusers     decoder.layers.3.conv.0.weight
its author    3.conv.0.weight, numbered from one higher; with decoder. or taesd_decoder. before it in other programs
"""

from __future__ import annotations

import re
from pathlib import Path

from zimage_ref.errors import WeightError
from zimage_ref.formats.checkpoint import Checkpoint, find_weights
from zimage_ref.formats.tensors import Tensor
from zimage_ref.model.tiny_decoder import tiny_decoder_parameters

from .folder import ModelFolder

_DIFFUSERS = re.compile(r"decoder\.layers\.(\d{1,3})\.(.+)")
_AUTHOR = re.compile(r"(?:taesd_decoder\.|decoder\.)?(\d{1,3})\.(.+)")


def read_tiny_decoder(path: Path, model: ModelFolder) -> dict[str, Tensor]:
    """The tensors of the decoder in `path`, a file or folder, by the names of `tiny_decoder_parameters`.

    Raises FormatError if there is none, WeightError if it is another network or not for the latents of `model`.
    """
    file = Checkpoint.open(find_weights(path) if path.is_dir() else path)
    found = _named(file, _DIFFUSERS, 0) or _named(file, _AUTHOR, -1)
    first = found.get("layers.0.weight")
    width, latents = first.shape[:2] if first is not None and len(first.shape) == 4 else (0, 0)
    shapes = tiny_decoder_parameters(latents, width)
    if {name: tensor.shape for name, tensor in found.items()} != shapes:
        raise WeightError(f"{file.path}: holds no decoder of TAEF1: take that of madebyollin/taef1")
    if latents != model.vae.latent_channels:
        raise WeightError(
            f"{file.path}: decodes {latents} latent channels, and this model has {model.vae.latent_channels}: "
            f"TAEF1 is the one for Z-Image"
        )
    return found


def _named(file: Checkpoint, pattern: re.Pattern[str], shift: int) -> dict[str, Tensor]:
    """The tensors whose names match, by the names and numbers of diffusers."""
    matches = ((pattern.fullmatch(name), tensor) for name, tensor in file.tensors.items())
    return {f"layers.{int(match[1]) + shift}.{match[2]}": tensor for match, tensor in matches if match}
