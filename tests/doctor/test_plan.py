"""A run takes a bounded number of operations: on a device like an M1, on a slow one, on a fast one."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zimage_mlx.doctor import run
from zimage_mlx.doctor.catalogue import catalogue
from zimage_mlx.doctor.checking import Pace
from zimage_mlx.doctor.parts import Measurer
from zimage_mlx.doctor.run import FULL, QUICK, plan_checks, quick_dtypes, wanted_parts
from zimage_ref.doctor.prediction import Rates, TimeModel

M1 = Pace({"bf16": 1.9e12, "f16": 2.4e12, "f32": 2.2e12}, numpy=2.5e11)  # NumPy on four fast cores
H100 = Pace({"bf16": 6e14, "f16": 6e14, "f32": 5e13}, numpy=1e12)
CORES = Pace({"bf16": 2e9, "f16": 2e9, "f32": 9e10}, numpy=6e10)  # two of a server
RATES = Rates(products=1.9e12, attention=1.2e12, convolutions=1.5e12, memory=55e9)  # of an M1


@pytest.mark.parametrize(("quick", "budget", "most"), [(True, QUICK, 30), (False, FULL, 180)])
def test_an_m1_is_done_in_time(quick: bool, budget: run.Budget, most: float) -> None:
    checks = sum(each.seconds for each in plan_checks(quick, "bf16", M1, budget.right))
    precisions = ["bf16", "8", "4"] if quick else ["bf16", "f16", "f32", "8", "4"]
    parts = wanted_parts(quick, "bf16", precisions)
    rates = 1 + len(precisions) + 2 * sum(p not in "84" for p in precisions)
    total = checks + 2 * budget.rate * rates + budget.part * len(parts)
    assert checks <= 1.3 * budget.right and total < most - 4  # four seconds for starting and the disk


@pytest.mark.parametrize("pace", [M1, H100], ids=["M1", "H100"])
def test_a_full_run_checks_the_sizes_of_the_real_model(pace: Pace) -> None:
    planned = {(each.case.name, each.dtype): each for each in plan_checks(False, "bf16", pace, FULL.right)}
    for name in ("block", "gradient of a block", "product", "attention", "convolution 512 to 512"):
        for dtype in ("bf16", "f16", "f32"):
            each = planned[name, dtype]
            assert each.size == each.case.sizes[0] and not each.note
    assert planned["attention, long", "bf16"].size[0] == 4160


def test_a_slow_device_gets_smaller_checks_and_says_so() -> None:
    planned = plan_checks(False, "f32", CORES, FULL.right)
    assert sum(each.seconds for each in planned) < 1.5 * FULL.right
    (block,) = (each for each in planned if each.case.name == "block" and each.dtype == "bf16")
    assert block.size != block.case.sizes[0]
    assert block.note == f"at {' x '.join(map(str, block.size))} instead of 32 x 30: this device is slow in bf16"


def test_a_device_without_any_speed_gets_the_smallest_sizes() -> None:
    nothing = Pace(dict.fromkeys(("bf16", "f16", "f32"), 1.0), 1.0)
    planned = plan_checks(True, "f32", nothing, QUICK.right)
    assert all(each.size == each.case.sizes[-1] for each in planned)
    assert sum(each.case.flops(each.size) for each in planned) < 5e9


def test_a_quick_run_has_fewer_dtypes() -> None:
    cases = {case.name: case for case in catalogue(packed=True)}
    assert quick_dtypes(cases["block"], "bf16") == ["bf16", "f32"]
    assert quick_dtypes(cases["block"], "f32") == ["f32"]
    assert quick_dtypes(cases["product of 8 bits, packed"], "f32") == []
    assert set(quick_dtypes(cases["product"], "bf16")) == {"bf16", "f16", "f32"}


def test_packed_products_of_many_rows_are_left_out_on_cuda() -> None:
    """Their kernels take minutes to build there, and nothing uses them."""
    assert not [case for case in catalogue(packed=False) if "packed" in case.name and "unpacked" not in case.name]


def test_parts_that_take_too_long_are_left_out() -> None:
    slow = TimeModel({"f32": Rates(9e10, 3e10, 9e10, 5e9)}, "f32")
    measurer, said = Measurer(slow, "f32", 0.5, None), []
    assert list(measurer.all(wanted_parts(True, "f32", ["f32"])[:1], lambda *words: said.append(words))) == []
    assert said[0] == ("parts", 0, 1, "forward, f32")
    m1 = Measurer(TimeModel({"bf16": RATES}, "bf16"), "bf16", QUICK.part, None)
    assert m1.least("forward", "bf16", 512) < QUICK.part
    mx.clear_cache()
