"""The decoder of TAEF1, a tiny autoencoder for the latents of FLUX.1, which are those of Z-Image: layers and shapes.

Source: AutoencoderTiny and DecoderTiny of diffusers, whose layer numbers these are; madebyollin/taef1.
"""

from __future__ import annotations

from .parameters import Shapes

BLOCKS = (3, 3, 3, 1)  # of each level; between two levels the sides double
BLOCK_CONVS = (0, 2, 4)  # the convolutions of a block; a ReLU between two
LIMIT = 3.0  # latents are limited to this, smoothly


def layers() -> list[str]:
    """The layers in order: conv, relu, block, double, bare (a convolution without bias), last."""
    kinds = ["conv", "relu"]
    for level, count in enumerate(BLOCKS):
        kinds += ["block"] * count
        kinds += ["double", "bare"] if level < len(BLOCKS) - 1 else ["last"]
    return kinds


def tiny_decoder_parameters(latents: int, width: int) -> Shapes:
    """Every parameter by the name that diffusers gives it, without `decoder.`."""
    shapes: Shapes = {}
    for i, kind in enumerate(layers()):
        name = f"layers.{i}"
        if kind == "block":
            for j in BLOCK_CONVS:
                shapes[f"{name}.conv.{j}.weight"] = (width, width, 3, 3)
                shapes[f"{name}.conv.{j}.bias"] = (width,)
        elif kind in ("conv", "bare", "last"):
            outputs, inputs = 3 if kind == "last" else width, latents if kind == "conv" else width
            shapes[f"{name}.weight"] = (outputs, inputs, 3, 3)
            shapes |= {} if kind == "bare" else {f"{name}.bias": (outputs,)}
    return shapes
