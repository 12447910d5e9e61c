"""The figures of docs/macs.md are what the code computes."""

from __future__ import annotations

import re

import pytest
from support.networks import mlx_only
from support.pages import ROOT, read

from zimage_ref.doctor.prediction import Rates, TimeModel

PAGE = ROOT / "docs" / "macs.md"
ROW = re.compile(
    r"^\| (M\d[^|]*) \| ([\d.]+)(?:, with accelerators ([\d.]+))? \| (\d+) \|"
    r"[^|]*\| (forward|step lean) (\d+) \|[^|]*\| ([\d.]+) \|$",
    re.MULTILINE,
)


def test_the_formula_beside_what_others_measured() -> None:
    rows = ROW.findall(read(PAGE))
    assert len(rows) == 10
    for chip, peak, accelerated, bandwidth, work, side, shown in rows:
        flops, products = float(peak) * 1e12, float(accelerated or peak) * 1e12
        rates = Rates(0.7 * products, 0.5 * flops, 0.6 * products, 0.8 * float(bandwidth) * 1e9)
        model = TimeModel({"bf16": rates}, "bf16")
        seconds = model.forward("bf16", int(side)) if work == "forward" else model.step("bf16", int(side), "lean")
        assert f"{seconds:.2g}" == f"{float(shown):.2g}", (chip, work, side, seconds)


@mlx_only
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", "bf16"), ("float16", "f16")])
def test_limits(name: str, dtype: str) -> None:
    from zimage_mlx.doctor.limits import limit

    cells = next(line for line in read(PAGE).splitlines() if line.startswith(f"| {name} ")).split("|")[2:6]
    limits = [limit(dtype, 1, 0) / 2, *(limit(dtype, roundings, 0) for roundings in (1, 8, 49))]
    assert [cell.strip() for cell in cells] == [f"{each:.1e}".replace("e-0", "e-") for each in limits]
