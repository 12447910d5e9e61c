"""Maps that a ControlNet follows, made from a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from zimage_ref.extras import optional_import

from .images import Picture

KINDS = ("none", "canny", "gray")  # none: the picture is a map already
_LOW, _HIGH = 100, 200  # thresholds of the gradient, those of ControlNet's own annotator


def map_of(picture: Picture, kind: str) -> Picture:
    """The map of `kind`, one of KINDS, of an RGB picture, as RGB of the same size.

    canny: white edges on black, by OpenCV (extra `control`). gray: brightness (ITU-R 601). Raises BackendError if
    OpenCV is missing.
    """
    if kind == "gray":
        return picture.convert("L").convert("RGB")
    if kind == "canny":
        cv2 = optional_import("cv2", "edges need OpenCV")
        edges = cv2.Canny(np.asarray(picture), _LOW, _HIGH)  # (H, W) of 0 and 255
        return Image.fromarray(edges).convert("RGB")
    return picture
