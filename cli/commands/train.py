"""zimage train: its options, and the display of a run in the terminal."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from zimage_mlx import blas
from zimage_ref import TrainConfig
from zimage_ref.checkpoints.folder import ModelFolder
from zimage_ref.doctor.remembered import Figures, precision_name
from zimage_ref.errors import ZImageError
from zimage_ref.formats.quantize import Quantization
from zimage_ref.memory import peak
from zimage_ref.options_file import dump_options, read_options
from zimage_ref.training.events import Encoded, Event, Notice, Saved, Saving, Started, Step, Stopped, Validated
from zimage_ref.training.groups import TrainGroup
from zimage_ref.training.kinds import FULL, learning_kind
from zimage_ref.training.plan import TrainPlan, make_plan
from zimage_ref.training.presets import PRESETS, preset_options
from zimage_ref.training.run_folder import RunFolder
from zimage_ref.training.targets import by_module, ranges
from zimage_ref.training.whole_room import room

from ..terminal.awake import keep_awake
from ..terminal.backends import pipeline, require_mlx
from ..terminal.console import Bars, Console
from ..terminal.duration import duration
from ..terminal.options import add_fields, from_args
from ..terminal.parser import CommandParser
from ..terminal.prompt_file import read_prompts
from ..terminal.signals import noted

_LOG_EVERY = 10.0  # seconds between lines if there is no terminal for a bar
_EXAMPLES = (
    (
        "Check a run before you start it:",
        'zimage train --model-dir ~/Z-Image --dataset dog --trigger "sks dog" --dry-run',
    ),
    (
        "Train, save every 500 steps, and draw a preview now and then:",
        'zimage train --model-dir ~/Z-Image --dataset dog --trigger "sks dog" --output dog.safetensors '
        '--resolution 768 --steps 2500 --save-every 500 --preview-prompt "a photo of sks dog in snow"',
    ),
    (
        "See what training the whole transformer takes:",
        "zimage train --model-dir ~/Z-Image --dataset paintings --kind full --output paintings-z --resolution 512 "
        "--dry-run",
    ),
    (
        "Take the options from a file:",
        "zimage train --config examples/train-character.toml --dataset dog --output rex.safetensors",
    ),
)


def add_options(parser: CommandParser) -> None:
    """The options of `zimage train`."""
    parser.usage = "zimage train --model-dir MODEL --dataset FOLDER [options]"
    parser.examples = _EXAMPLES
    add_fields(parser, TrainConfig, from_file=True, without=("datasets",))
    parser.option(
        "--config", "File with options (.toml or .json). The command line overrides it.",
        TrainGroup.RUN, type=Path, metavar="FILE",
    )  # fmt: skip
    parser.option(
        "--preset", "Options that fit a kind of thing. Options that you give count before them.",
        TrainGroup.RUN, choices=tuple(PRESETS), metavar="NAME",
    )  # fmt: skip
    parser.option(
        "--preserve-prompt-file", "File with prompts to preserve, one in each line. - reads them from stdin.",
        TrainGroup.LOSS, essential=False, type=Path, metavar="FILE",
    )  # fmt: skip
    parser.option(
        "--dry-run", "Check everything and show the plan. Load no weights.",
        TrainGroup.RUN, action="store_true",
    )  # fmt: skip
    parser.option(
        "--dump-config", "Print all options as TOML and stop.", TrainGroup.RUN, essential=False, action="store_true"
    )
    parser.option(
        "--no-caffeinate", "Let a Mac go to sleep during the run.", TrainGroup.RUN, essential=False, action="store_true"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Trains, shows the progress and each written file. Returns 0, or 128 + the signal that stopped the run."""
    file = read_options(args.config, TrainConfig) if args.config else {}
    kind = getattr(args, "kind", file.get("kind"))
    if args.preserve_prompt_file:
        args.preserve_prompt = (*getattr(args, "preserve_prompt", ()), *read_prompts(args.preserve_prompt_file))
    config = from_args(TrainConfig, args, {**preset_options(args.preset, kind), **file})
    if args.dump_config:
        console.print(dump_options(config).rstrip("\n"))
        return 0
    mlx = require_mlx("training")
    if args.dry_run:
        _show_plan(config, console)
        return 0

    if not args.no_caffeinate:
        keep_awake()
    if mlx.is_first():
        _show_options(config, console)
        if note := blas.advice():
            console.note(note)
    code, _ = follow(config, console)
    if code:
        console.note("go on with --resume")
    return code


def follow(config: TrainConfig, console: Console) -> tuple[int, list[float]]:
    """Trains with a progress bar and shows the written files. Returns the exit code, and the loss of every step."""
    mlx = require_mlx("training")
    with noted() as received, console.progress() as bars:
        display = _Display(console, bars)
        events: Iterator[Event] = mlx.train(config, lambda: bool(received))
        for event in events:
            display.show(event)
    for path in display.saved:
        console.wrote(path)
    return 128 + received[0] if display.stopped else 0, display.losses


def _show_options(config: TrainConfig, console: Console) -> None:
    console.facts("train", {
        "model": config.model_dir, "dataset": ", ".join(str(each.folder) for each in config.sets),
        "output": config.output,
        learning_kind(config.kind).title: _size(config) + ", ".join(config.targets),
        **({"goes on from": config.init_lora} if config.init_lora else {}),
        "length": f"{config.steps} steps" if config.steps else f"{config.epochs} epochs",
        "learning rate": f"{f'{config.lr:g}' if config.lr else 'by width'}, {config.optimizer}, {config.schedule}",
        "resolution": ", ".join(map(str, config.resolution)),
        **_preserved(config),
        "report": RunFolder(config.output).report,
        **({"previews": RunFolder(config.output).sheet} if config.preview_prompt else {}),
        **_time(config),
    })  # fmt: skip


def _size(config: TrainConfig) -> str:
    return "" if config.kind == FULL else f"rank {config.rank}, alpha {config.alpha:g}, on "


def _preserved(config: TrainConfig) -> dict[str, str]:
    """What training should not change, and how often a step sees to it. {} if nothing is preserved."""
    if not config.preserves:
        return {}
    count, every = len(config.preserve_prompt), config.preserve_every
    kept = [
        *([config.preserve] if config.preserve else []),
        *([f"{count} prompt{'s' * (count > 1)}"] if count else []),
        *(["no caption"] if config.preserve_blank else []),
    ]
    return {
        "preserved": f"{', '.join(kept)}; every {f'{every} steps' if every > 1 else 'step'}, weight "
        f"{config.preserve_weight:g}"
    }


def _time(config: TrainConfig) -> dict[str, str]:
    """The time of a step on one picture of the largest resolution by the doctor's figures, if there are any."""
    if Figures.of_this_machine() is None:
        return {}
    try:
        figures = Figures.for_model(ModelFolder.open(config.model_dir, config.parts).transformer)
    except ZImageError:  # the plan will raise it again, after the errors that it finds before
        return {}
    if figures is None:
        return {}
    precision = precision_name(*require_mlx("training").resolve_base_precision(config))
    side, mode = max(config.resolution), "fast" if config.memory == "fast" else "lean"
    seconds = figures.step(precision, side * side, mode)
    if seconds is None:
        return {}
    return {"time": f"about {duration(seconds)} a step for each picture of {side} x {side}, by `zimage doctor`"}


class _Display:
    """Shows events as bars, or as plain lines if the output is not a terminal."""

    def __init__(self, console: Console, bars: Bars) -> None:
        self._console, self._bars = console, bars
        self._held_out, self._logged = "", time.monotonic()
        self._last: Step | None = None
        self.saved: list[Path] = []
        self.losses: list[float] = []
        self.stopped = False

    def show(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Step():
                self._step(event)
            case Encoded(done, total, what):
                self._bars.update(what, done, total)
            case Notice(text):
                self._console.warn(text)
            case Started(step, total) if step:
                self._console.note(f"going on after step {step} of {total}")
            case Validated():
                self._validated(event)
            case Saving(step, nbytes):
                self._console.note(f"step {step}: saving {nbytes / 1e9:.1f} GB of weights")
            case Saved(path):
                self.saved.append(path)
            case Stopped(step):
                self.stopped = True
                self._console.note(f"stopped after step {step}")

    def _validated(self, event: Validated) -> None:
        self._held_out = f"  held out {event.loss:.4f}"
        if self._last:  # else the bar would keep the loss of an earlier step
            self._show_step(self._last)
        each = "  ".join(f"{sigma:g}: {loss:.4f}" for sigma, loss in event.losses.items())
        self._console.note(f"step {event.step}: held-out loss {event.loss:.4f}  ({each})")

    def _step(self, event: Step) -> None:
        self.losses.append(event.loss)
        if event.skipped:
            self._console.note(f"step {event.step}: loss or gradient is not finite, skipped")
        self._last = event
        lines = self._show_step(event)
        now = time.monotonic()
        if not self._console.err.is_terminal and (now - self._logged > _LOG_EVERY or event.step in (1, event.total)):
            left = (event.total - event.step) * event.seconds
            self._console.note(f"step {event.step}/{event.total}  {'  '.join(lines)}  {left / 60:.0f} min left")
            self._logged = now

    def _show_step(self, event: Step) -> tuple[str, ...]:
        lines = (
            f"epoch {event.epoch}  loss {event.smoothed:.4f}{self._held_out}",
            f"lr {event.lr:.2e}  norm {event.grad_norm:.3f}  {event.peak_memory / 1e9:.1f} GB",
            f"{event.seconds:.2f} s/step  {event.pictures / max(event.seconds, 1e-9):.2f} pictures/s",
        )
        self._bars.update("train", event.step, event.total, "\n".join(lines))
        return lines


def _ranks(plan: TrainPlan) -> str:
    if plan.parameters:
        return ""
    return ", rank " + ", ".join(str(rank) for rank in sorted({size.rank for size in plan.layers.values()}))


def _show_plan(config: TrainConfig, console: Console) -> None:
    """Shows the plan of a run, from headers and pictures. No weights are read."""
    resolved: tuple[str, Quantization | None] = require_mlx("training").resolve_base_precision(config)
    dtype, quantization = resolved
    with console.progress() as bars:
        plan = make_plan(config, bars.update)
    for notice in plan.notices:
        console.warn(notice)
    engine = pipeline("mlx")
    limit = engine(plan.model, dtype).memory_limit()
    choice = plan.choose_memory(dtype, quantization, limit, engine.footprint)
    stored = plan.stored_bits
    bits = ", ".join(f"{n} bits as stored" for n in stored) or (f"{quantization.bits} bits" if quantization else "")
    console.table(("plan", ""), [
        ("pictures", f"{len(plan.examples)}, {len(plan.held_out) or 'none'} held out"),
        ("base", f"{'Turbo' if plan.turbo else 'base model'} in {bits or dtype}"),
        (learning_kind(config.kind).title, f"{len(plan.layers)} layers{_ranks(plan)}: {plan.trainable:,} parameters"),
        ("targets", ", ".join(config.targets)),
        ("learning rate", f"{plan.lr:.3g}, {config.schedule}"),
        ("steps", f"{plan.total:,}, of {plan.batches.steps_per_epoch} an epoch"),
        *_preserved(config).items(),
        ("memory", choice.sentence(plan.model)),
    ])  # fmt: skip
    if config.datasets:
        _show_datasets(plan, console)
    sized = not plan.parameters
    console.table(("layers", "blocks", *(("rank", "alpha") if sized else ())), [
        (module, ranges(blocks), *((str(rank), f"{alpha:g}") if sized else ()))
        for (module, rank, alpha), blocks in by_module(plan.layers).items()
    ])  # fmt: skip
    sizes = sorted(plan.batches.sizes().items())
    console.table(("width", "height", "pictures", "tokens"), [(*size, n, plan.tokens(size)) for size, n in sizes])
    _show_memory(plan, dtype, quantization, console)


def _show_memory(plan: TrainPlan, dtype: str, quantization: Quantization | None, console: Console) -> None:
    """The memory of each stage, and the room on disk if it is much."""
    engine = pipeline("mlx")
    frugal, streamed = engine.footprint("lean"), engine.footprint("stream")
    captions, pictures, train = plan.memory(dtype, quantization, "lean", frugal)
    fast, stream = (
        plan.memory(dtype, quantization, "fast", frugal),
        plan.memory(dtype, quantization, "stream", streamed),
    )
    what = "optimizer" if plan.parameters else "LoRA and optimizer"
    console.table(("memory, about", "GB"), [(name, f"{nbytes / 1e9:.2f}") for name, nbytes in {
        "encode captions": captions.total, "encode pictures": pictures.total,
        "train": train.total, "  base": train.weights, f"  {what}": train.lora,
        "  activations, --memory lean": train.activations, "  activations, --memory fast": fast[-1].activations,
        "largest stage": peak((captions, pictures, train)).total,
        **({"  the same, --memory stream": peak(stream).total} if plan.can_stream or plan.parameters else {}),
    }.items()])  # fmt: skip
    if plan.parameters:
        console.note(room(plan, dtype))


def _show_datasets(plan: TrainPlan, console: Console) -> None:
    """A line for each dataset."""
    rows = []
    for number, given in enumerate(plan.config.sets):
        settings = plan.config.settings(number)
        pictures = [example for example in plan.examples if example.settings.number == number]
        rows.append((
            given.folder, settings.kind, len(pictures), settings.repeats, f"{settings.weight:g}",
            sum(example.mask is not None for example in pictures),
        ))  # fmt: skip
    console.table(("dataset", "kind", "pictures", "repeats", "weight", "masks"), rows)
