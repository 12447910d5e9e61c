"""What the speed cases are measured with: time, memory, utilisation; and the table of all rows."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from zimage_mlx.device import on_gpu
from zimage_ref.model import config

CAPTION = 64  # tokens


class Bench:
    """Measures cases and keeps their rows."""

    def __init__(self, transformer: config.TransformerConfig, sides: list[int]) -> None:
        self.config, self.sides, self.rows = transformer, sides, list[dict[str, Any]]()
        a, b = (mx.random.normal((8192, 8192)).astype(mx.bfloat16) for _ in range(2))
        mx.eval(a, b)
        self.peak = 2 * 8192**3 / self._median(lambda: mx.eval(a @ b), 8) if on_gpu() else math.nan

    def measure(
        self, case: str, run: Callable[[], Any], flops: float = math.nan, runs: int = 6, before: float | None = None
    ) -> float:
        """One row: milliseconds, TFLOP/s, utilisation, peak over `before` (bytes; None: what is in memory now)."""
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory() if before is None else before
        try:
            run()
            run()
            mx.reset_peak_memory()
            seconds = self._median(run, runs)
        except (RuntimeError, ValueError) as error:
            self.rows.append({"case": case, "error": str(error)[:120]})
            print(json.dumps(self.rows[-1]), flush=True)
            return math.nan
        row = {"case": case, "ms": seconds * 1e3, "over_gb": (mx.get_peak_memory() - before) / 1e9}
        if not math.isnan(flops):
            row["tflops"] = flops / seconds / 1e12
        if not math.isnan(flops / self.peak):
            row["mfu"] = flops / seconds / self.peak
        self.rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        print(json.dumps(self.rows[-1]), flush=True)
        return seconds

    def _median(self, run: Callable[[], Any], runs: int) -> float:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def flops(self, side: int, batch: int = 1) -> float:
        """Of one forward pass: matrix products and attention."""
        c, image = self.config, (side // 16) ** 2

        def blocks(count: int, tokens: int) -> float:
            weights = 4 * c.dim**2 + 3 * c.dim * c.ffn_dim
            return count * (2 * tokens * weights + 4 * tokens**2 * c.dim)

        return batch * (
            blocks(c.n_layers, image + CAPTION)
            + blocks(c.n_refiner_layers, image)
            + blocks(c.n_refiner_layers, CAPTION)
        )


def random_(model: Any) -> Any:
    """`model` with small random bfloat16 weights."""
    model.update(tree_map(lambda p: (mx.random.normal(p.shape) * 0.02).astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def random_caption(transformer: config.TransformerConfig) -> mx.array:
    """(CAPTION, cap_feat_dim) bfloat16."""
    return mx.random.normal((CAPTION, transformer.cap_feat_dim)).astype(mx.bfloat16)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratio to mflux where it was measured."""
    peers = {r["case"].removeprefix("mflux "): r["ms"] for r in rows if r["case"].startswith("mflux") and "ms" in r}
    lines = ["| case | ms | TFLOP/s | MFU | over GB | of mflux |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        ratio = f"{row['ms'] / peers[row['case']]:.2f}" if row["case"] in peers and "ms" in row else ""
        cells = [row.get("ms", row.get("error", "")), row.get("tflops", ""), row.get("mfu", ""), row.get("over_gb", "")]
        lines.append(f"| {row['case']} | " + " | ".join(map(str, cells)) + f" | {ratio} |")
    return "\n".join(lines)
