"""The three networks of Z-Image as files know them: which component and dialect a checkpoint is, and its weights.

A file is judged by the names in it, never by its own name: the component and dialect whose names it shares most are
what it is, and then every tensor must be there, known, and of the right shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from zimage_ref.errors import ConfigError, FormatError, WeightError, listing
from zimage_ref.formats.checkpoint import Checkpoint
from zimage_ref.formats.json_file import read_json
from zimage_ref.formats.tensors import DTYPE_NAMES, FLOATS, Tensor, Tensors
from zimage_ref.model import config as cfg
from zimage_ref.model import parameters as model_parameters
from zimage_ref.model.config import TextEncoderConfig, TransformerConfig, VAEConfig

from .dialects import DIALECTS, Dialect, Layout, taken


@dataclass(frozen=True)
class Component:
    """One network: how its config is read, which parameters it has, what files call it."""

    title: str
    config: Any  # the config class
    official: Any  # its published values
    parameters: Callable[[Any], model_parameters.Shapes]
    unused: Callable[[Any], set[str]]  # parameters that the file may hold and the pipeline does not need
    prefixes: tuple[str, ...]  # that other programs put before the names, longest first
    ignored: tuple[str, ...]  # tensors that are left unread: copies, or without effect


COMPONENTS = {
    "transformer": Component(
        "transformer", TransformerConfig, cfg.OFFICIAL_TRANSFORMER, model_parameters.transformer_parameters,
        lambda config: set(),
        ("model.diffusion_model.", "diffusion_model."), ("norm_final.weight", "final_layer.norm_final.weight"),
    ),
    "text_encoder": Component(
        "text encoder", TextEncoderConfig, cfg.OFFICIAL_TEXT_ENCODER, model_parameters.text_encoder_parameters,
        model_parameters.text_encoder_unused,
        ("text_encoders.qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.transformer.", "model."),
        ("lm_head.weight", "output.weight", "rope_freqs.weight"),  # the embedding again, and a table
    ),
    "vae": Component(
        "autoencoder", VAEConfig, cfg.OFFICIAL_VAE, model_parameters.vae_parameters, lambda config: set(),
        ("first_stage_model.", "vae."), (),
    ),
}  # fmt: skip
_PREFIXES = sorted(
    ((prefix, name) for name, kind in COMPONENTS.items() for prefix in kind.prefixes), key=lambda p: -len(p[0])
)


@dataclass(frozen=True)
class Identity:
    """What a file is, judged by its names; `sizes` is a config whose sizes are read off the shapes in it."""

    component: str
    dialect: Dialect
    sizes: Any
    prefix: str  # what was before the names

    def __str__(self) -> str:
        prefix = f", prefix {self.prefix}" if self.prefix else ""
        return f"{COMPONENTS[self.component].title} ({self.dialect.name} names{prefix})"


def identify(tensors: Tensors, wanted: str | None = None) -> Identity | None:
    """The component and dialect of whose names `tensors` hold the largest share; None if a quarter at most.

    In a file of several components it is `wanted`, if that is one of them.
    """
    best, share = None, 0.25
    for component in sorted(COMPONENTS, key=lambda name: name != wanted):
        if best and best.component == wanted:
            break
        own, prefix = _own(tensors, component)
        for dialect in DIALECTS[component].values():
            sizes = _sizes(dialect, own)
            layout = _layout(dialect, sizes)
            found = len(layout.keys() & own.keys()) / len(layout)
            if found > share:
                best, share = Identity(component, dialect, sizes, prefix), found
    return best


def official_weights(
    file: Checkpoint, component: str, config: Any | None = None, identity: Identity | None = None
) -> dict[str, Tensor]:
    """Every tensor of `component` that `file` holds, by official name, in the official order.

    `config`: what the shapes must fit; None to take the sizes from the file itself. Raises WeightError for tensors
    that are missing, unknown, there twice, or of a wrong shape or dtype, and for a file of another component.
    """
    identity = identity or identify(file.tensors, component)
    kind = COMPONENTS[component]
    if identity is None or identity.component != component:
        raise WeightError(f"{file.path}: holds no {kind.title}: it looks like {looks_like(file.tensors, identity)}")
    config = config or identity.sizes
    own, _ = _own(file.tensors, component, file.path)
    shapes, unused = kind.parameters(config), kind.unused(config)
    layout = _layout(identity.dialect, config)
    expected = {name: group[0][1].stored(shapes[group[0][0]]) for name, group in layout.items()}
    needed = {name for name, group in layout.items() if any(part not in unused for part, _ in group)}
    require(own, expected, needed, kind.ignored, file.path)
    homes = {part: (name, home) for name, group in layout.items() for part, home in group}
    return {
        part: taken(own[homes[part][0]], homes[part][1], shape)
        for part, shape in shapes.items()
        if homes[part][0] in own
    }


@lru_cache(64)
def _layout(dialect: Dialect, config: Any) -> Layout:
    return dialect.layout(COMPONENTS[dialect.component].parameters(config), config)


def require(
    tensors: Tensors, expected: model_parameters.Shapes, needed: set[str], ignored: Iterable[str], path: Path
) -> None:
    """Raises WeightError, listing every kind of misfit, unless the tensors are those expected."""
    faults = {
        "missing": [name for name in expected if name in needed and name not in tensors],
        "unknown": [name for name in tensors if name not in expected and name not in ignored],
        "wrongly shaped": [
            f"{name} {tensor.shape} instead of {expected[name]}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "not of floating point": [
            f"{name} {tensor.stored_as}"
            for name, tensor in tensors.items()
            if name in expected and DTYPE_NAMES.get(tensor.dtype) not in FLOATS
        ],
    }
    if any(faults.values()):
        facts = "; ".join(f"{len(v)} {kind}: {listing(v)}" for kind, v in faults.items() if v)
        raise WeightError(f"{path}: does not fit the model ({len(expected)} tensors): {facts}")


def looks_like(tensors: Tensors, identity: Identity | None = None) -> str:
    """What a file seems to be, in words."""
    identity = identity or identify(tensors)
    if any(".lora_" in name or "lora_unet" in name for name in tensors):
        return "a LoRA"
    if identity:
        return f"a Z-Image {identity}" if identity.component != "text_encoder" else f"a Qwen3 {identity}"
    return f"something else: it holds {listing(tensors, 3) or 'no tensors'}"


def config_of(file: Checkpoint, component: str, folder: Path | None = None) -> Any | None:
    """The config of `file`: in its own record, else as JSON beside it or in `folder`; None if it is nowhere.

    Raises ConfigError or FormatError where what is there cannot be read.
    """
    kind = COMPONENTS[component].config
    own = file.record.get("config")
    if own is not None:
        if not isinstance(own, Mapping):
            raise FormatError(f"{file.path}: its record has a config that is no JSON object")
        return parse_config(kind, own, str(file.path))
    beside = file.path.parent / "config.json"
    places = [beside, *([folder / component / "config.json"] if folder else [])]
    for path in places:
        if path.is_file() and (path != beside or _is_of(path, component)):
            return parse_config(kind, read_json(path, ConfigError), str(path))
    if file.path.parent.name == component and folder and file.path.parent.parent == folder:
        raise ConfigError(f"{beside}: is missing")
    return None


def parse_config(kind: Any, data: Mapping[str, Any], source: str) -> Any:
    """The config of class `kind` in `data`. Raises ConfigError naming `source`, also for values of a wrong type."""
    try:
        return kind.from_json(data, source)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"{source}: has a value of a wrong kind: {error}") from error


def _is_of(path: Path, component: str) -> bool:
    """Whether the config.json beside a file is that component's: folders of single files hold foreign ones."""
    data = read_json(path, ConfigError)
    key = {"transformer": "axes_dims", "text_encoder": "head_dim", "vae": "latent_channels"}[component]
    return key in data or path.parent.name == component


def _own(tensors: Tensors, component: str, path: Path | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of `component` without their prefix, and the prefix.

    In a file of several components those of the others are left out; otherwise a foreign name stays, to be refused.
    """
    owners = {name: next(((p, c) for p, c in _PREFIXES if name.startswith(p)), ("", component)) for name in tensors}
    prefixes = [prefix for prefix, owner in owners.values() if owner == component and prefix]
    own: dict[str, Tensor] = {}
    for name, (prefix, owner) in owners.items():
        if owner == component:
            short = name.removeprefix(prefix)
        elif prefixes:
            continue
        else:
            short = name
        if short in own and path:
            raise WeightError(f"{path}: {short} is there twice, with and without the prefix {prefixes[0]}")
        own[short] = tensors[name]
    return own, prefixes[0] if prefixes else ""


def _sizes(dialect: Dialect, tensors: Tensors) -> Any:
    """A config of the sizes that the shapes of `tensors` tell; official where they tell nothing."""
    official = COMPONENTS[dialect.component].official
    try:
        return _SIZES[dialect.component](dialect, tensors)
    except (ConfigError, IndexError, ZeroDivisionError):
        return official


def _count(tensors: Tensors, pattern: str, default: int) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    return min(max(numbers) + 1, len(tensors)) if numbers else default


def _shape(dialect: Dialect, tensors: Tensors, name: str, rank: int, config: Any) -> tuple[int, ...]:
    """The official shape of one tensor. Raises ConfigError if the file lacks it or holds no such thing."""
    home = dialect.home(name, (0,) * rank, config)
    tensor = tensors.get(home.name)
    if tensor is None or len(tensor.shape) != len(home.stored((0,) * rank)) or 0 in tensor.shape:
        raise ConfigError(f"{home.name} tells no size")
    return home.official(tensor.shape)


def _transformer_sizes(dialect: Dialect, tensors: Tensors) -> TransformerConfig:
    official = cfg.OFFICIAL_TRANSFORMER
    keys = {int(m[1]) for name in tensors if (m := re.match(r"all_x_embedder\.r?(\d{1,3})[-_]1\.", name))}
    counted = replace(
        official,
        n_layers=_count(tensors, r"layers\.(\d{1,4})\.", official.n_layers),
        n_refiner_layers=_count(tensors, r"noise_refiner\.(\d{1,4})\.", official.n_refiner_layers),
        patch_size=keys.pop() if len(keys) == 1 else official.patch_size,
    )
    dim, patch_dim = _shape(dialect, tensors, f"all_x_embedder.{counted.patch_key}.weight", 2, counted)
    (head_dim,) = _shape(dialect, tensors, "layers.0.attention.norm_q.weight", 1, counted)
    (cap_feat_dim,) = _shape(dialect, tensors, "cap_embedder.0.weight", 1, counted)
    third = head_dim // 6 * 2
    known = head_dim == official.head_dim
    return replace(
        counted, dim=dim, n_heads=dim // head_dim, cap_feat_dim=cap_feat_dim,
        in_channels=patch_dim // counted.patch_size**2,
        axes_dims=official.axes_dims if known else (head_dim - 2 * third, third, third),
    )  # fmt: skip


def _text_encoder_sizes(dialect: Dialect, tensors: Tensors) -> TextEncoderConfig:
    official = cfg.OFFICIAL_TEXT_ENCODER
    layers = _count(tensors, r"(?:layers|blk)\.(\d{1,4})\.", official.num_hidden_layers)
    counted = replace(official, num_hidden_layers=layers)
    layer = "model.layers.0"
    vocabulary, hidden = _shape(dialect, tensors, "model.embed_tokens.weight", 2, counted)
    (head,) = _shape(dialect, tensors, f"{layer}.self_attn.q_norm.weight", 1, counted)
    queries, _ = _shape(dialect, tensors, f"{layer}.self_attn.q_proj.weight", 2, counted)
    keys, _ = _shape(dialect, tensors, f"{layer}.self_attn.k_proj.weight", 2, counted)
    ffn, _ = _shape(dialect, tensors, f"{layer}.mlp.gate_proj.weight", 2, counted)
    return replace(
        counted, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, head_dim=head,
        num_attention_heads=queries // head, num_key_value_heads=keys // head,
    )  # fmt: skip


def _vae_sizes(dialect: Dialect, tensors: Tensors) -> VAEConfig:
    official = cfg.OFFICIAL_VAE
    levels = _count(tensors, r"decoder\.up(?:_blocks)?\.(\d{1,2})\.", len(official.block_out_channels))
    blocks = _count(tensors, r"decoder\.up(?:_blocks)?\.0\.(?:block|resnets)\.(\d{1,2})\.", 0)
    counted = replace(official, block_out_channels=(official.norm_num_groups,) * levels, layers_per_block=blocks - 1)
    widths = [
        _shape(dialect, tensors, f"decoder.up_blocks.{level}.resnets.0.norm2.weight", 1, counted)[0]
        for level in reversed(range(levels))
    ]
    _, latent, *_ = _shape(dialect, tensors, "decoder.conv_in.weight", 4, counted)
    (channels,) = _shape(dialect, tensors, "decoder.conv_out.bias", 1, counted)
    known = all(width % official.norm_num_groups == 0 for width in widths)
    return replace(
        counted, block_out_channels=tuple(widths), latent_channels=latent, in_channels=channels,
        norm_num_groups=official.norm_num_groups if known else 1,
    )  # fmt: skip


_SIZES: dict[str, Callable[[Dialect, Tensors], Any]] = {
    "transformer": _transformer_sizes, "text_encoder": _text_encoder_sizes, "vae": _vae_sizes,
}  # fmt: skip
