"""A parameter that a file holds whole, W' = W_new. PEFT writes such for `modules_to_save`.

Source: ModulesToSaveWrapper of peft; `set_weight` of ComfyUI's loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from zimage_ref.formats.tensors import Array

from .arithmetic import AnyArray, Arithmetic
from .parts import Parts
from .updates import Update


@dataclass(frozen=True)
class Whole(Update):
    """W_new - W. A scale s below 1 gives a mean, (1 - s) W + s W_new."""

    title = "whole parameter"
    style = "whole"
    suffixes: ClassVar[Mapping[str, str]] = {
        ".set_weight": "whole", ".set_bias": "whole_bias", ".modules_to_save": "whole",
    }  # fmt: skip
    forms = ({"whole"},)

    W: Array  # the parameter's shape, float32

    @classmethod
    def of_parts(cls, parts: Parts) -> Whole:
        """Made from the parameter, which has no alpha."""
        return cls(parts.stored_whole("whole", cls.title))

    def tensors(self) -> dict[str, Array]:
        """The parameter."""
        return {"whole": self.W}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.W.shape

    @property
    def scale(self) -> float:
        """1: it has no alpha."""
        return 1.0

    def added(self, weight: AnyArray, arithmetic: Arithmetic[AnyArray]) -> AnyArray:
        """W_new - W."""
        return arithmetic.array(self.W) - weight

    def norm(self) -> float:
        """The norm of the new parameter. The norm of the change depends on the base."""
        return float(np.linalg.norm(self.W))

    def folded(self) -> Whole:
        """Itself."""
        return self

    def rows(self, start: int, stop: int) -> Whole:
        """Rows of the parameter."""
        return replace(self, W=self.W[start:stop])
