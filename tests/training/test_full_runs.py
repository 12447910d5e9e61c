"""Training of the transformer itself: whole runs, their files, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.networks import HAS_MLX, mlx_only
from support.tiny_loras import SHAPES
from support.training_runs import WholeShop, whole_workshop

from zimage_ref import ConfigError
from zimage_ref.checkpoints.convert import open_source
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.formats.tensors import Array, cast
from zimage_ref.training.full import count
from zimage_ref.training.plan import make_plan
from zimage_ref.training.presets import PRESETS, preset_options

if HAS_MLX:
    import zimage_mlx
    from zimage_mlx import Checkpointed, Started, train

pytestmark = mlx_only
slow = pytest.mark.slow
BF16 = {"base_precision": "bf16"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> WholeShop:
    return whole_workshop(tmp_path_factory.mktemp("full"))


def weights_of(path: Path) -> dict[str, Array]:
    tensors = open_source(path, "transformer").tensors
    return {name: cast(tensor.read(), np.dtype("<f4")) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"base_precision": "bf16"},
        pytest.param({**BF16, "optimizer": "adamw8bit", "targets": ("layers.*", "x_pad_*")}, marks=slow),
        pytest.param({**BF16, "master_weights": True, "output": "", "preserve_prompt": ("an owl",)}, marks=slow),
        pytest.param({"base_precision": "f32", "optimizer": "lion", "batch_size": 2, "output": ".npz"}, marks=slow),
    ],
    ids=["adafactor", "adamw8bit", "master", "f32"],
)
def test_stopping_and_resuming_changes_no_bit(options: dict[str, Any], shop: WholeShop) -> None:
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


@pytest.mark.slow
def test_the_result_is_a_base_for_everything(shop: WholeShop) -> None:
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


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({**BF16, "optimizer": "adamw8bit", "targets": "layers.1.*", "preserve_blank": True}, marks=slow)],
)
@pytest.mark.slow
def test_weights_that_are_changed_on_disk_give_the_same_bytes(options: dict[str, Any], shop: WholeShop) -> None:
    shown = {"preview_prompt": "a wave", "preview_every": 2, "preview_size": 32, "preview_steps": 2}
    options = {**options, **shown, "steps": 4, "resume_every": 2, "validation": "0.25", "validation_every": 2}
    name = f"disk{len(options)}"
    lean = shop.train(f"{name}-lean", **options, memory="lean")
    events = train(shop.config(f"{name}-stream", **options, memory="stream"))
    while not (isinstance(event := next(events), Checkpointed) and event.step == 2):
        pass
    events.close()
    rest = shop.train(f"{name}-stream", **options, memory="stream", resume=True)
    assert rest.bytes == lean.bytes and rest.losses == lean.losses[2:]
    assert rest.of(zimage_mlx.Validated)[-1] == lean.of(zimage_mlx.Validated)[-1]
    for step in (0, 2, 4):
        pictures = [shop.folder / f"{name}-{mode}.run/previews/step{step}-0.png" for mode in ("lean", "stream")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert sorted(path.name for path in (shop.folder / f"{name}-stream.run").iterdir()) == sorted(
        path.name for path in (shop.folder / f"{name}-lean.run").iterdir()
    )  # nothing else is left there


def test_a_run_that_does_not_fit_is_told_of_stream(shop: WholeShop) -> None:
    for memory, way_out in (("lean", "give `memory` stream, or a smaller `resolution`"), ("stream", "give a smaller")):
        plan = make_plan(shop.config("large", memory=memory))
        stages = plan.memory("float32", None, "lean")
        with pytest.raises(ConfigError, match=way_out):
            plan.require_memory(stages, 1000)
        plan.require_memory(stages, None)


def test_results_of_earlier_steps_are_kept_as_asked(shop: WholeShop) -> None:
    folder = shop.folder / "kept"
    list(train(shop.config("", output=folder, steps=4, save_every=1, keep_last=2)))
    assert sorted(path.name for path in shop.folder.glob("kept*")) == ["kept", "kept-step2", "kept-step3", "kept.run"]
    assert (folder / "config.json").is_file() and weights_of(folder).keys() == SHAPES.keys()


def test_a_narrower_choice_trains_only_that(shop: WholeShop) -> None:
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
        ({"base_precision": "8"}, "`base_precision` 8: `kind` full changes the weights"),
        ({"memory": "stream", "master_weights": True}, "`master_weights` stay in memory, and `memory` stream"),
        ({"optimizer": "prodigy"}, "`optimizer` prodigy needs all gradients at once"),
        ({"optimizer": "schedulefree"}, "`optimizer` schedulefree needs all"),
        ({"targets": ("attention=8",)}, "`targets` attention=8: `kind` full has no rank: write attention"),
        ({"output": "lora_weights.safetensors"}, "`output` must be given with `kind` full"),
        ({"output": "x.bin"}, "`output` x.bin: a transformer is written as .safetensors or .npz, or into a folder"),
        ({"kind": "lora", "master_weights": True}, "`master_weights` needs `kind` full"),
    ],
)
def test_options_that_do_not_go_together_are_refused(shop: WholeShop, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        shop.config("refused", **options)


def test_one_machine_and_weights_that_are_not_quantized_are_needed(
    shop: WholeShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="`kind` full trains on one machine"):
        make_plan(shop.config("two"), ranks=2)
    monkeypatch.setattr("zimage_ref.training.plan.TrainPlan.stored_bits", [4])
    with pytest.raises(ConfigError, match="is stored in 4 bits, and `kind` full changes the weights"):
        make_plan(shop.config("bits"))


def test_defaults_follow_from_the_kind(shop: WholeShop) -> None:
    whole = shop.config("auto", lr=None)
    plain = zimage_mlx.TrainConfig("m", "d")
    assert (whole.optimizer, whole.targets) == ("adafactor", ("*",))
    assert (plain.optimizer, plain.targets) == ("adamw", ("attention", "feed_forward", "refiners"))
    rates = [make_plan(shop.config("rate", lr=None)).lr, make_plan(_lora(shop)).lr]
    width = 3840 / tiny.TRANSFORMER.dim
    assert rates == [pytest.approx(1e-5 * width), pytest.approx(1e-4 * math.sqrt(width))]
    assert preset_options("style", "full").keys() == preset_options("style", "lora").keys() - {"rank", "alpha"}
    for name in PRESETS:
        zimage_mlx.TrainConfig("m", "d", "whole", kind="full", **preset_options(name, "full"))


def _lora(shop: WholeShop) -> Any:
    return zimage_mlx.TrainConfig(shop.model, shop.data, shop.folder / "lora.safetensors", resolution=32)
