"""Macs that are not there: what MLX would say of them, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

GB = 1 << 30
# GB of memory -> what Metal recommends, in bytes: as reported by MLX, llama.cpp and others for such machines
RECOMMENDED = {
    8: 5_726_623_061, 16: 11_453_246_122, 24: 17_179_869_184, 36: 28_991_029_248, 64: 51_539_607_552,
    128: 115_448_725_504,
}  # fmt: skip


@dataclass
class FakeMac:
    """A Mac of some size, with what MLX was told there."""

    memory: int  # GB
    told: dict[str, int] = field(default_factory=dict)
    cleared: int = 0

    @property
    def limit(self) -> int:
        return RECOMMENDED[self.memory]


def pretend(monkeypatch: pytest.MonkeyPatch, memory: int = 16) -> FakeMac:
    """Makes the code of zimage_mlx believe that it runs on the GPU of a Mac; what computes is still the CPU."""
    import mlx.core as mx

    from zimage_mlx import device

    mac = FakeMac(memory)

    def info(asked: Any = None) -> dict[str, Any]:
        assert asked == mx.gpu, "the default device may be the CPU, which does not know"
        return {"memory_size": memory * GB, "max_recommended_working_set_size": mac.limit}

    def forget() -> None:
        mac.cleared += 1

    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "_usual_cache", [])  # of an earlier test that streamed
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", info)
    for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda nbytes, name=name: mac.told.update({name: nbytes}))
    monkeypatch.setattr(mx, "clear_cache", forget)
    return mac
