"""Before a run does anything, every name that it will write is tried, and the user learns what is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.training_runs import Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx import make_plan
from zimage_mlx.training.encode import EncodedDataset
from zimage_ref import ConfigError
from zimage_ref.training.presets import PRESETS
from zimage_ref.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("names"))


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
@pytest.mark.parametrize(
    "blocked",
    [
        "x.safetensors", "x.lora.json", "x.step4.safetensors", "x.step2.lora.json",
        "x.run/previews/step5-0.png", "cache/latents/" + "0" * 64 + ".safetensors",
    ],
)  # fmt: skip
def test_a_name_that_is_taken_ends_a_run_before_it_encodes(
    blocked: str, resume: bool, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncodedDataset, "build", lambda *_: pytest.fail("too far"))
    place = Workshop(tmp_path, shop.model, shop.data)
    (tmp_path / blocked).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{Path(blocked).name}: is a folder: name a file"):
        place.train("x", steps=5, save_every=2, resume=resume)


def test_a_long_name_that_the_disk_allows_is_trained_to_the_end(shop: Workshop, tmp_path: Path) -> None:
    name = "y" * 238  # with .safetensors 250 of 255 bytes
    assert Workshop(tmp_path, shop.model, shop.data).train(name, steps=1).output.exists()
    with pytest.raises(ConfigError, match="File name too long"):
        Workshop(tmp_path, shop.model, shop.data).train(name, steps=2, save_every=1, overwrite=True)


def test_a_finished_run_whose_lora_is_missing_is_not_forgotten(shop: Workshop) -> None:
    whole = shop.train("done", steps=2)
    data = whole.bytes
    whole.output.unlink()
    with pytest.raises(ConfigError, match="holds a run that stopped at step 2: `resume` continues it"):
        shop.train("done", steps=1)
    assert RunFolder(whole.output).unfinished() == 2
    assert shop.train("done", steps=2, resume=True).bytes == data


def test_captions_and_prompts_that_are_too_long_are_named_at_the_start(shop: Workshop, tmp_path: Path) -> None:
    long = "a fox " * 600
    data = pictures(tmp_path / "data", (32, 32), (32, 32), captions=[long, "short"])
    plan = make_plan(shop.config("long", dataset=data, preview_prompt=("short", long)))
    captions, prompts = plan.notices
    kept = make_plan(shop.config("long-kept", dataset=data, preserve_prompt=("short", long.strip())))
    assert kept.notices == plan.notices
    assert captions.startswith("captions longer than 512 tokens are cut off (1): ")
    assert f"{data / 'p0000.png'} (" in captions and prompts.startswith(
        "prompts longer than 512 tokens are cut off (1): "
    )
    (data / "stray.mp4").write_bytes(b"x")
    run = shop.train("long", dataset=data, steps=1)
    assert "left out 1 (neither a picture nor a caption): stray.mp4" in run.notices and captions in run.notices


def test_options_of_preservation_without_it_are_named(shop: Workshop) -> None:
    options = {**PRESETS["logo"], "resolution": (32,)}
    (notice,) = make_plan(shop.config("logo", **options)).notices
    assert notice.startswith("`preserve_every` and `preserve_weight`: not used, as nothing is preserved")
    assert not make_plan(shop.config("blank", **options, preserve_blank=True)).notices
    assert not make_plan(shop.config("class", **options, preserve="dog", trigger="rex")).notices
    prompts = {"preserve_prompt": ("a dog", "a rex")}
    assert not make_plan(shop.config("prompts", **options, **prompts)).notices
    (notice,) = make_plan(shop.config("against", **options, **prompts, trigger="rex")).notices
    assert notice.startswith(
        "prompts to preserve that hold the trigger (1): a rex: the run would not learn the trigger there"
    )
