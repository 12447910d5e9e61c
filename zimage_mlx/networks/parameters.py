"""The type of parameters by name."""

from __future__ import annotations

import mlx.core as mx

Parameters = dict[str, mx.array]  # parameters of a module, or their gradients, by name
