"""zimage generate: its options, and the run that makes the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from zimage_mlx import blas
from zimage_ref import ConfigError, GenerateConfig
from zimage_ref.bounds import COUNT
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.formats.files import check_writable
from zimage_ref.formats.quantize import BITS, GROUP_SIZE, GROUP_SIZES
from zimage_ref.generation.caching import choice_for, computed_share
from zimage_ref.generation.config import GenerateGroup
from zimage_ref.generation.grid import Grid
from zimage_ref.generation.jobs import Request
from zimage_ref.generation.pipeline import AnyPipeline
from zimage_ref.generation.presets import PRESETS, misfit
from zimage_ref.generation.provenance import ModelChoice, Repeat
from zimage_ref.generation.run import GenerationRun, RunSettings, open_pipeline
from zimage_ref.generation.sizes import parse_size, random_seed
from zimage_ref.memory import Mode
from zimage_ref.options import MEMORY, path_and_scale

from ..terminal.backends import BACKENDS, DEFAULT, pipeline
from ..terminal.console import Console
from ..terminal.duration import duration
from ..terminal.enhancer import Enhancer
from ..terminal.options import add_fields, flag, from_args, in_flags
from ..terminal.parser import CommandParser
from ..terminal.pictures import STDOUT, GridSheet, OutputNames, PictureWriter, control_path, preview_path
from ..terminal.prompt_file import read_prompts
from . import interactive

_EXAMPLES = (
    (
        "Make one picture:",
        'zimage generate --model-dir ~/Z-Image-Turbo --prompt "a red fox in snow" --output fox.png',
    ),
    (
        "Use a LoRA at a part of its strength, with 8-bit weights:",
        "zimage generate --model-dir ~/Z-Image-Turbo --lora dog.safetensors:0.8 --quantize 8 "
        '--prompt "a photo of sks dog" --output dog.png',
    ),
    (
        "Compare strengths of a LoRA on one sheet, dog.grid.png:",
        'zimage generate --model-dir ~/Z-Image-Turbo --lora dog.safetensors --grid "lora=0,0.5,1 seed=1,2,3" '
        '--prompt "a photo of sks dog" --output dog.png',
    ),
    (
        "Change a picture, and make it twice as large:",
        "zimage generate --model-dir ~/Z-Image-Turbo --init-image photo.jpg --strength 0.6 --upscale 2 "
        '--prompt "in watercolour" --output watercolour.png',
    ),
    (
        "Follow the edges of a picture with a ControlNet:",
        "zimage generate --model-dir ~/Z-Image-Turbo --control union-2.1.safetensors:0.8 --control-image photo.jpg "
        '--control-kind canny --prompt "a house of glass" --output glass.png',
    ),
)


def add_options(parser: CommandParser) -> None:
    """The options of `zimage generate`."""
    parser.usage = "zimage generate --model-dir MODEL --prompt TEXT [options]"
    parser.examples = _EXAMPLES
    _add_model(parser)
    _add_pictures(parser)
    add_fields(parser, GenerateConfig, from_file=True, without=("prompt", "seed", "original_prompt"))
    _add_output(parser)


def _add_model(parser: CommandParser) -> None:
    add, model, speed = parser.option, GenerateGroup.MODEL, GenerateGroup.SPEED
    add("--model-dir", "Folder with a Z-Image model, or the name of a repository on Hugging Face.", model,
        type=Path, metavar="MODEL")  # fmt: skip
    add("--lora", "LoRA, with a strength if you want one. USER/REPOSITORY:FILE is on Hugging Face. "
        "You can repeat this option.", model, action="append", metavar="FILE[:X]")  # fmt: skip
    add("--quantize", "Bits of the large matrices. They are quantized while they load.", model,
        type=int, choices=BITS, metavar="BITS")  # fmt: skip
    add("--group-size", "Weights that share one scale, if --quantize is given. A smaller group is more exact.", model,
        essential=False, type=int, choices=GROUP_SIZES, shown=str(GROUP_SIZE), metavar="N")  # fmt: skip
    add("--dtype", "Precision of the networks, such as bfloat16 or float32.", model,
        essential=False, shown="the engine's", metavar="NAME")  # fmt: skip
    for part, help in part_options().items():
        add(flag(part), in_flags(help), model, essential=False, type=Path, metavar="PATH")
    add("--memory", "lean holds one network at a time, fast holds all, stream only the blocks at work. auto takes fast "
        "with --interactive and lean without it, or the next one that fits.", speed,
        essential=False, choices=MEMORY, default=MEMORY[0], metavar="NAME")  # fmt: skip
    add("--batch-size", "Pictures that are denoised together. A picture does not depend on it.", speed,
        essential=False, type=int, default=1, metavar="N")  # fmt: skip
    add("--backend", "Engine.", speed,
        essential=False, choices=BACKENDS, shown=f"{DEFAULT} on this computer", metavar="NAME")  # fmt: skip
    add("--force", "Continue if memory seems too small.", speed, essential=False, action="store_true")


def _add_pictures(parser: CommandParser) -> None:
    add, picture = parser.option, GenerateGroup.PICTURE
    add("--prompt", "Text that describes the picture. You can repeat this option.", picture,
        dest="prompts", action="append", default=[], metavar="TEXT")  # fmt: skip
    add("--prompt-file", "File with prompts, one in each line. - reads them from stdin.", picture,
        essential=False, type=Path, metavar="FILE")  # fmt: skip
    add("--seed", "Seed of the noise at the start. random draws one. You can repeat this option.", picture,
        shown="0, with --interactive random", dest="seeds", type=_seed, action="append", default=[],
        metavar="N")  # fmt: skip
    add("--enhance", "Let the text encoder write a longer prompt from yours, by the seed.", picture,
        essential=False, action="store_true")  # fmt: skip
    add("--enhance-with", "File with what the text encoder is told to do. It turns on --enhance.", picture,
        essential=False, type=Path, metavar="FILE")  # fmt: skip
    add("--size", "Width and height, such as 1024, 1024x768 or the shape 3:4.", picture, metavar="SIZE")
    add("--preset", "Set of options for a model. Options that you give take precedence.", GenerateGroup.DENOISING,
        essential=False, choices=tuple(PRESETS), metavar="NAME")  # fmt: skip
    add("--count", "Pictures for each prompt. Their seeds are seed, seed + 1, ...", picture,
        type=int, default=1, metavar="N")  # fmt: skip


def _add_output(parser: CommandParser) -> None:
    add, output, record = parser.option, GenerateGroup.OUTPUT, GenerateGroup.RECORD
    add("--output", "Picture to write: .png, .jpg or .webp. {seed}, {index} and {prompt} in it are filled in. "
        "- writes to stdout.", output, type=Path, default=Path("output.png"), metavar="NAME")  # fmt: skip
    add("--interactive", "Keep the model loaded, and read one prompt after another.", output, action="store_true")
    add("--overwrite", "Replace pictures that exist.", output, action="store_true")
    add("--grid", "Vary one or two options, such as 'lora=0,0.5,1 seed=1,2,3'. The pictures also come as one sheet, "
        "NAME.grid.png.", output, metavar="AXES")  # fmt: skip
    add("--preview-steps", "Write NAME.preview.png every K steps. 0 writes none.", output,
        essential=False, type=int, default=0, metavar="K")  # fmt: skip
    add("--preview-decoder", "File of TAEF1, a tiny decoder. It makes previews sharper and faster.", output,
        essential=False, type=Path, metavar="FILE")  # fmt: skip
    add("--save-control", "Write the map that the picture follows to NAME.control.png.", output,
        essential=False, action="store_true")  # fmt: skip
    add("--no-thumbnail", "Do not show the picture in the terminal.", output, essential=False, action="store_true")
    add("--from-image", "Make this picture again. Other options change it.", record,
        essential=False, type=Path, metavar="PICTURE")  # fmt: skip
    add("--no-metadata", "Do not write into the picture how it was made.", record,
        essential=False, action="store_true")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Makes the pictures. Everything is checked before weights are read."""
    names = OutputNames(args.output, args.overwrite)
    if args.grid is not None and (args.interactive or names.pattern == STDOUT):
        raise ConfigError("--grid writes several files: give no --interactive or --output -")
    if args.interactive and (args.prompts or args.prompt_file or names.pattern == STDOUT):
        raise ConfigError("--interactive reads prompts and writes files: give no --prompt, --prompt-file or --output -")
    repeat = Repeat.read(args.from_image) if args.from_image else None
    configs = [_template(args, repeat)] if args.interactive else _configs(args, repeat)
    grid = None if args.grid is None else Grid.parse(args.grid, configs)
    configs = list(grid.configs) if grid else configs
    if args.save_control and any(each.control is not None and each.control_image is None for each in configs):
        raise ConfigError("--save-control needs --control-image")
    loras = _loras(args, repeat)
    pipe = _open(args, repeat)
    if pipe.backend == "mlx" and (note := blas.advice()):
        console.note(note)
    if args.preset and (notice := misfit(args.preset, pipe.folder.scheduler)):
        console.warn(notice)
    run = GenerationRun(pipe, _settings(args), loras)
    for notice in run.changes(repeat) if repeat else ():
        console.warn(notice)
    writer = PictureWriter(run, console, thumbnails=not args.no_thumbnail, save_control=args.save_control)
    enhancer = Enhancer.of(args.enhance, args.enhance_with, run, console)
    if args.interactive:
        interactive.Session(writer, names, configs[0], enhancer, draw=not args.seeds and not repeat).loop()
        return
    configs = enhancer.enhanced(configs)
    requests = run.plan(configs, console.warn)
    paths = names.of(configs)
    sheet = GridSheet(grid, requests, names.of_sheet(configs)) if grid else None
    if args.preview_steps:
        check_writable(*map(preview_path, paths))
    if args.save_control:
        check_writable(*map(control_path, paths))
    _show_facts(run, requests, args.grid, console)
    writer.make(requests, paths, sheet)


def _loras(args: argparse.Namespace, repeat: Repeat | None) -> list[tuple[Path, float]]:
    """The LoRAs of the command line, else those of the preset, else those in the record."""
    if args.lora is not None:
        return [path_and_scale(text) for text in args.lora]
    if args.preset and PRESETS[args.preset].loras:
        return [(Path(name), scale) for name, scale in PRESETS[args.preset].loras]
    return [(lora.path, lora.scale) for lora in repeat.loras] if repeat else []


def _open(args: argparse.Namespace, repeat: Repeat | None) -> AnyPipeline:
    """The model of the command line, else the one in the record."""
    parts = {name: path for name in part_options() if (path := getattr(args, name)) is not None}
    asked = ModelChoice(args.model_dir, args.backend, args.dtype, args.quantize, parts, args.group_size)
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
        preview_decoder=args.preview_decoder,
        enhance=args.enhance or args.enhance_with is not None,
    )


def _configs(args: argparse.Namespace, repeat: Repeat | None) -> list[GenerateConfig]:
    """A config for every prompt and seed."""
    prompts = [*args.prompts, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    template = _template(args, repeat)
    if not prompts and not repeat:
        raise ConfigError("--prompt or --prompt-file must be given")
    COUNT.check("count", args.count)
    COUNT.check("count", args.count * max(1, len(prompts)) * max(1, len(args.seeds)))
    seeds = [seed + i for seed in args.seeds or [template.seed] for i in range(args.count)]
    if prompts:  # those of the user were not written
        template = replace(template, original_prompt=None)
    return [replace(template, prompt=p, seed=seed) for p in prompts or [template.prompt] for seed in seeds]


def _template(args: argparse.Namespace, repeat: Repeat | None) -> GenerateConfig:
    """The options of all pictures: those of the command line, else of the preset, else of the record."""
    options: dict[str, object] = {"prompt": "", "seed": 0, **(repeat.options if repeat else {})}
    if args.preset:
        options |= PRESETS[args.preset].options
    if args.interactive and args.seeds:
        options["seed"] = args.seeds[0]
    if args.size is not None:
        sides = parse_size(args.size, getattr(args, "width", None), getattr(args, "height", None))
        args.width, args.height = sides
    return from_args(GenerateConfig, args, options)


def _seed(text: str) -> int:
    """A seed on the command line."""
    if text == "random":
        return random_seed()
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, and not random") from None


def _show_facts(run: GenerationRun, requests: Sequence[Request], grid: str | None, console: Console) -> None:
    """Shows a panel for each LoRA, and one for the pictures to make."""
    first, config, loras, memory = requests[0], requests[0].config, run.read_loras(), run.memory(requests)
    network = first.result.control
    for lora in loras:
        console.facts(str(lora.content.file.path), {**lora.content.file.facts(), "used at": f"{lora.scale:g}"})
    facts = {
        "model": run.pipeline.folder.path,
        "prompt": " | ".join(dict.fromkeys(request.config.prompt for request in requests)),
        "written from": " | ".join(dict.fromkeys(r.config.original_prompt or "" for r in requests)) or None,
        "size": f"{first.width} x {first.height}",
        "enlarged": _enlarged(first),
        "steps": _each(len(request.sigmas) - 1 for request in requests),
        "guidance": _each(request.config.guidance for request in requests),
        "seed": ", ".join(str(seed) for seed in dict.fromkeys(request.config.seed for request in requests)),
        "grid": grid and f"{grid}: {len(requests)} pictures",
        "negative": config.negative_prompt or None,
        "NAG": _each(request.config.nag for request in requests),
        "variety": _each(request.config.variety for request in requests),
        "step cache": config.cache if choice_for(config, first.sigmas) else None,
        "regions": " | ".join(config.region) or None,
        "picture": config.init_image and f"{config.init_image}, {_use(config)}",
        "mask": config.mask,
        "control": network and f"{config.control}, {network.file.config.variant}",
        "follows": network and f"{config.control_image or 'the enlarged picture'}, {config.control_kind}",
        "LoRA": ", ".join(f"{lora.content.path} at {lora.scale:g}" for lora in loras) or "none",
        "backend": f"{run.pipeline.backend}, {run.pipeline.precision}",
        "memory": memory.sentence(run.pipeline.folder),
        "time": _time(run, first, memory.mode),
    }
    console.facts("generate", {name: fact for name, fact in facts.items() if fact is not None})


def _each(values: Iterable[float | None]) -> str | None:
    """The different values of the pictures, None if there are none."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values) if value is not None) or None


def _use(config: GenerateConfig) -> str:
    """What becomes of the picture to start from."""
    return "only enlarged" if config.strength is None else f"strength {config.strength:g}"


def _enlarged(first: Request) -> str | None:
    """The second pass of the picture `first` in words, None if there is none."""
    last, tiles = first.result, first.result.tiles
    if last.tile is None:
        return None
    count, steps = len(tiles.places), len(last.sigmas) - 1
    cut = f", {count} tiles of {last.width * tiles.columns // tiles.w} x {last.height * tiles.rows // tiles.h}"
    return f"to {last.width} x {last.height}, {steps} step{'s' * (steps > 1)}{cut if count > 1 else ''}"


def _time(run: GenerationRun, first: Request, mode: Mode) -> str | None:
    """The time of the picture `first` by the doctor's figures, None if there are none for it."""
    seconds = run.seconds(first, mode)
    if seconds is None:
        return None
    known = all(computed_share(each.config, each.sigmas) is not None for each in first.passes)
    return f"{'about' if known else 'at most'} {duration(seconds)} a picture, by `zimage doctor`"
