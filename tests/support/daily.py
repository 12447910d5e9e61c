"""Which cases of a matrix every run goes through; the others are marked slow."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """`cases` for `parametrize`, all but the `chosen` ones marked slow; a tuple is one case of several values."""
    listed = list(cases)
    assert set(chosen) <= set(listed), f"no such case: {set(chosen) - set(listed)}"
    return [
        case
        if case in chosen
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in listed
    ]


_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
SIGNALS = daily(  # what ends a command early, and its exit code; Windows has no SIGHUP
    [(getattr(signal, name), code) for name, code in _CODES.items() if hasattr(signal, name)], (signal.SIGTERM, 143)
)
