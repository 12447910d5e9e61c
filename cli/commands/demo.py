"""zimage demo: its data, its run, and the table that compares pictures before and after."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_mlx import blas
from zimage_ref import TrainConfig
from zimage_ref.checkpoints.hub import TINY
from zimage_ref.errors import ConfigError, listing
from zimage_ref.formats.files import check_writable
from zimage_ref.generation.pipeline import AnyPipeline
from zimage_ref.pictures.images import Picture, save_picture
from zimage_ref.tiny.data import GUIDANCE, STEPS
from zimage_ref.tiny.drawings import (
    FORMS,
    SIDE,
    Scene,
    articles,
    contact_sheet,
    examination,
    illustrated,
    lesson,
    take,
)
from zimage_ref.tiny.judge import in_place, look, shows
from zimage_ref.tiny.outlines import outlined

from ..terminal.backends import DEFAULT, pipeline
from ..terminal.console import Console
from ..terminal.parser import CommandParser
from ..terminal.pictures import show
from . import train

WORD = "zorp"
FOLLOWED = 6  # pictures that follow an edge map
PICTURES = 4  # pictures of the new word, and the same number of words that the model knows
EPOCHS = 35  # a third of the default
LESSON: dict[str, Any] = {"resolution": (SIDE,), "lr": 1e-3, "schedule": "constant", "ema": 0.97}  # see lesson_plan
_STEMS = [f"{WORD}{i}" for i in range(1, 9)]  # stems of the lesson's pictures and captions
_NEXT = """\
The same on your own pictures, with the real model (each picture with its caption in a .txt of the same name):
  zimage train --model-dir Z-Image-Turbo --dataset PICTURES --output my.safetensors
  zimage generate --model-dir Z-Image-Turbo --lora my.safetensors --prompt "..." --output my.png"""


def add_options(parser: CommandParser) -> None:
    """The options of `zimage demo`."""
    parser.examples = (
        ("Run it, and look at zimage-demo/before-after.png:", "zimage demo"),
        ("Draw pictures that follow edge maps, zimage-demo/control.png:", "zimage demo --control"),
    )
    parser.option(
        "--model-dir", f"Folder with a small model of such drawings. {TINY} is the one in this package.",
        type=Path, default=Path(TINY), metavar="MODEL",
    )  # fmt: skip
    parser.option("--control", "Draw pictures that follow edge maps instead, with the ControlNet in the folder of the "
                  "model.", action="store_true")  # fmt: skip
    parser.option("--output", "Folder to write to.", type=Path, default=Path("zimage-demo"), metavar="FOLDER")


def run(args: argparse.Namespace, console: Console) -> int:
    """Draws the lesson, generates, trains, generates again, and shows the changes. Returns training's exit code."""
    if note := blas.advice():
        console.note(note)
    folder: Path = args.model_dir
    if args.control:
        return follow(folder, args.output / "control.png", console)
    sheet = args.output / ("before-after.png" if DEFAULT == "mlx" else "pictures.png")
    dataset, lora = args.output / "dataset", args.output / f"{WORD}.safetensors"
    check_writable(sheet, lora, *(dataset / f"{stem}{suffix}" for stem in _STEMS for suffix in (".png", ".txt")))
    new, known = examination(WORD)[:PICTURES], take(PICTURES, seed=2, held_out=True)
    if DEFAULT != "mlx":
        pictures = generate(folder, known, [], console, "generate")
        show(contact_sheet(pictures, PICTURES), console)
        compare(console, known, {"by NumPy": pictures})
        keep(console, sheet, pictures, PICTURES)
        console.note("To see a LoRA learn a word, install MLX: pip install 'zimage-mlx[cpu]', or [cuda] for NVIDIA")
        return 0

    check_own(dataset)
    before = generate(folder, new + known, [], console, "before")
    code, losses = train.follow(lesson_plan(folder, write_dataset(dataset), lora), console)
    if code:
        return code
    after = generate(folder, new + known, [lora], console, "after")

    console.curve("loss", losses)
    show(contact_sheet(before + after, 2 * PICTURES), console)
    compare(console, new + known, {"before": before, "after": after})
    keep(console, sheet, before + after, 2 * PICTURES)
    console.wrote(lora)
    console.print(_NEXT)
    return 0


def follow(folder: Path, sheet: Path, console: Console) -> int:
    """Draws pictures that follow edge maps, under captions that name only colours. Returns the exit code, 0."""
    check_writable(sheet)
    scenes = take(FOLLOWED, seed=3, held_out=True)
    maps, captions = zip(*outlined(scenes, seed=0), strict=True)
    pipe: AnyPipeline = pipeline(DEFAULT).from_pretrained(folder)
    made: list[Picture] = []
    with console.progress() as bars:
        for i, (edges, caption) in enumerate(zip(maps, captions, strict=True), start=1):
            made += pipe(caption, width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE, seed=i, output="pil",
                         control=str(folder), control_image=edges)  # fmt: skip
            bars.update("follow", i, len(maps))
    show(contact_sheet([*maps, *made], FOLLOWED), console)
    verdicts = ["yes" if in_place(picture, scene) else "no" for picture, scene in zip(made, scenes, strict=True)]
    rows = list(zip(captions, verdicts, strict=True))
    console.table(("prompt", "in place"), rows, title="Is every shape in its place?")
    keep(console, sheet, [*maps, *made], FOLLOWED)
    return 0


def lesson_plan(model: Path, dataset: Path, lora: Path) -> TrainConfig:
    """The options for learning the word: fewer steps than the default, and therefore a higher learning rate.

    After so few steps the model forgets less with an average over steps than with a decaying learning rate.
    """
    return TrainConfig(model, dataset, lora, epochs=EPOCHS, **LESSON, overwrite=True)


def write_dataset(folder: Path) -> Path:
    """Writes the eight pictures of the lesson and their captions as `zimage train` reads them. Returns the folder."""
    for stem, (picture, caption) in zip(_STEMS, illustrated(lesson(WORD), seed=0), strict=True):
        save_picture(picture, folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def check_own(folder: Path) -> None:
    """Raises ConfigError if `folder` holds files that are not from the demo, because it would train on them too."""
    own = {f"{stem}{suffix}" for stem in _STEMS for suffix in (".png", ".txt")}
    if strange := sorted(p.name for p in folder.glob("*") if p.name not in own and not p.name.startswith(".")):
        raise ConfigError(f"{folder}: holds {listing(strange)}, not from this demo: give another --output")


def prompt(scene: Scene) -> str:
    """The prompt for a scene, always in the simplest wording."""
    return articles(FORMS[0].format(subject=scene.subject, ground=scene.ground))


def generate(
    folder: Path, wanted: Sequence[Scene], loras: Sequence[Path], console: Console, name: str
) -> list[Picture]:
    """Generates a picture for the prompt of each scene."""
    pipe = pipeline(DEFAULT).from_pretrained(folder)
    with console.progress() as bars:
        return pipe(
            [prompt(scene) for scene in wanted], width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE,
            loras=[(path, 1.0) for path in loras],
            progress=lambda stage, done, total: bars.update(f"{name}: {stage}", done, total),
        )  # fmt: skip


def compare(console: Console, wanted: Sequence[Scene], made: Mapping[str, Sequence[Picture]]) -> None:
    """Prints a table: whether each picture shows its prompt, judged by its pixels."""
    verdicts = [["yes" if shows(look(p), s) else "no" for p, s in zip(ps, wanted, strict=True)] for ps in made.values()]
    rows = zip(map(prompt, wanted), *verdicts, strict=True)
    console.table(("prompt", *made), list(rows), title="Is the picture what the prompt says?")


def keep(console: Console, path: Path, pictures: Sequence[Picture], columns: int) -> None:
    """Writes `pictures` as one contact sheet."""
    save_picture(contact_sheet(pictures, columns), path)
    console.wrote(path)
