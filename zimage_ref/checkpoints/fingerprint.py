"""What tells the weights of one model from those of another: a digest of some kilobytes of each tensor.

    model_fingerprint    of a whole model, for the record in a picture
    part_digests         of each network and of the tokenizer, for the training cache and for resuming a run

A fine-tune changes every tensor, so a sample of each is enough, and takes a moment instead of a minute.
Digests are kept in files and compared years later: a change of what is digested makes old files look foreign.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

from zimage_ref.formats.files import sha256
from zimage_ref.formats.quantize import QuantizedTensor, unfold
from zimage_ref.formats.tensors import Tensor, Tensors

from .folder import ModelFolder

_SAMPLE = 512  # elements of a tensor that the fingerprint of a model takes
_EDGE = 1024  # elements at either end of a tensor that the digest of a part takes


def sampled_digest(samples: Iterable[tuple[str, Tensor | None]], first: int, last: int = 0, about: str = "") -> str:
    """SHA-256 in hexadecimal of `about` and of every sample: its label, then its tensor's `first` and `last` elements.

    A sample without a tensor is its label alone.
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
    """The digest of all networks of `model` together: names, shapes, dtypes and first numbers of their tensors."""

    def samples() -> Iterator[tuple[str, Tensor | None]]:
        for component, tensors in model.weights.items():
            for name, tensor in sorted(tensors.items()):
                stored = tensor.packed if isinstance(tensor, QuantizedTensor) else tensor
                # a tensor of another program's quantized format would have to be decoded whole
                yield f"{component} {name} {tensor.shape} {tensor.stored_as}", None if stored.storage else stored

    return sampled_digest(samples(), _SAMPLE)


def part_digests(model: ModelFolder) -> dict[str, str]:
    """The digest of each part of `model`, the tokenizer too, by the part's name."""
    digests = {name: _weights_digest(model.weights[name], model.configs[name].to_json()) for name in model.weights}
    return digests | {"tokenizer": sha256(model.tokenizer)}


def _weights_digest(tensors: Tensors, config: Mapping[str, object]) -> str:
    """The digest of one network: its config, and names, shapes, dtypes and both ends of its tensors."""
    stored = sorted(unfold(tensors).items())
    samples = ((f"{name} {tensor.shape} {tensor.dtype.str}", tensor) for name, tensor in stored)
    return sampled_digest(samples, _EDGE, _EDGE, json.dumps(config, sort_keys=True))
