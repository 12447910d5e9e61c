"""What MLX's Metal backend must not be asked for. Read in MLX 0.31.0 to 0.32.4; nothing here has run on a Mac."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import cases, tiny
from support.macs import pretend
from support.networks import HAS_MLX, native, network

if not HAS_MLX:
    pytest.skip("mlx is not installed", allow_module_level=True)

import mlx.core as mx
from support.metal_routes import is_winograd

from zimage_mlx import ZImagePipeline
from zimage_mlx.networks.ops import attention, query_chunks
from zimage_mlx.networks.quantized import QuantizedLinear
from zimage_mlx.networks.strips import Strips
from zimage_mlx.networks.vae import VAE
from zimage_mlx.networks.weights import load
from zimage_ref.doctor.remembered import Figures
from zimage_ref.formats.quantize import BITS
from zimage_ref.formats.tensors import Tensor
from zimage_ref.generation.sizes import MAX_AREA
from zimage_ref.model import parameters
from zimage_ref.model.config import OFFICIAL_TRANSFORMER, OFFICIAL_VAE
from zimage_ref.model.tokenizer import MAX_TOKENS

WAYS = {"encode": "image", "decode": "latents"}


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each convolution that is made: whether Metal would make it by Winograd's method."""
    found: list[bool] = []
    conv2d, conv_general = mx.conv2d, mx.conv_general

    def plain(x: mx.array, w: mx.array, stride: Any = 1, *args: Any, **kwargs: Any) -> mx.array:
        found.append(is_winograd(x.shape, w.shape, stride, False))
        return conv2d(x, w, stride, *args, **kwargs)

    def general(x: mx.array, w: mx.array, *args: Any, flip: bool = False, **kwargs: Any) -> mx.array:
        found.append(is_winograd(x.shape, w.shape, kwargs.get("stride", 1), flip))
        return conv_general(x, w, *args, flip=flip, **kwargs)

    monkeypatch.setattr(mx, "conv2d", plain)
    monkeypatch.setattr(mx, "conv_general", general)
    return found


def official_vae() -> VAE:
    """The official autoencoder, its weights zeros that take no memory of their own."""
    shapes = parameters.vae_parameters(OFFICIAL_VAE)
    tensors = {
        name: Tensor(shape, np.dtype("<f2"), lambda shape=shape: np.broadcast_to(np.float16(0), shape))
        for name, shape in shapes.items()
    }
    vae = VAE(OFFICIAL_VAE)
    load(vae, tensors, mx.bfloat16)
    return vae


@pytest.mark.parametrize("metal", [False, True])
def test_no_convolution_of_the_official_autoencoder_is_made_by_winograd_on_metal(
    metal: bool, convolutions: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if metal:
        pretend(monkeypatch)
    vae = official_vae()
    for side in (512, 2048):
        vae.encode(mx.zeros((1, 3, side, side)))  # lazy: nothing is computed
        vae.decode(mx.zeros((1, 16, side // 8, side // 8)))
    assert len(convolutions) > 100 and any(convolutions) is not metal


@pytest.mark.parametrize("nbytes", [None, 100_000])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", tiny.VAES)
def test_the_other_convolution_makes_the_same(
    config: str, way: str, nbytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny.random_weights(parameters.vae_parameters(tiny.VAES[config]))
    given = native("mlx", cases.read(f"vae_{config}")[WAYS[way]])
    expected = np.array(getattr(network("mlx", "vae", tiny.VAES[config], weights, "float32"), way)(given))
    pretend(monkeypatch)
    model = network("mlx", "vae", tiny.VAES[config], weights, "float32")
    made = getattr(model, way)(given, Strips(nbytes) if nbytes else None)
    if nbytes:
        np.testing.assert_allclose(np.array(made), expected, rtol=1e-4, atol=1e-4)
    else:
        assert np.abs(np.array(made) - expected).max() == 0


def widths() -> list[int]:
    """The tokens of pictures of many sizes, up to the largest that the command line takes."""
    sides = [512, 768, 1024, 1536, 2048]
    areas = [a * b for a in sides for b in sides if a * b <= MAX_AREA]
    assert max(areas) == MAX_AREA
    return sorted({area // 256 + caption for area in areas for caption in (32, MAX_TOKENS)})


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_no_attention_takes_long_enough_for_macos_to_end_it(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, width = OFFICIAL_TRANSFORMER.n_heads, OFFICIAL_TRANSFORMER.head_dim
    pretend(monkeypatch)
    for tokens in widths():
        chunks = query_chunks((batch, heads, tokens, width))
        rows = [len(range(*chunk.indices(tokens))) for chunk in chunks]
        assert sum(rows) == tokens and max(rows) - min(rows) < len(rows)
        assert 4 * batch * heads * max(rows) * tokens * width < 1.51e12
    assert len(query_chunks((1, heads, 4096 + 128, width))) == 1


def test_elsewhere_attention_takes_all_queries_at_once() -> None:
    assert query_chunks((8, 30, 16448, 128)) == [slice(None)]


@pytest.mark.parametrize("masked", ["none", "keys", "all"])
def test_attention_in_chunks_is_the_same(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    B, H, S, K = 2, 3, 50, 16
    q, k, v = (mx.random.normal((B, H, S, K), key=mx.random.key(i)) for i in range(3))
    mask = {
        "none": None,
        "keys": mx.arange(S)[None, None, None] < mx.array([40, 50])[:, None, None, None],
        "all": mx.arange(S)[None, None, :, None] >= mx.arange(S)[None, None, None],
    }[masked]

    def made() -> list[np.ndarray]:
        out, gradients = mx.vjp(lambda q, k, v: attention(q, k, v, mask), [q, k, v], [mx.ones((B, H, S, K))])
        return [np.array(a) for a in (*out, *gradients)]

    expected = made()
    pretend(monkeypatch)
    monkeypatch.setattr("zimage_mlx.networks.ops._LONGEST_KERNEL", 4 * B * H * S * K * 16)
    assert len(query_chunks(q.shape)) == 4
    for ours, theirs in zip(made(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_weights_of_4_bits_stay_packed_on_metal_if_memory_is_short(
    memory: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr("zimage_mlx.networks.quantized._UNPACK_FROM_ROWS", 2)
    unpacked: list[Any] = []
    dequantize = mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *a, **k: unpacked.append(a[0].shape) or dequantize(*a, **k))
    pipe = ZImagePipeline.from_pretrained(model_dir, "float32", lean=memory == "lean", quantize=4)
    pipe("a fox", width=32, height=32, steps=1, output="latents")
    linear = [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert linear and bool(unpacked) is (memory == "fast")


@pytest.mark.parametrize(("speeds", "packed"), [
    ({"4": 1.2, "8": 0.8}, {3, 4, 5, 6}), ({"4": 0.8, "8": 1.2}, {8}), ({"8": 1.2}, {3, 4, 5, 6, 8}), ({}, set()),
])  # fmt: skip
def test_weights_stay_packed_if_the_doctor_measured_that_it_is_faster(
    speeds: dict[str, float], packed: set[int], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(Figures, "of_this_machine", lambda: Figures({"packed_speed": speeds}))
    pipes = {bits: ZImagePipeline.from_pretrained(model_dir, quantize=bits) for bits in BITS}
    assert {bits for bits, pipe in pipes.items() if not pipe.unpack} == packed
    assert ZImagePipeline.from_pretrained(model_dir).unpack
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert ZImagePipeline.from_pretrained(model_dir, quantize=4).unpack
