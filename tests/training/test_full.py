"""Training of the transformer itself: its gradient, its steps, its rounding, its files, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.networks import HAS_MLX, mlx_only, network
from support.parity import assert_parity
from support.tiny_loras import SHAPES
from support.training_runs import Workshop, workshop

from zimage_ref import ConfigError
from zimage_ref.checkpoints.convert import open_source
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.tensors import Array, cast
from zimage_ref.model.config import OFFICIAL_TRANSFORMER
from zimage_ref.model.parameters import block_of, transformer_parameters
from zimage_ref.training.full import count, state_bytes, step_bytes
from zimage_ref.training.plan import TrainPlan, make_plan
from zimage_ref.training.presets import preset_options

if HAS_MLX:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    import zimage_mlx
    from zimage_mlx import Checkpointed, Started, train
    from zimage_mlx.networks.transformer import Transformer
    from zimage_mlx.training import full, optimizer
    from zimage_mlx.training.feed import Feed
    from zimage_mlx.training.gradient import LossAndGradients
    from zimage_mlx.training.loss import NoisyBatch, flow_matching_loss
    from zimage_mlx.training.machines import group
    from zimage_mlx.training.rounding import stochastically

pytestmark = mlx_only
WHOLE: dict[str, Any] = {
    "kind": "full", "resolution": 32, "caption_dropout": 0.0, "warmup": 0, "schedule": "constant", "lr": 1e-3
}  # fmt: skip


class FullShop(Workshop):
    """A workshop whose runs train the transformer."""

    def config(self, name: str, **options: Any) -> Any:
        given = {"model_dir": self.model, "dataset": self.data, "cache": self.folder / "cache", **WHOLE, **options}
        return zimage_mlx.TrainConfig(**{"output": self.folder / f"{name}.safetensors", **given})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> FullShop:
    made = workshop(tmp_path_factory.mktemp("full"))
    return FullShop(made.folder, made.model, made.data)


def base() -> Any:
    return network("mlx", "transformer", tiny.TRANSFORMER, tiny.random_weights(SHAPES), "float32")


def noisy(seed: int = 1) -> Any:
    """Pictures that are no multiple of 32 tokens and captions that are filled up, so that both pad tokens count."""
    rng = np.random.default_rng(seed)
    x_0, noise = (mx.array(rng.standard_normal((2, 16, 12, 20), dtype=np.float32)) for _ in range(2))
    captions = [mx.array(rng.standard_normal((n, 40), dtype=np.float32)) for n in (3, 40)]
    return NoisyBatch(x_0, noise, mx.array([0.3, 0.8]), captions)


def weights_of(path: Path) -> dict[str, Array]:
    tensors = open_source(path, "transformer").tensors
    return {name: cast(tensor.read(), np.dtype("<f4")) for name, tensor in tensors.items()}


@pytest.mark.parametrize("keep", [0, math.inf])
def test_every_parameter_gets_the_gradient_of_the_whole_network_a_block_at_a_time(keep: float) -> None:
    model, seen, parts = base(), {}, []

    def use(gradients: dict[str, Any]) -> None:
        parts.append({block_of(name) or name.partition(".")[0] for name in gradients})
        while gradients:
            name, gradient = gradients.popitem()
            seen[name] = gradient

    expected_loss, tree = nn.value_and_grad(model, flow_matching_loss)(model, noisy())
    expected = dict(tree_flatten(tree))
    loss, rest = LossAndGradients(model, keep, compiled=False, use=use)(noisy())
    _, together = LossAndGradients(model, keep, compiled=False)(noisy())
    assert not rest and seen.keys() == together.keys() == expected.keys() == SHAPES.keys()
    assert_parity(loss, expected_loss, "same", name="loss")
    for name, array in expected.items():
        assert mx.abs(array).max() > 0, name
        for actual in (seen[name], together[name]):
            assert_parity(actual, array, "same", name=name)
    assert all(len({each for each in part if "." in each}) <= 1 for part in parts)  # never two blocks
    assert [next(iter(part)) for part in parts][:3] == ["all_final_layer", "layers.1", "layers.0"]


@pytest.mark.parametrize("name", ["adafactor", "adamw8bit", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_step_is_that_of_the_same_optimizer_on_the_gradient_of_the_whole_network(
    name: str, clip: float, shop: FullShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(shop.config("step", optimizer=name, grad_clip=clip, seed=4, base_precision="f32"))
    fused, plain, batches = base(), base(), [noisy(1), noisy(2)]
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batches[items[0]])
    learner = full.WholeLearner(plan, fused, Feed(plan, None), group())  # type: ignore[arg-type]
    parts = {
        key: optimizer.make_optimizer(plan.config, min(*shape, 2) > 1 < len(shape)) for key, shape in SHAPES.items()
    }
    for step in range(2):
        outcome = learner.step(step, 0, [[step]])
        loss, tree = nn.value_and_grad(plain, flow_matching_loss)(plain, batches[step])
        gradients, squares = dict(tree_flatten(tree)), 0.0
        for key, gradient in gradients.items():
            norm = float(mx.linalg.norm(gradient.flatten()))
            squares += norm**2
            part = parts[key]
            part.learning_rate = optimizer.learning_rate(plan, step)
            limited = gradient * min(1.0, clip / norm) if clip else gradient
            path, _, last = key.rpartition(".")
            owner = full.find(plain, path)
            owner[last] = part.apply_gradients({"w": limited}, {"w": owner[last]})["w"]
        assert outcome.finite and outcome.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert outcome.loss == pytest.approx(float(loss), rel=1e-6)
    made, expected = (dict(tree_flatten(model.parameters())) for model in (fused, plain))
    for key, array in expected.items():
        far = np.abs(np.array(made[key] - array)) > 1e-6 * float(mx.abs(array).max())
        # 8 bits are rounded at random: a difference in the last digit of a gradient may lead to another code
        assert far.mean() <= (1e-3 if name == "adamw8bit" else 0), key


def test_rounding_is_right_on_average_and_gives_one_of_the_two_neighbours() -> None:
    rng = np.random.default_rng(3)
    values = mx.array(np.concatenate([rng.standard_normal(500), 1e-6 * rng.standard_normal(500)]).astype(np.float32))
    rounds = 4000
    drawn = mx.stack([stochastically(values, mx.random.key(i)).astype(mx.float32) for i in range(rounds)])
    low, high, mean = (np.array(f(drawn, axis=0), np.float64) for f in (mx.min, mx.max, mx.mean))
    exact, size = np.array(values, np.float64), np.array(high - low)
    assert (low <= exact).all() and (exact <= high).all() and (size <= np.abs(exact) * 2**-7).all()
    share = np.where(size > 0, (exact - low) / np.where(size > 0, size, 1), 0)
    error = (mean - exact) / (np.where(size > 0, size, 1) * np.sqrt(np.maximum(share * (1 - share), 1e-3) / rounds))
    assert abs(error.mean()) < 4 / math.sqrt(1000) and np.abs(error).max() < 6 and 0.8 < error.std() < 1.2
    whole = values.astype(mx.bfloat16)
    assert mx.array_equal(stochastically(whole.astype(mx.float32), mx.random.key(1)), whole)


def test_small_steps_are_kept_on_average_in_bfloat16_and_exactly_by_master_weights() -> None:
    def moved(**options: Any) -> float:
        """The mean change of a weight of 1 after 100 steps of 1e-4, where a bfloat16 step is 4e-3."""
        config = zimage_mlx.TrainConfig("m", "d", output="x.npz", kind="full", optimizer="sgd", **options)
        weight, gradient = mx.ones((64, 64), mx.bfloat16), mx.ones((64, 64))
        fused = full.FusedOptimizer(config, {"w.weight": weight})
        for step in range(100):
            weight = fused.change("w.weight", weight, gradient, step, 1e-4)
        assert weight.dtype == mx.bfloat16
        return float(mx.mean(fused.weights({"w.weight": weight})["w.weight"].astype(mx.float32))) - 1

    assert moved(weight_decay=0.0) == pytest.approx(-0.01, rel=0.05)
    assert moved(weight_decay=0.0, master_weights=True) == pytest.approx(-0.01, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"base_precision": "bf16"},
        {"base_precision": "bf16", "optimizer": "adamw8bit", "targets": ("layers.*", "x_pad_*")},
        {"base_precision": "bf16", "master_weights": True, "output": ""},
        {"base_precision": "f32", "optimizer": "lion", "batch_size": 2, "output": ".npz"},
    ],
    ids=["adafactor", "adamw8bit", "master", "f32"],
)
def test_stopping_and_resuming_changes_no_bit(options: dict[str, Any], shop: FullShop) -> None:
    options = {"steps": 4, "resume_every": 2, "caption_dropout": 0.3, "seed": 11, **options}
    ending = options.pop("output", ".safetensors")
    outputs = [shop.folder / f"{name}-{len(list(shop.folder.iterdir()))}{ending}" for name in ("whole", "cut")]
    list(train(shop.config("", output=outputs[0], **options)))
    events = train(shop.config("", output=outputs[1], **options))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 2):
        pass
    events.close()
    rest = list(train(shop.config("", output=outputs[1], **options, resume=True)))
    assert Started(2, 4) in rest
    files = [
        {file.name: file.read_bytes() for file in (output.iterdir() if output.is_dir() else [output])}
        for output in outputs
    ]
    assert list(files[0].values()) == list(files[1].values())
    before, after = weights_of(shop.model / "transformer"), weights_of(outputs[0])
    chosen = make_plan(shop.config("", output=outputs[0], **options)).parameters
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name not in chosen), name


def test_the_result_is_a_base_for_everything(shop: FullShop) -> None:
    run = shop.train("base", steps=6, preview_prompt="a wave", preview_every=6, preview_size=32, preview_steps=2)
    first, last = (run.output.with_suffix(".run") / f"previews/step{step}-0.png" for step in (0, 6))
    assert first.read_bytes() != last.read_bytes()  # drawn with the changed weights
    assert run.losses[-1] < run.losses[0]
    how: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "output": "array"}
    pictures = [
        zimage_mlx.ZImagePipeline.from_pretrained(shop.model, parts={"transformer": part})("a wave", **how)[0]
        for part in (None, run.output)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
    model = ModelFolder.open(shop.model, {"transformer": run.output})
    assert model.transformer == tiny.TRANSFORMER
    again = shop.train("again", steps=1, transformer=run.output, seed=0)
    assert again.losses[0] < run.losses[0]
    lora = zimage_mlx.TrainConfig(
        shop.model, shop.data, shop.folder / "l.safetensors", transformer=run.output, steps=1, resolution=32,
        cache=shop.folder / "cache", caption_dropout=0.0,
    )  # fmt: skip
    first_loss = next(event.loss for event in train(lora) if isinstance(event, zimage_mlx.Step))
    assert first_loss == pytest.approx(again.losses[0], rel=1e-5)


def test_results_of_earlier_steps_are_kept_as_asked(shop: FullShop) -> None:
    folder = shop.folder / "kept"
    list(train(shop.config("", output=folder, steps=4, save_every=1, keep_last=2)))
    assert sorted(path.name for path in shop.folder.glob("kept*")) == ["kept", "kept-step2", "kept-step3", "kept.run"]
    assert (folder / "config.json").is_file() and weights_of(folder).keys() == SHAPES.keys()


def test_a_gradient_that_is_not_finite_changes_nothing_more(shop: FullShop, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = make_plan(shop.config("nan")), base()
    batch = noisy()
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batch)
    learner = full.WholeLearner(plan, model, Feed(plan, None), group())  # type: ignore[arg-type]
    model.layers[0].feed_forward.w1.weight = model.layers[0].feed_forward.w1.weight * float("nan")
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    outcome = learner.step(0, 0, [[0]])
    assert not outcome.finite
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(array, before[name])


def test_a_narrower_choice_trains_only_that(shop: FullShop) -> None:
    plan = make_plan(shop.config("some", targets=("attention", "layers.1.*norm*", "cap_pad_*")))
    names = set(plan.parameters)
    assert {"layers.0.attention.to_q.weight", "layers.1.ffn_norm2.weight", "cap_pad_token"} <= names
    assert "layers.0.ffn_norm1.weight" not in names and not any("refiner" in name for name in names)
    everything = make_plan(shop.config("all")).parameters
    assert dict(everything) == SHAPES and count(everything) == make_plan(shop.config("all")).trainable
    with pytest.raises(ConfigError, match="no layer has such a name"):
        make_plan(shop.config("none", targets=("layers.0.norm9",)))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"rank": 8}, "`rank` does not go with `kind` full: it is an option of LoRAs"),
        ({"init_lora": "a.safetensors"}, "`init_lora` does not go with `kind` full: merge the LoRA"),
        ({"training_adapter": "a.safetensors"}, "`training_adapter` does not go with `kind` full: merge"),
        ({"grad_accumulation": 2}, "`grad_accumulation` does not go .* take a larger `batch_size`"),
        ({"ema": 0.9}, "`ema` does not go"),
        ({"dropout": 0.1}, "`dropout` does not go"),
        ({"lora_format": "kohya"}, "`lora_format` does not go"),
        ({"preserve_blank": True}, "`preserve_blank` does not go"),
        ({"base_precision": "8"}, "`base_precision` 8: `kind` full changes the weights"),
        ({"memory": "stream"}, "`memory` stream leaves the weights in their file"),
        ({"optimizer": "prodigy"}, "`optimizer` prodigy needs all gradients at once"),
        ({"optimizer": "schedulefree"}, "`optimizer` schedulefree needs all"),
        ({"targets": ("attention=8",)}, "`targets` attention=8: `kind` full has no rank: write attention"),
        ({"output": "lora_weights.safetensors"}, "`output` must be given with `kind` full"),
        ({"output": "x.bin"}, "`output` x.bin: a transformer is written as .safetensors or .npz, or into a folder"),
        ({"kind": "lora", "master_weights": True}, "`master_weights` needs `kind` full"),
    ],
)
def test_options_that_do_not_go_together_are_refused(shop: FullShop, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        shop.config("refused", **options)


def test_one_machine_and_weights_that_are_not_quantized_are_needed(
    shop: FullShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="`kind` full trains on one machine"):
        make_plan(shop.config("two"), ranks=2)
    monkeypatch.setattr("zimage_ref.training.plan.TrainPlan.stored_bits", [4])
    with pytest.raises(ConfigError, match="is stored in 4 bits, and `kind` full changes the weights"):
        make_plan(shop.config("bits"))


def test_defaults_follow_from_the_kind(shop: FullShop) -> None:
    whole = shop.config("auto", lr=None)
    plain = zimage_mlx.TrainConfig("m", "d")
    assert (whole.optimizer, whole.targets) == ("adafactor", ("*",))
    assert (plain.optimizer, plain.targets) == ("adamw", ("attention", "feed_forward", "refiners"))
    rates = [make_plan(shop.config("rate", lr=None)).lr, make_plan(_lora(shop)).lr]
    assert rates[0] == pytest.approx(rates[1] / 10)
    assert preset_options("style", "full").keys() == preset_options("style", "lora").keys() - {"rank", "alpha"}


def _lora(shop: FullShop) -> Any:
    return zimage_mlx.TrainConfig(shop.model, shop.data, shop.folder / "lora.safetensors", resolution=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "adamw8bit"])
def test_a_step_takes_the_gradient_of_one_block_and_the_change_of_one_parameter(
    name: str, shop: FullShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of MLX's memory, on a model whose gradients of all blocks would take eight times as much."""
    config = replace(OFFICIAL_TRANSFORMER, dim=512, n_heads=4, n_layers=10, cap_feat_dim=64)
    shapes, model = transformer_parameters(config), Transformer(config)
    mx.eval(model.parameters())
    plan = make_plan(shop.config("memory", optimizer=name, base_precision="f32"))
    monkeypatch.setattr(TrainPlan, "parameters", shapes)
    rng = np.random.default_rng(0)
    x_0, noise = (mx.array(rng.standard_normal((1, 16, 8, 8), dtype=np.float32)) for _ in range(2))
    batch = NoisyBatch(x_0, noise, mx.array([0.5]), [mx.array(rng.standard_normal((20, 64), dtype=np.float32))])
    monkeypatch.setattr(Feed, "batch", lambda self, epoch, items: batch)

    def over(step: Callable[[], object]) -> float:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        return float(mx.get_peak_memory() - before)

    every = over(lambda: LossAndGradients(model, 0, compiled=False)(batch))
    before = mx.get_active_memory()
    learner = full.WholeLearner(plan, model, Feed(plan, None), group(), 0)  # type: ignore[arg-type]
    made = over(lambda: learner.step(0, 0, [[0]]))
    kept = mx.get_active_memory() - before
    tokens = 32 + 32
    inputs = 4 * tokens * config.dim * 14
    rule = step_bytes(shapes, 4, name) + inputs + 2.7 * 4 * tokens * (16 * config.dim + 6 * config.ffn_dim)
    assert every > 4 * count(shapes) and kept < 1.02 * state_bytes(shapes, name, False) + 6e6
    assert 0.5 * rule < made < 1.1 * rule and made < every / 2.5, (made, rule, every)


def test_the_estimate_for_the_official_model_is_weights_plus_less_than_4_gb() -> None:
    shapes = transformer_parameters(OFFICIAL_TRANSFORMER)
    assert 2 * count(shapes) == pytest.approx(12.3e9, rel=0.01)
    assert state_bytes(shapes, "adafactor", False) < 0.03e9
    assert state_bytes(shapes, "adamw8bit", False) == pytest.approx(2 * count(shapes))
    assert state_bytes(shapes, "adafactor", True) == pytest.approx(4 * count(shapes), rel=0.01)
    block = count({name: shape for name, shape in shapes.items() if block_of(name) == "layers.0"})
    assert step_bytes(shapes, 2, "adafactor") == 2 * block + 24 * 3840 * 10240
    assert step_bytes(shapes, 2, "adafactor") < 1.4e9
