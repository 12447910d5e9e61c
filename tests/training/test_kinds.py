"""Each kind trains: on any base, block by block, to be resumed, alone or as two machines, and as the plan says."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.daily import daily
from support.networks import HAS_MLX, mlx_only, network
from support.parity import assert_parity
from support.tiny_loras import SHAPES
from support.training_runs import EVERYTHING, PLAIN, Workshop, workshop

from zimage_ref import ConfigError
from zimage_ref.lora.file import read_lora
from zimage_ref.lora.trained import TRAINED
from zimage_ref.training.plan import make_plan

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    from zimage_mlx import Checkpointed, Started, train
    from zimage_mlx.lora import layers as lora_layers
    from zimage_mlx.training.gradient import LossAndGradients
    from zimage_mlx.training.loss import NoisyBatch, flow_matching_loss

pytestmark = mlx_only
KINDS = [kind for kind in TRAINED if kind != "lora"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize(
    ("kind", "keep"),
    daily(product(TRAINED, [0, math.inf]), ("lora", math.inf), ("lokr", 0), ("loha", math.inf), ("dora", 0)),
)
def test_the_gradient_by_blocks_is_that_of_the_whole_network(kind: str, keep: float, shop: Workshop) -> None:
    plan = make_plan(shop.config("gradient", kind=kind, rank=3, alpha=6.0, targets="all"))
    model = network("mlx", "transformer", tiny.TRANSFORMER, tiny.random_weights(SHAPES), "float32")
    scales = {layer: TRAINED[kind].scale(plan.matrices[layer], size) for layer, size in plan.layers.items()}
    lora_layers.add_trainable(model, kind, plan.start().factors, scales)
    rng = np.random.default_rng(1)
    for name, array in tree_flatten(model.trainable_parameters()):
        path, _, factor = name.rpartition(".")
        layer = lora_layers.find(model, path)
        layer[factor] = array + mx.array(rng.standard_normal(array.shape).astype(np.float32)) * 0.05
    x_0, noise = (mx.array(rng.standard_normal((2, 16, 12, 20), dtype=np.float32)) for _ in range(2))
    captions = [mx.array(rng.standard_normal((n, 40), dtype=np.float32)) for n in (3, 40)]
    batch = NoisyBatch(x_0, noise, mx.array([0.3, 0.8]), captions)
    loss, tree = nn.value_and_grad(model, flow_matching_loss)(model, batch)
    expected = dict(tree_flatten(tree))
    actual_loss, actual = LossAndGradients(model, keep, compiled=False)(batch)
    assert_parity(actual_loss, loss, "same", name="loss")
    assert actual.keys() == expected.keys() and len(expected) == sum(map(len, plan.matrices.values()))
    for name, array in expected.items():
        assert_parity(actual[name], array, "same", name=name)
        assert mx.abs(array).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stopping_and_resuming_changes_no_bit(kind: str, shop: Workshop) -> None:
    options: dict[str, Any] = {**EVERYTHING, "kind": kind, "targets": ("attention", "layers.0.feed_forward.*=5/2")}
    whole = shop.train(f"whole-{kind}", **options)
    events = train(shop.config(f"cut-{kind}", **options))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 4):
        pass
    events.close()
    rest = shop.train(f"cut-{kind}", **options, resume=True)
    assert rest.of(Started) == [Started(4, 5)] and rest.bytes == whole.bytes


@pytest.mark.parametrize(
    ("kind", "precision"),
    daily(product(KINDS, ["f32", "4/32"]), ("lokr", "f32"), ("loha", "4/32"), ("dora", "4/32")),
)
def test_a_kind_trains_on_any_base_and_its_file_holds_what_the_plan_counts(
    kind: str, precision: str, shop: Workshop
) -> None:
    options = {"kind": kind, "base_precision": precision, "steps": 3, "targets": "all", "rank": 3}
    run = shop.train(f"{kind}-{precision.replace('/', '-')}", **options)
    updates = read_lora(run.output, SHAPES).updates
    plan = make_plan(shop.config("counted", **options))
    assert updates.keys() == plan.layers.keys()
    assert {update.title for update in updates.values()} == {TRAINED[kind].title}
    stored = sum(a.size for update in updates.values() for part, a in update.tensors().items() if part != "alpha")
    assert stored == plan.trainable
    assert all(update.norm() > 0 for update in updates.values())
    assert "mflux refuses" in run.notices and np.isfinite(run.losses).all()


def test_the_first_loss_is_that_of_the_base(shop: Workshop) -> None:
    first = {kind: shop.train(f"{kind}-first", **PLAIN, kind=kind, steps=1).losses[0] for kind in TRAINED}
    assert first == {kind: pytest.approx(first["lora"], rel=1e-5) for kind in TRAINED}


def test_whole_matrices_have_no_ranks_to_rest(shop: Workshop) -> None:
    with pytest.raises(ConfigError, match="`rank_dropout` needs matrices with a rank"):
        make_plan(shop.config("rest", kind="lokr", rank=500, rank_dropout=0.2))
    rests = [shop.train(f"rest{r}", kind="lokr", factor=4, rank=2, rank_dropout=r, steps=2).bytes for r in (0.0, 0.5)]
    assert rests[0] != rests[1]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"kind": "lokr", "lora_format": "peft"}, "`lora_format` peft has no lokr: use comfy or musubi or kohya"),
        ({"factor": 8}, "`factor` needs `kind` lokr"),
        ({"kind": "dora", "decompose_both": True}, "`decompose_both` needs `kind` lokr"),
        ({"kind": "lokr", "factor": 0}, "`factor` 0: give -1"),
        ({"kind": "oft"}, "`kind` 'oft' is unknown: known are lora, lokr, loha, dora"),
    ],
)
def test_options_that_do_not_go_together_are_refused(shop: Workshop, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        shop.config("refused", **options)


def test_lokr_options_change_the_matrices(shop: Workshop) -> None:
    def counts(**options: Any) -> int:
        return make_plan(shop.config("shapes", kind="lokr", rank=2, targets="attention", **options)).trainable

    square, by_four, both = counts(), counts(factor=4), counts(decompose_both=True)
    assert square == 8 * (8 * 8 + 2 * (12 + 12)) and by_four == 8 * (4 * 4 + 2 * (24 + 24))
    assert both == 8 * (2 * (8 + 8) + 2 * (12 + 12))


def test_the_memory_estimate_counts_the_matrices_of_the_kind(shop: Workshop) -> None:
    stages = {
        kind: make_plan(shop.config("memory", kind=kind, rank=4)).memory("float32", None, "lean")[-1]
        for kind in ("lora", "loha", "dora")
    }
    assert stages["loha"].lora == 2 * stages["lora"].lora < 3 * stages["dora"].lora
    assert stages["dora"].lora > stages["lora"].lora
    assert stages["loha"].activations > stages["lora"].activations  # a matrix of the size of a weight


@pytest.mark.parametrize("kind", daily(KINDS, "dora"))
def test_a_base_that_stays_in_its_file_gives_the_same(kind: str, shop: Workshop) -> None:
    """The first magnitudes of DoRA are then read from the file."""
    runs = [shop.train(f"{kind}-{mode}", kind=kind, memory=mode, steps=2) for mode in ("lean", "stream")]
    one, other = (read_lora(run.output, SHAPES).updates for run in runs)
    for layer, update in one.items():
        for part, array in update.tensors().items():
            np.testing.assert_allclose(other[layer].tensors()[part], array, rtol=1e-2, atol=1e-4, err_msg=layer)
