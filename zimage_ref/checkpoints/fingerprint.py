"""Fingerprints that distinguish the weights of models: digests of some kilobytes of each tensor.

    model_fingerprint    of a whole model, for the record in a picture
    part_digests         of each network and of the tokenizer, for the training cache and for resuming a run

A fine-tune changes every tensor, so a sample of each is enough. Reading samples takes a moment, reading all a minute.
Files keep digests, and they may be compared years later. If you change what is digested, old files no longer match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

from zimage_ref.formats.files import sha256
from zimage_ref.formats.packed import PackedTensor
from zimage_ref.formats.quantize import QuantizedTensor, unfold
from zimage_ref.formats.tensors import Tensor, Tensors

from .folder import ModelFolder

_SAMPLE = 512  # elements of each tensor in the fingerprint of a model
_EDGE = 1024  # elements at each end of each tensor in the digest of a part


def sampled_digest(samples: Iterable[tuple[str, Tensor | None]], first: int, last: int = 0, about: str = "") -> str:
    """The SHA-256, in hexadecimal, of `about` and of all samples.

    Of a sample its label is digested, then the `first` and the `last` elements of its tensor, if it has one.
    """
    digest = hashlib.sha256(about.encode())
    for label, tensor in samples:
        digest.update(label.encode())
        if tensor is not None:
            flat = tensor.read().reshape(-1)
            digest.update(flat[:first].tobytes())
            digest.update(flat[len(flat) - min(last, len(flat)) :].tobytes())
    return digest.hexdigest()


def model_fingerprint(model: ModelFolder) -> str:
    """The `weights_fingerprint` of all networks of `model`."""
    return weights_fingerprint(model.weights)


def weights_fingerprint(weights: Mapping[str, Tensors]) -> str:
    """The digest of networks, by name: names, shapes, dtypes and first elements of their tensors."""

    def samples() -> Iterator[tuple[str, Tensor | None]]:
        for component, tensors in weights.items():
            for name, tensor in sorted(tensors.items()):
                stored = _as_stored(tensor)
                yield f"{component} {name} {tensor.shape} {tensor.stored_as}", None if stored.storage else stored

    return sampled_digest(samples(), _SAMPLE)


def part_digests(model: ModelFolder) -> dict[str, str]:
    """The digest of each part of `model`, including the tokenizer, by the name of the part."""
    digests = {name: _weights_digest(model.weights[name], model.configs[name].to_json()) for name in model.weights}
    return digests | {"tokenizer": sha256(model.tokenizer)}


def _as_stored(tensor: Tensor) -> Tensor:
    """The numbers of `tensor` as the file has them: those of a packed tensor could only be decoded as a whole."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.packed
    return tensor.raw["weight"] if isinstance(tensor, PackedTensor) else tensor


def _weights_digest(tensors: Tensors, config: Mapping[str, object]) -> str:
    """The digest of one network: its config, and names, shapes, dtypes, first and last elements of its tensors."""
    stored = sorted(unfold(tensors).items())
    samples = ((f"{name} {tensor.shape} {tensor.dtype.str}", _as_stored(tensor)) for name, tensor in stored)
    return sampled_digest(samples, _EDGE, _EDGE, json.dumps(config, sort_keys=True))
