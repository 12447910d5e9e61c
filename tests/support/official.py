"""The official networks with the weights of `tiny`: what golden files are made from, and live comparisons run on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from transformers import Qwen3Config, Qwen3Model

from zimage_ref.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from zimage_ref.model.control import ControlNetConfig, controlnet_unused

torch.set_num_threads(1)  # the networks are tiny: threads that wait for each other cost more

Weights = Mapping[str, np.ndarray]


def transformer(config: TransformerConfig, weights: Weights) -> ZImageTransformer2DModel:
    """diffusers' transformer in float64, its time frequencies rounded correctly."""
    model = _loaded(ZImageTransformer2DModel.from_config(config.to_json()), weights)
    model.t_embedder.timestep_embedding = time_features
    return model


def time_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """TimestepEmbedder.timestep_embedding with an exact exponential, everything else in float32 as there.

    torch's float32 exp is one unit off for two of the frequencies, differently so on other processors; times up to
    1000 turn that into 3e-5 of an angle, thirty times what golden files are held to.
    """
    exponent = -math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2)
    angle = t[:, None].float() * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@torch.no_grad()
def denoise(model: ZImageTransformer2DModel, x: np.ndarray, t: np.ndarray, captions: Sequence[np.ndarray]) -> Any:
    """Its raw output (B, C, h, w)."""
    patch_size = model.config.all_patch_size[0]
    images = [torch.from_numpy(image).to(model.dtype)[:, None] for image in x]  # (C, 1, h, w)
    texts = [torch.from_numpy(caption).to(model.dtype) for caption in captions]
    out = model(images, torch.from_numpy(t), texts, patch_size=patch_size, return_dict=False)[0]
    return torch.stack(list(out)).squeeze(2).numpy()


def controlnet(
    config: ControlNetConfig, weights: Weights, transformer: ZImageTransformer2DModel
) -> ZImageControlNetModel:
    """diffusers' ControlNet in float64, with the parts that it shares with `transformer`."""
    used = {name: array for name, array in weights.items() if name not in controlnet_unused(config)}
    model = _loaded(ZImageControlNetModel.from_config(config.to_json()), used)
    return ZImageControlNetModel.from_transformer(model, transformer)


@torch.no_grad()
def denoise_controlled(
    model: ZImageTransformer2DModel, network: ZImageControlNetModel, inputs: Mapping[str, np.ndarray], scale: float
) -> Any:
    """The raw output (B, C, h, w) of the transformer with a ControlNet. inputs: x, t, context, caption0, ..."""
    images = [torch.from_numpy(image).to(model.dtype)[:, None] for image in inputs["x"]]  # (C, 1, h, w)
    context = torch.from_numpy(inputs["context"]).to(model.dtype)[0, :, None]
    texts = [torch.from_numpy(inputs[key]).to(model.dtype) for key in sorted(inputs) if key.startswith("caption")]
    t = torch.from_numpy(inputs["t"])
    samples = network(images, t, texts, [context] * len(images), conditioning_scale=scale)
    out = model(images, t, texts, controlnet_block_samples=samples, return_dict=False)[0]
    return torch.stack(list(out)).squeeze(2).numpy()


@torch.no_grad()
def block(
    model: ZImageTransformer2DModel, name: str, x: np.ndarray, ids: np.ndarray, mask: np.ndarray, adaln: np.ndarray
) -> Any:
    """One of its blocks on tokens x (B, S, D) at position ids (S, 3), with mask (B, S) and time embedding adaln."""
    rotation = model.rope_embedder(torch.from_numpy(ids))[None].expand(len(x), -1, -1)
    inputs = torch.from_numpy(x).to(model.dtype), torch.from_numpy(mask), rotation
    return model.get_submodule(name)(*inputs, torch.from_numpy(adaln).to(model.dtype)).numpy()


def text_encoder(config: TextEncoderConfig, weights: Weights) -> Qwen3Model:
    """transformers' Qwen3 in float64."""
    model = Qwen3Model(Qwen3Config(**config.to_json()))
    return _loaded(model, {name.removeprefix("model."): array for name, array in weights.items()})


@torch.no_grad()
def encode_tokens(model: Qwen3Model, ids: np.ndarray) -> Any:
    """hidden_states[-2] (T, hidden_size) of ids (T,)."""
    states = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    return states[-2][0].numpy()


def vae(config: VAEConfig, weights: Weights) -> AutoencoderKL:
    """diffusers' autoencoder in float64."""
    return _loaded(AutoencoderKL.from_config(config.to_json()), weights)


@torch.no_grad()
def encode(model: AutoencoderKL, image: np.ndarray) -> Any:
    """Scaled latents of an image batch in [-1, 1]."""
    mode = model.encode(torch.from_numpy(image).to(model.dtype)).latent_dist.mode()
    return ((mode - model.config.shift_factor) * model.config.scaling_factor).numpy()


@torch.no_grad()
def decode(model: AutoencoderKL, latents: np.ndarray) -> Any:
    """Images of scaled latents, about [-1, 1]."""
    unscaled = torch.from_numpy(latents).to(model.dtype) / model.config.scaling_factor + model.config.shift_factor
    return model.decode(unscaled, return_dict=False)[0].numpy()


def sigmas(steps: int, shift: float) -> list[float]:
    """The sigmas that the official pipeline samples at."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    return scheduler.sigmas.tolist()


def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    """diffusers' whole pipeline from a model folder."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control_pipeline(folder: Path, network: Path, inpaint: bool = False) -> Any:
    """diffusers' pipeline from a model folder and the folder of a ControlNet."""
    kind = ZImageControlNetInpaintPipeline if inpaint else ZImageControlNetPipeline
    pipe = kind(**pipeline(folder).components, controlnet=ZImageControlNetModel.from_pretrained(network))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: ZImagePipeline, prompt: str, noise: np.ndarray, steps: int, output: str, guidance: float, negative: str
) -> Any:
    """What it makes of noise (1, C, h, w): latents (C, h, w) for output "latent", pixels (H, W, 3) for "np"."""
    factor = pipe.vae_scale_factor
    result = pipe(
        [prompt], height=noise.shape[2] * factor, width=noise.shape[3] * factor, num_inference_steps=steps,
        guidance_scale=guidance, negative_prompt=[negative], latents=torch.from_numpy(noise), output_type=output,
    )  # fmt: skip
    return np.asarray(result.images[0])


def _loaded(model: Any, weights: Weights) -> Any:
    model = model.double().eval()
    model.load_state_dict({name: torch.from_numpy(array).double() for name, array in weights.items()}, strict=True)
    return model
