"""A run goes on from a LoRA of any kind: exactly if its matrices can hold it, else from the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_loras import BASE, SHAPES, difference, make
from support.training_runs import PLAIN, Workshop, workshop

from zimage_ref import ConfigError
from zimage_ref.lora.arithmetic import NumPyArithmetic
from zimage_ref.lora.continued import Fresh, continued
from zimage_ref.lora.file import read_lora, write_lora
from zimage_ref.lora.kinds import Dense
from zimage_ref.lora.low_rank import LowRank
from zimage_ref.lora.trained import MAGNITUDE, TRAINED, UpdateSize
from zimage_ref.lora.updates import Update

MAKERS = ("kohya", "peft", "lokr", "loha", "full_difference", "onetrainer_dora", "lycoris_dora")
LAYER = "layers.1.feed_forward.w1"
WEIGHT = BASE[f"{LAYER}.weight"]
F64 = NumPyArithmetic(np.dtype(np.float64))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)
    return workshop(tmp_path_factory.mktemp("init"))


def fresh(kind: str, rank: int = 6, alpha: float = 3.0, factor: int = -1) -> Fresh:
    size, known = UpdateSize(rank, alpha, factor), TRAINED[kind]
    factors = known.initial(known.matrices(*WEIGHT.shape, size), np.random.default_rng(4))
    return Fresh(kind, size, factors, lambda: WEIGHT)


def random_update(kind: str, rank: int, factor: int = -1) -> Update:
    size, known, rng = UpdateSize(rank, 5.0, factor), TRAINED[kind], np.random.default_rng(9)
    shapes = known.matrices(*WEIGHT.shape, size)
    factors = known.initial(shapes, rng)
    if MAGNITUDE in shapes:
        factors[MAGNITUDE] = np.linalg.norm(WEIGHT, axis=1)
    factors = {n: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in factors.items()}
    return known.update(factors, known.scale(shapes, size))


def check(update: Update, start: Fresh, share: float = 2e-5) -> float:
    """What is lost: at most `share`, and what `continued` says."""
    factors, lost = continued(update, start)
    shapes = TRAINED[start.kind].matrices(*WEIGHT.shape, start.size)
    assert {name: array.shape for name, array in factors.items()} == shapes
    assert {array.dtype for array in factors.values()} == {np.dtype(np.float32)}
    weight = WEIGHT.astype(np.float64)
    wanted = update.added(weight, F64)
    made = TRAINED[start.kind].update(factors, start.scale).added(weight, F64)
    real = float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))
    assert real < share
    return lost


@pytest.mark.parametrize(
    ("source", "rank", "target"),
    [
        ("lora", 4, "lora"), ("lora", 6, "lora"), ("lora", 4, "dora"), ("lora", 4, "loha"), ("loha", 4, "loha"),
        ("lokr", 6, "lokr"), ("dora", 4, "dora"), ("lokr", 2, "lokr"),
    ],
)  # fmt: skip
def test_it_is_exact_if_the_new_matrices_can_hold_the_update(source: str, rank: int, target: str) -> None:
    assert check(random_update(source, rank), fresh(target)) < 2e-5


def test_new_ranks_begin_as_those_of_a_new_lora_do() -> None:
    start = fresh("lora")
    factors, _ = continued(random_update("lora", 4), start)
    np.testing.assert_array_equal(factors["lora_A"][4:], start.factors["lora_A"][4:])
    assert not factors["lora_B"][:, 4:].any()


@pytest.mark.parametrize("target", TRAINED)
def test_every_matrix_can_learn_from_there(target: str) -> None:
    """No rank is zero on both sides."""
    start = fresh(target, rank=8)
    for update in (random_update("lora", 4), random_update("lokr", 3), LowRank(*start_zero())):
        factors, _ = continued(update, start)
        pairs = [("lora_A", "lora_B")] if "lora_A" in factors else []
        pairs += [(f"{n}_b", f"{n}_a") for n in ("hada_w1", "hada_w2", "lokr_w2") if f"{n}_a" in factors]
        for rows, columns in pairs:
            alive = np.abs(factors[rows]).max(axis=1) + np.abs(factors[columns]).max(axis=0)
            assert (alive > 0).all(), (target, rows)
        if target == "lokr":
            assert factors["lokr_w1"].any()


def start_zero() -> tuple[np.ndarray, np.ndarray]:
    A = np.ones((2, WEIGHT.shape[1]), np.float32)
    return A, np.zeros((len(WEIGHT), 2), np.float32)


def test_a_smaller_rank_takes_the_largest_singular_values() -> None:
    update = random_update("lora", 9)
    lost = check(update, fresh("lora"), share=1.0)
    S = np.linalg.svd(update.added(WEIGHT.astype(np.float64), F64), compute_uv=False)
    assert lost == pytest.approx(np.sqrt((S[6:] ** 2).sum() / (S**2).sum()), rel=1e-3) and lost > 0.05


def test_another_split_takes_the_nearest_kronecker_product() -> None:
    """The first singular value of the matrix with a row for each block."""
    update, start = random_update("lora", 2), fresh("lokr", rank=500)
    lost = check(update, start, share=1.0)
    (o1, i1), (o2, i2) = start.factors["lokr_w1"].shape, start.factors["lokr_w2"].shape
    dense = update.added(WEIGHT.astype(np.float64), F64)
    S = np.linalg.svd(dense.reshape(o1, o2, i1, i2).transpose(0, 2, 1, 3).reshape(o1 * i1, -1), compute_uv=False)
    assert lost == pytest.approx(np.sqrt((S[1:] ** 2).sum() / (S**2).sum()), rel=0.02)


@pytest.mark.parametrize("target", ["lora", "loha", "dora"])
def test_a_difference_of_low_rank_is_found_again(target: str) -> None:
    plain = random_update("lora", 3)
    assert check(Dense(plain.added(np.zeros_like(WEIGHT), NumPyArithmetic(np.dtype(np.float32)))), fresh(target)) < 1e-3


def test_dora_becomes_a_lora_of_the_difference_that_it_makes() -> None:
    assert 0 < check(random_update("dora", 4), fresh("lora", rank=24), share=0.9) < 0.9


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m in ("kohya", "lycoris_dora") else pytest.mark.slow) for m in MAKERS]
)
def test_a_run_of_no_change_gives_the_lora_that_it_went_on_from(name: str, shop: Workshop, tmp_path: Path) -> None:
    """At almost no rate, with ranks enough for every kind."""
    file = make(name, tmp_path)
    options = {**PLAIN, "lr": 1e-12, "steps": 1, "rank": 64, "alpha": 32.0, "targets": "all"}
    run = shop.train(f"on-{name}", **options, init_lora=file)
    assert "`init_lora`: " in run.notices and "go on exactly" in run.notices
    before, after = read_lora(file, SHAPES).updates, read_lora(run.output, SHAPES).updates
    for layer, update in before.items():
        if layer in after:
            wanted = difference(update, layer)
            np.testing.assert_allclose(
                difference(after[layer], layer), wanted, atol=0.02 * np.abs(wanted).max(), err_msg=layer
            )
        else:
            assert layer in run.notices


def test_what_targets_leaves_out_is_named_and_new_layers_are_counted(shop: Workshop, tmp_path: Path) -> None:
    write_lora(tmp_path / "x.safetensors", {LAYER: random_update("lora", 2)}, {}, "comfy", "f32")
    run = shop.train("left", steps=1, targets="attention", init_lora=tmp_path / "x.safetensors")
    assert "0 layers go on exactly, 0 from the nearest that fits, 8 are new" in run.notices
    assert f"`targets` does not choose what 1 updates change, so they are left out: {LAYER}" in run.notices


def test_another_file_is_another_run(shop: Workshop, tmp_path: Path) -> None:
    for name, seed in (("one", 2), ("other", 3)):
        write_lora(tmp_path / f"{name}.safetensors", {LAYER: random_update("lora", seed)}, {}, "comfy", "f32")
    options = {"steps": 3, "resume_every": 1}
    whole = shop.train("init-whole", **options, init_lora=tmp_path / "one.safetensors")
    asked = iter(range(10**6))
    shop.train("init-cut", lambda: next(asked) > 12, **options, init_lora=tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="the LoRA that the run goes on from"):
        shop.train("init-cut", **options, init_lora=tmp_path / "other.safetensors", resume=True)
    rest = shop.train("init-cut", **options, init_lora=tmp_path / "one.safetensors", resume=True)
    assert rest.bytes == whole.bytes and "go on exactly" not in rest.notices
