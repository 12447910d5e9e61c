"""Pipelines of the small random model that the tests of generation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.networks import BACKENDS, pipeline


@pytest.fixture(params=BACKENDS, scope="module")
def pipe(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    """A pipeline of each engine, float32."""
    return pipeline(request.param, model_dir)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    """The pipeline of the NumPy engine."""
    return pipeline("numpy", model_dir)
