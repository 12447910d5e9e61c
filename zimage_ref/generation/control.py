"""A ControlNet at work: in which steps it acts, and what it is given.

Sources: pipeline_z_image_controlnet.py and pipeline_z_image_controlnet_inpaint.py of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from zimage_ref.checkpoints.control_file import ControlFile
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.errors import ConfigError
from zimage_ref.formats.tensors import Array
from zimage_ref.pictures.images import Picture, fit, to_array
from zimage_ref.pictures.maps import KINDS, map_of

from .config import GenerateConfig
from .control_options import control_and_scale


@dataclass(frozen=True)
class Control:
    """A ControlNet and the map that a picture follows."""

    file: ControlFile
    picture: Picture | None  # the map, at the size of the result; None: made of the picture that is enlarged
    scale: float
    start: float  # shares of the steps
    end: float
    kind: str = KINDS[0]  # of the map

    @classmethod
    def of(cls, config: GenerateConfig, source: Picture | None, model: ModelFolder) -> Control | None:
        """That of `config`, whose size is decided; `source` is the RGB picture. None if there is none.

        Raises the errors of `ControlFile.open` and `map_of`.
        """
        if config.control is None or config.width is None or config.height is None:
            return None
        path, scale = control_and_scale(config.control)
        own = cls(
            ControlFile.open(path, model), None, scale, config.control_start, config.control_end, config.control_kind
        )
        return own.following(source, config.width, config.height, config.fit)

    def following(self, source: Picture | None, width: int, height: int, fit_as: str) -> Control:
        """The same for a picture of width x height. source: the RGB picture to follow."""
        return replace(self, picture=None if source is None else map_of(fit(source, width, height, fit_as), self.kind))

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprint of the network, for a record."""
        return {"control": self.file.fingerprint}

    def acts(self, sigma: float, sigmas: Sequence[float]) -> bool:
        """Whether it acts at `sigma`, in a schedule `sigmas` that ends with 0: in steps wholly from start to end."""
        steps = len(sigmas) - 1
        index = max(sum(each >= sigma for each in sigmas) - 1, 0)
        return self.scale != 0 and index / steps >= self.start and (index + 1) / steps <= self.end

    def context(self, encode: Callable[[Array], Array], start: Picture | None, mask: Array | None) -> Array:
        """The input of the network, (1, control_in_dim, h, w).

        encode: pixels (1, 3, H, W) -> latents (1, C, h, w). start, mask: of the request. A network that takes masks
        gets the mask, 1 for kept pixels, and the latents of the kept part; zeros without a mask.
        """
        picture = self.picture
        if picture is None and start is not None:
            picture = map_of(start, self.kind)
        if picture is None:
            raise ConfigError("`control` needs `control_image`")
        latents = encode(_pixels(picture))
        missing = self.file.config.control_in_dim - latents.shape[1]
        if not missing:
            return latents
        _, _, h, w = latents.shape
        rest = np.zeros((1, missing, h, w), latents.dtype)
        if mask is not None and start is not None:
            rows, columns = (side // cells for side, cells in zip(mask.shape, (h, w), strict=True))
            rest[0, 0] = ~mask[::rows, ::columns]  # the nearest pixel of each latent
            rest[:, 1:] = encode(_pixels(start) * ~mask)
        return np.concatenate([latents, rest], axis=1)


def _pixels(picture: Picture) -> Array:
    return to_array(picture)[None]
