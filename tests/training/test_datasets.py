"""Several datasets in one run, each with options of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.training_runs import EVERYTHING, PLAIN, Workshop, pictures, workshop

pytest.importorskip("mlx.core", reason="training needs MLX", exc_type=ImportError)

from zimage_mlx import Started, Stopped
from zimage_ref import ConfigError, TrainConfig
from zimage_ref.options_file import dump_options, read_options, to_json
from zimage_ref.training.dataset_options import DatasetOptions
from zimage_ref.training.plan import make_plan


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def two(shop: Workshop) -> tuple[Path, Path]:
    """A folder of two pictures, and one of one picture."""
    return (
        pictures(shop.folder / "two", (40, 40), (64, 32), captions=["a fox", "[trigger] again"]),
        pictures(shop.folder / "one", (40, 40), captions=["an owl"]),
    )


def test_a_table_for_one_folder_is_the_folder(shop: Workshop, two: tuple[Path, Path]) -> None:
    short = shop.train("short", dataset=two[0], steps=2, trigger="sks")
    table = shop.train("table", dataset=None, datasets=(DatasetOptions(folder=two[0]),), steps=2, trigger="sks")
    assert short.losses == table.losses and short.vector("B").tolist() == table.vector("B").tolist()


def test_each_dataset_has_its_own_options(shop: Workshop, two: tuple[Path, Path]) -> None:
    own = {"repeats": 3, "resolution": (48,), "trigger": "zzz", "caption_dropout": 0.5, "flip": True, "square": True}
    tables = (DatasetOptions(folder=two[0], **own), DatasetOptions(folder=two[1], kind="regularization"))
    config = shop.config("own", dataset=None, datasets=tables, trigger="sks", repeats=2, resolution=32)
    plan = make_plan(config)
    assert [example.caption for example in plan.examples] == ["zzz, a fox", "zzz again", "an owl"]
    assert [(item.example, item.size, item.repeat) for item in plan.batches.items] == [
        (0, (48, 48), 0), (1, (48, 48), 0), (2, (32, 32), 0),
        (0, (48, 48), 1), (1, (48, 48), 1), (2, (32, 32), 1),
        (0, (48, 48), 2), (1, (48, 48), 2),
    ]  # fmt: skip
    first, second = (config.settings(number) for number in range(2))
    assert (first.caption_dropout, first.flip, second.caption_dropout, second.flip) == (0.5, True, 0.0, False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"caption_dropout": 1.0}, {}),
        pytest.param({"flip": True}, {}, marks=pytest.mark.slow),
        pytest.param({"trigger": "zzz"}, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value),
)
def test_an_option_of_a_dataset_changes_its_pictures_alone(
    shop: Workshop, two: tuple[Path, Path], one: dict[str, Any], other: dict[str, Any]
) -> None:
    def losses(name: str, options: dict[str, Any]) -> tuple[list[float], list[float]]:
        tables = (DatasetOptions(folder=two[0]), DatasetOptions(folder=two[1], **options))
        run = shop.train(name, dataset=None, datasets=tables, epochs=3, lr=1e-9)
        order = [
            i
            for e in range(3)
            for step in make_plan(shop.config(name, dataset=None, datasets=tables)).batches.epoch(e)
            for (i,) in step
        ]
        by_set = [
            [loss for loss, i in zip(run.losses, order, strict=True) if (i == 2) == second] for second in (False, True)
        ]
        return by_set[0], by_set[1]

    name = "-".join(one)
    plain, changed = losses(f"plain-{name}", other), losses(f"changed-{name}", one)
    assert changed[0] == pytest.approx(plain[0], rel=1e-6)
    assert changed[1] != pytest.approx(plain[1], rel=1e-6)


def test_the_weight_of_a_dataset_multiplies_its_gradient(shop: Workshop, two: tuple[Path, Path]) -> None:
    def step(name: str, weight: float) -> np.ndarray:
        tables = (DatasetOptions(folder=two[1], weight=weight),)
        return shop.train(name, **PLAIN, dataset=None, datasets=tables, steps=1).vector("B")

    np.testing.assert_allclose(step("w3", 3.0), 3 * step("w1", 1.0), rtol=2e-2, atol=1e-9)


def test_regularization_pictures_get_no_trigger_and_are_never_held_out(shop: Workshop, two: tuple[Path, Path]) -> None:
    tables = tuple(DatasetOptions(folder=f, kind=k) for f, k in zip(two, ("train", "regularization"), strict=True))
    plan = make_plan(shop.config("reg", dataset=None, datasets=tables, trigger="sks", validation="0.5"))
    assert "an owl" in [example.caption for example in plan.examples]
    assert all("sks" in example.caption for example in plan.held_out) and len(plan.held_out) == 1


def test_tables_are_read_from_toml_and_written_to_it(tmp_path: Path) -> None:
    file = tmp_path / "o.toml"
    text = 'model_dir = "m"\n[[dataset]]\nfolder = "a"\nresolution = 512\ncaption-dropout = 0.1\n'
    file.write_text(f'{text}[[dataset]]\nfolder = "b"\nkind = "regularization"\nweight = 0.5\n', encoding="utf-8")
    config = TrainConfig(**read_options(file, TrainConfig))
    assert config.datasets == (
        DatasetOptions(folder=Path("a"), resolution=(512,), caption_dropout=0.1),
        DatasetOptions(folder=Path("b"), kind="regularization", weight=0.5),
    )
    file.write_text(dump_options(config), encoding="utf-8")
    assert TrainConfig(**read_options(file, TrainConfig)) == config
    assert to_json(config)["datasets"][1]["folder"] == "b"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[[dataset]]\nfolder = "a"\nrepeat = 2', "o.toml: dataset: unknown option 'repeat': is repeats meant?"),
        ('[[dataset]]\nweight = 2', "o.toml: dataset: a table needs folder"),
        ('[[dataset]]\nfolder = "a"\nflip = 3', "o.toml: dataset: flip: 3 is not true or false"),
        ('[[dataset]]\nfolder = "a"\nweight = -1', "o.toml: dataset: `weight` "),
        ('[[dataset]]\nfolder = "a"\nkind = "x"', "`kind` 'x' is unknown: known are train, regularization"),
        ('[[dataset]]\nfolder = "a"\nmask = "x"', "`mask` 'x' is unknown"),
        ('[[dataset]]\nfolder = "a"\nresolution = []', "`resolution` needs at least one side"),
        ('[[dataset]]\nfolder = "a"\nkind = "regularization"', "one must be of the kind train"),
        ('[[dataset]]\nfolder = "a"\nkind = "regularization"\ntrigger = "x"', "regularization has no `trigger`"),
        ('dataset = "d"\n[[dataset]]\nfolder = "a"', "TOML"),
        ("datasets = 3", "o.toml: datasets: 3 is not a table"),
        ("", "`dataset` must be given, or [[dataset]] tables in a file of options"),
    ],
)  # fmt: skip
def test_faults_of_tables_are_one_line(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "o.toml").write_text(f'model_dir = "m"\n{text}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(fault)) as caught:
        TrainConfig(**read_options(tmp_path / "o.toml", TrainConfig))
    assert "\n" not in str(caught.value)


def test_a_folder_and_tables_exclude_one_another() -> None:
    with pytest.raises(ConfigError, match="`dataset` and .* are both given"):
        TrainConfig(Path("m"), Path("d"), datasets=(DatasetOptions(folder=Path("a")),))


def everything(shop: Workshop) -> dict[str, Any]:
    """Options of datasets, masks, captions, dropouts and losses that all play a part in a short run."""
    lines = [f"a [trigger], {{red|blue}}, small, {i}\nthe [trigger] again, {{a|b{{c|d}}}}, e" for i in range(3)]
    first, second = shop.folder / "every1", shop.folder / "every2"
    if not first.exists():
        pictures(first, (40, 40), (44, 40), (64, 32), captions=lines)
        pictures(second, (40, 40), captions=["an owl, grey"])
        Image.linear_gradient("L").resize((40, 40)).save(first / "p0000.mask.png")
    tables = (
        DatasetOptions(folder=first, repeats=2, mask="file", trigger="sks"),
        DatasetOptions(folder=second, kind="regularization", weight=0.5, flip=True),
    )
    return EVERYTHING | {
        "dataset": None, "datasets": tables, "caption_lines": True, "caption_choices": True, "shuffle_tags": True,
        "dropout": 0.2, "module_dropout": 0.2, "noise_offset": 0.1, "timesteps": "beta", "min_sigma": 0.1,
        "max_sigma": 0.9, "loss": "huber", "loss_weight": "flow-weighted", "differential_guidance": 3.0,
        "preserve": "cat", "preserve_prompt": ("an owl", "a fox"), "preserve_blank": True, "preserve_every": 2,
        "steps": 3, "resume_every": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("adamw8bit", {}),
        pytest.param("prodigy", {"ema": 0.9, "lora_plus": 1.0}, marks=pytest.mark.slow),
        pytest.param("schedulefree", {"ema": 0.0}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_run_with_all_of_it_is_resumed_bit_for_bit(shop: Workshop, optimizer: str, more: dict[str, Any]) -> None:
    options = everything(shop) | {"optimizer": optimizer, **more}
    whole = shop.train(f"whole-{optimizer}", **options)
    asked: list[int] = []
    first = shop.train(
        f"cut-{optimizer}", lambda: bool(asked.append(1)) or len(asked) > _asked_before(whole), **options
    )
    assert isinstance(first.events[-1], Stopped) and 0 < first.events[-1].step < 3
    rest = shop.train(f"cut-{optimizer}", **options, resume=True)
    assert rest.of(Started)[0].step == first.events[-1].step
    assert rest.bytes == whole.bytes
    changed = {**options, "datasets": (options["datasets"][0],)}
    with pytest.raises(ConfigError, match="`datasets` .* -> .*the pictures, captions or masks"):
        shop.train(f"cut-{optimizer}", **changed, resume=True, overwrite=True)


def _asked_before(whole: Any) -> int:
    """How often a run asked whether to stop until its first step, given that all is encoded."""
    return sum(type(event).__name__ == "Encoded" for event in whole.events) + 1
