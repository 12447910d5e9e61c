"""The networks of both packages behind one constructor, so that one test holds both to the same numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zimage_ref
import zimage_ref.networks.controlnet
import zimage_ref.networks.text_encoder
import zimage_ref.networks.transformer
import zimage_ref.networks.vae
from zimage_ref.formats.tensors import BFLOAT16, Tensor, cast
from zimage_ref.model import parameters
from zimage_ref.model.control import controlnet_parameters, controlnet_unused
from zimage_ref.networks.weights import Weights

HAS_MLX = find_spec("mlx") is not None
if HAS_MLX:
    import mlx.core as mx

    import zimage_mlx
    import zimage_mlx.networks.controlnet
    import zimage_mlx.networks.text_encoder
    import zimage_mlx.networks.transformer
    import zimage_mlx.networks.vae
    from zimage_mlx.networks.weights import DTYPES, load

long_only = pytest.mark.skipif(not os.environ.get("ZIMAGE_LONG"), reason="takes minutes: set ZIMAGE_LONG=1")
mlx_only = pytest.mark.skipif(not HAS_MLX, reason="mlx is not installed")
BACKENDS = ["numpy", pytest.param("mlx", marks=mlx_only)]
PARAMETERS = {
    "transformer": parameters.transformer_parameters,
    "text_encoder": parameters.text_encoder_parameters,
    "vae": parameters.vae_parameters,
    "controlnet": controlnet_parameters,
}
_UNUSED = {"text_encoder": parameters.text_encoder_unused, "controlnet": controlnet_unused}
_CLASSES = {"transformer": "Transformer", "text_encoder": "TextEncoder", "vae": "VAE", "controlnet": "ControlNet"}


def network(backend: str, component: str, config: Any, weights: Mapping[str, np.ndarray], dtype: str) -> Any:
    """A network of `backend` with `weights` (float32 arrays by official name), working in `dtype`."""
    module = getattr((zimage_ref if backend == "numpy" else zimage_mlx).networks, component)
    build = getattr(module, _CLASSES[component])
    tensors = {name: Tensor.of(array) for name, array in weights.items()}
    if backend == "numpy":
        return build(config, Weights(tensors, np.dtype(dtype)))
    unused = _UNUSED[component](config) if component in _UNUSED else set()
    model = build(config)
    load(model, {name: tensor for name, tensor in tensors.items() if name not in unused}, DTYPES[dtype])
    return model


def control(backend: str, network: Any, context: np.ndarray, scale: float) -> Any:
    """The ControlNet `network` at work: with a control picture (1, control_in_dim, h, w) and a scale."""
    package = zimage_ref if backend == "numpy" else zimage_mlx
    return package.networks.controlnet.Control(network, native(backend, context), scale)


def native(backend: str, array: np.ndarray) -> Any:
    """A NumPy array as the backend's own."""
    return array if backend == "numpy" else mx.array(array)


def stored(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Weights as a checkpoint of `dtype` holds them, so that only the arithmetic is compared."""
    kind = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": BFLOAT16}[dtype]
    return {name: cast(cast(array, kind), np.dtype("<f4")) for name, array in weights.items()}


def pipeline(backend: str, folder: Path, dtype: str | None = "float32", **options: Any) -> Any:
    """The whole pipeline of `backend`."""
    package = zimage_ref if backend == "numpy" else zimage_mlx
    return package.ZImagePipeline.from_pretrained(folder, dtype, **options)
