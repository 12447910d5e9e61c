"""zimage generate: its options, and the run that makes the pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import reason
from zimage_ref.formats.quantize import BITS
from zimage_ref.generation.jobs import Request
from zimage_ref.generation.pipeline import AnyPipeline
from zimage_ref.generation.provenance import ModelChoice, Repeat
from zimage_ref.generation.run import GenerationRun, RunSettings, open_pipeline
from zimage_ref.options import MEMORY

from ..terminal import blas
from ..terminal.backends import BACKENDS, DEFAULT, pipeline
from ..terminal.console import Console
from ..terminal.options import add_fields, flag, from_args, in_flags, path_and_scale
from ..terminal.pictures import STDOUT, OutputNames, PictureWriter
from . import interactive


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `zimage generate`."""
    add = parser.add_argument
    add("--model-dir", type=Path, help="folder with the Z-Image model, or a repository's id")
    add("--prompt", dest="prompts", action="append", default=[], help="what the picture shows; repeatable")
    add("--prompt-file", type=Path, help="prompts from a file, one a line; - reads them from stdin")
    add_fields(parser, GenerateConfig, from_file=True, without=("prompt", "seed"))
    add(
        "--seed",
        dest="seeds",
        type=int,
        action="append",
        default=[],
        help="seed of the starting noise; repeatable (default: 0)",
    )
    add("--count", type=int, default=1, help="pictures for each prompt and seed: seed, seed + 1, ... (default: 1)")
    add("--batch-size", type=int, default=1, help="pictures denoised together; changes none of them (default: 1)")
    add("--lora", action="append", metavar="PATH[:SCALE]",
        help="LoRA of any dialect, and how much of it (default: 1); repeatable")  # fmt: skip
    add("--output", type=Path, default=Path("output.png"), metavar="NAME",
        help="picture to write, {seed}, {index} and {prompt} filled in; - is stdout (default: output.png)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace pictures that exist")
    add("--from-image", type=Path, metavar="PICTURE", help="make a picture again; other options change it")
    add("--no-metadata", action="store_true", help="don't write into the picture how it was made")
    add("--preview-steps", type=int, default=0, metavar="K", help="write NAME.preview every K steps (0: never)")
    add("--no-thumbnail", action="store_true", help="don't show the picture in the terminal")
    add("--interactive", action="store_true", help="keep the model loaded and read one prompt after another")
    add("--memory", choices=MEMORY, default=MEMORY[0],
        help="one network at a time (lean), all (fast), or all where they fit (auto, the default)")  # fmt: skip
    add("--force", action="store_true", help="go on where memory seems too small")
    add("--backend", choices=BACKENDS, help=f"engine (default here: {DEFAULT})")
    add("--dtype", help="precision of the networks, such as bfloat16 or float32 (default: the engine's)")
    add("--quantize", type=int, choices=BITS, help="bits that the big matrices are quantized to as they load")
    for part, help in part_options().items():
        add(flag(part), type=Path, metavar="FILE", help=in_flags(help))


def run(args: argparse.Namespace, console: Console) -> None:
    """Makes the pictures. Everything is checked before weights are read."""
    names = OutputNames(args.output, args.overwrite)
    if args.interactive and (args.prompts or args.prompt_file or names.pattern == STDOUT):
        raise ConfigError("--interactive reads prompts and writes files: give no --prompt, --prompt-file or --output -")
    repeat = Repeat.read(args.from_image) if args.from_image else None
    configs = [_template(args, repeat)] if args.interactive else _configs(args, repeat)
    loras = _loras(args, repeat)
    pipe = _open(args, repeat)
    if pipe.backend == "mlx" and (note := blas.advice()):
        console.note(note)
    run = GenerationRun(pipe, _settings(args), loras)
    for notice in run.changes(repeat) if repeat else ():
        console.warn(notice)
    writer = PictureWriter(run, console, thumbnails=not args.no_thumbnail)
    if args.interactive:
        interactive.Session(writer, names, configs[0]).loop()
        return
    requests = run.plan(configs, console.warn)
    paths = names.of(configs)
    _show_facts(run, requests, console)
    writer.make(requests, paths)


def _loras(args: argparse.Namespace, repeat: Repeat | None) -> list[tuple[Path, float]]:
    """The LoRAs of the command line, else those in the record."""
    if args.lora is not None:
        return [path_and_scale(text) for text in args.lora]
    return [(lora.path, lora.scale) for lora in repeat.loras] if repeat else []


def _open(args: argparse.Namespace, repeat: Repeat | None) -> AnyPipeline:
    """The model of the command line, else the one in the record."""
    parts = {name: path for name in part_options() if (path := getattr(args, name)) is not None}
    asked = ModelChoice(args.model_dir, args.backend, args.dtype, args.quantize, parts)
    recorded = repeat.choice if repeat else ModelChoice()
    return open_pipeline(pipeline(asked.backend or recorded.backend or DEFAULT), asked, recorded)


def _settings(args: argparse.Namespace) -> RunSettings:
    return RunSettings(
        batch_size=args.batch_size,
        memory=args.memory,
        keep_model=args.interactive,
        force=args.force,
        preview_steps=args.preview_steps,
        metadata=not args.no_metadata,
    )


def _configs(args: argparse.Namespace, repeat: Repeat | None) -> list[GenerateConfig]:
    """A config for every prompt and seed."""
    prompts = [*args.prompts, *(_prompts(args.prompt_file) if args.prompt_file else [])]
    template = _template(args, repeat)
    if not prompts and not repeat:
        raise ConfigError("--prompt or --prompt-file must be given")
    if args.count < 1:
        raise ConfigError(f"--count {args.count} must be at least 1")
    seeds = [seed + i for seed in args.seeds or [template.seed] for i in range(args.count)]
    return [replace(template, prompt=p, seed=seed) for p in prompts or [template.prompt] for seed in seeds]


def _template(args: argparse.Namespace, repeat: Repeat | None) -> GenerateConfig:
    return from_args(GenerateConfig, args, {"prompt": "", "seed": 0, **(repeat.options if repeat else {})})


def _prompts(path: Path) -> list[str]:
    try:
        text = sys.stdin.read() if path == Path("-") else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {reason(error)}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts: write one a line")
    return prompts


def _show_facts(run: GenerationRun, requests: Sequence[Request], console: Console) -> None:
    """Shows a panel for each LoRA, and one for the pictures to make."""
    first, config, loras = requests[0], requests[0].config, run.read_loras()
    for lora in loras:
        console.facts(str(lora.content.file.path), {**lora.content.file.facts(), "used at": f"{lora.scale:g}"})
    facts = {
        "model": run.pipeline.folder.path,
        "prompt": " | ".join(dict.fromkeys(request.config.prompt for request in requests)),
        "size": f"{first.width} x {first.height}",
        "steps": len(first.sigmas) - 1,
        "guidance": f"{config.guidance:g}",
        "seed": ", ".join(str(seed) for seed in dict.fromkeys(request.config.seed for request in requests)),
        "negative": config.negative_prompt or None,
        "picture": config.init_image and f"{config.init_image}, strength {config.strength:g}",
        "mask": config.mask,
        "LoRA": ", ".join(f"{lora.content.path} at {lora.scale:g}" for lora in loras) or "none",
        "backend": f"{run.pipeline.backend}, {run.pipeline.precision}",
    }
    console.facts("generate", {name: fact for name, fact in facts.items() if fact is not None})
