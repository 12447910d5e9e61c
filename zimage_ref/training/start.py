"""The matrices that a run begins with: new ones, or those of the LoRA that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import listing
from zimage_ref.formats.tensors import Array
from zimage_ref.lora.continued import Fresh, continued
from zimage_ref.lora.trained import MAGNITUDE, TRAINED, Factors, Matrices, UpdateSize
from zimage_ref.lora.updates import LoRA

_EXACT = 1e-5  # share of the norm of an update that rounding may take


@dataclass(frozen=True)
class Start:
    """First matrices, and what there is to say about them."""

    factors: Mapping[str, Factors]  # by layer
    notices: Sequence[str] = ()


def layer_matrices(shape: tuple[int, ...], kind: str, size: UpdateSize) -> Matrices:
    """The shapes of the matrices that train in a layer whose weight has `shape`."""
    outputs, inputs = shape
    return TRAINED[kind].matrices(outputs, inputs, size)


def new_matrices(shapes: Mapping[str, Matrices], kind: str, rng: np.random.Generator) -> dict[str, Factors]:
    """New matrices for every layer, drawn in the order of the layers."""
    return {layer: TRAINED[kind].initial(each, rng) for layer, each in shapes.items()}


def with_magnitudes(new: Mapping[str, Factors], model: ModelFolder) -> dict[str, Factors]:
    """The same with the lengths of the rows of each weight, (out,), as the magnitudes of DoRA."""
    return {
        layer: {**factors, MAGNITUDE: np.linalg.norm(_weight(model, layer), axis=1)} for layer, factors in new.items()
    }


def going_on(
    lora: LoRA, kind: str, sizes: Mapping[str, UpdateSize], new: Mapping[str, Factors], model: ModelFolder
) -> Start:
    """The matrices that go on from `lora`. Layers that it does not change begin with `new` ones."""
    factors, lost = dict(new), {}
    for layer in sizes.keys() & lora.keys():
        fresh = Fresh(kind, sizes[layer], new[layer], lambda layer=layer: _weight(model, layer))  # type: ignore[misc]
        factors[layer], lost[layer] = continued(lora[layer], fresh)
    return Start(factors, _said(lora, sizes, lost))


def _weight(model: ModelFolder, layer: str) -> Array:
    return model.weights["transformer"][f"{layer}.weight"].cast("f32").read()


def _said(lora: LoRA, sizes: Mapping[str, UpdateSize], lost: Mapping[str, float]) -> list[str]:
    """What became of the updates, in sentences."""
    changed = {layer: share for layer, share in lost.items() if share > _EXACT}
    exact, new = len(lost) - len(changed), len(sizes) - len(lost)
    said = [f"`init_lora`: {exact} layers go on exactly, {len(changed)} from the nearest that fits, {new} are new"]
    if changed:
        worst = max(changed, key=lambda layer: changed[layer])
        said.append(f"`init_lora`: the nearest that fits loses up to {changed[worst]:.1%} of an update: {worst}")
    if left_out := sorted(lora.keys() - sizes.keys()):
        said.append(
            f"`init_lora`: `targets` does not choose what {len(left_out)} updates change, so they are left out: "
            f"{listing(left_out, 5)}"
        )
    return said
