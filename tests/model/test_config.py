"""Configs: official files give the presets, both transformers styles are read, the unimplemented is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.cases import DATA

from zimage_ref.errors import ConfigError
from zimage_ref.formats.json_file import read_json
from zimage_ref.model import config as cfg
from zimage_ref.model.config import SchedulerConfig, TextEncoderConfig, TransformerConfig, VAEConfig

OFFICIAL = json.loads((DATA / "official_configs.json").read_text(encoding="utf-8"))  # as published, key for key
KINDS: dict[str, Any] = {
    "transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig, "scheduler": SchedulerConfig,
}  # fmt: skip
PRESETS = {
    "transformer": cfg.OFFICIAL_TRANSFORMER, "text_encoder": cfg.OFFICIAL_TEXT_ENCODER, "vae": cfg.OFFICIAL_VAE,
    "scheduler": cfg.OFFICIAL_SCHEDULER,
}  # fmt: skip
TINY = [*tiny.TRANSFORMERS.values(), *tiny.TEXT_ENCODERS.values(), *tiny.VAES.values(), SchedulerConfig(6.0, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_file_gives_the_preset(kind: str) -> None:
    assert KINDS[kind].from_json(OFFICIAL[kind], "config.json") == PRESETS[kind]


@pytest.mark.parametrize("config", TINY, ids=lambda c: type(c).__name__)
def test_what_is_written_is_read_back(config: Any) -> None:
    assert type(config).from_json(json.loads(json.dumps(config.to_json())), "config.json") == config


def test_derived_sizes_of_the_official_models() -> None:
    transformer = cfg.OFFICIAL_TRANSFORMER
    assert (transformer.head_dim, transformer.ffn_dim, transformer.adaln_dim) == (128, 10240, 256)
    assert (transformer.patch_dim, transformer.patch_key) == (64, "2-1")
    assert cfg.OFFICIAL_VAE.factor == 8 and cfg.OFFICIAL_TEXT_ENCODER.used_layers == 35


def test_rope_theta_is_read_in_the_style_of_transformers_five() -> None:
    data = {key: value for key, value in OFFICIAL["text_encoder"].items() if key != "rope_theta"}
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert TextEncoderConfig.from_json(data, "config.json").rope_theta == 5000


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("transformer", {"qk_norm": False}),
        ("transformer", {"n_kv_heads": 10}),
        ("transformer", {"siglip_feat_dim": 1152}),
        ("transformer", {"all_patch_size": [2, 4]}),
        ("transformer", {"all_f_patch_size": [2]}),
        ("transformer", {"n_heads": 31, "n_kv_heads": 31}),
        ("transformer", {"axes_dims": [32, 48, 46]}),
        ("text_encoder", {"model_type": "qwen2"}),
        ("text_encoder", {"attention_bias": True}),
        ("text_encoder", {"rope_scaling": {"type": "yarn"}}),
        ("text_encoder", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}),
        ("text_encoder", {"use_sliding_window": True}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder", {"num_key_value_heads": 5}),
        ("text_encoder", {"num_hidden_layers": 1}),
        ("vae", {"use_quant_conv": True}),
        ("vae", {"mid_block_add_attention": False}),
        ("vae", {"act_fn": "relu"}),
        ("vae", {"norm_num_groups": 33}),
        ("scheduler", {"_class_name": "DDIMScheduler"}),
        ("scheduler", {"use_karras_sigmas": True}),
        ("scheduler", {"invert_sigmas": True}),
        ("scheduler", {"shift_terminal": 0.1}),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(kind: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        KINDS[kind].from_json(OFFICIAL[kind] | change, "config.json")
    facts = (*change, "heads", "groups", "head width", "layers", "rope_type")
    assert "\n" not in str(caught.value) and any(fact in str(caught.value) for fact in facts)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("transformer", "norm_eps"), ("text_encoder", "rope_theta"), ("vae", "shift_factor"), ("scheduler", "shift")],
)
def test_a_missing_key_is_named_with_its_file(kind: str, key: str) -> None:
    data = {name: value for name, value in OFFICIAL[kind].items() if name != key}
    with pytest.raises(ConfigError, match=rf"some/config\.json: the key '{key}' is missing"):
        KINDS[kind].from_json(data, "some/config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(tmp_path / "config.json", ConfigError)
