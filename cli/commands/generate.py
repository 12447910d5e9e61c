"""zimage generate: pictures from prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zimage_ref import ConfigError, GenerateConfig, __version__
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.errors import reason
from zimage_ref.formats.quantize import BITS
from zimage_ref.generation.denoising import Step
from zimage_ref.generation.jobs import Request
from zimage_ref.generation.pipeline import Pipeline
from zimage_ref.generation.provenance import Repeat, engine_options, identity, record
from zimage_ref.memory import peak, require_memory
from zimage_ref.model.tokenizer import MAX_TOKENS
from zimage_ref.options import MEMORY
from zimage_ref.pictures.images import save_picture
from zimage_ref.pictures.metadata import read_record

from ..terminal import blas
from ..terminal.backends import BACKENDS, DEFAULT, pipeline
from ..terminal.console import Console
from ..terminal.options import add_fields, flag, from_args, in_flags, path_and_scale
from ..terminal.pictures import STDOUT, Names, preview_path, write
from . import interactive

THUMBNAIL_COLUMNS = 48


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `zimage generate`."""
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
    """Makes the pictures. Everything that can be wrong is checked before weights are read."""
    names = Names(args.output, args.overwrite)
    if args.interactive and (args.prompts or args.prompt_file or names.pattern == STDOUT):
        raise ConfigError("--interactive reads prompts and writes files: give no --prompt, --prompt-file or --output -")
    repeat = Repeat.of(read_record(args.from_image), args.from_image) if args.from_image else None
    configs = [_template(args, repeat)] if args.interactive else _configs(args, repeat)
    given = None if args.lora is None else [path_and_scale(text) for text in args.lora]
    loras = given if given is not None else repeat.loras if repeat else []
    pipe, facts = _open(args, repeat)
    if facts["backend"] == "mlx" and (note := blas.advice()):
        console.note(note)
    if repeat:
        for path in repeat.changes(facts, loras):
            console.warn(f"{path}: is not what {args.from_image} was made from: the picture will differ")
    run = Run(pipe, loras, names, args, console, facts)
    if args.interactive:
        interactive.loop(run, configs[0], console)
    else:
        run.make(run.plan(configs), names.of(configs))


def _open(args: argparse.Namespace, repeat: Repeat | None) -> tuple[Pipeline, dict[str, Any]]:
    """The model that is asked for, else the one that is recorded; with what a record should say of it."""
    model_dir = args.model_dir or (repeat.model if repeat else None)
    if model_dir is None:
        raise ConfigError("--model-dir must be given: a folder with the Z-Image model")
    before = repeat.engine if repeat else {}
    facts: dict[str, Any] = {name: getattr(args, name) or before.get(name) for name in engine_options()}
    facts["backend"] = facts["backend"] or DEFAULT
    engine = pipeline(facts["backend"])
    if not args.dtype and facts["dtype"] not in engine.dtypes:  # recorded of the other engine
        facts["dtype"] = None
    parts = {name: facts[name] for name in part_options()}
    pipe = engine.from_pretrained(model_dir, facts["dtype"], quantize=facts["quantize"], parts=parts)
    texts = {name: path and str(path) for name, path in parts.items()}
    return pipe, {**facts, **texts, **identity(pipe.folder), "dtype": pipe.precision, "version": __version__}


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


class Run:
    """A pipeline, and what is the same for all pictures that it makes."""

    def __init__(
        self,
        pipe: Pipeline,
        loras: Sequence[tuple[Path, float]],
        names: Names,
        args: argparse.Namespace,
        console: Console,
        facts: Mapping[str, Any],
    ) -> None:
        self.pipe, self.loras, self.names, self.console = pipe, list(loras), names, console
        self._args, self._facts = args, facts

    def plan(self, configs: Sequence[GenerateConfig]) -> list[Request]:
        """What to do for `configs`, checked as a whole, with a warning for each prompt that is too long."""
        if self._args.batch_size < 1 or self._args.preview_steps < 0:
            raise ConfigError("--batch-size must be at least 1 and --preview-steps at least 0")
        requests = self.pipe.plan(configs)
        self.pipe.read_loras(self.loras)
        self.pipe.lean = self._lean(requests)
        for request in requests:
            request.config.check_guidance()
        for text in dict.fromkeys(t for config in configs for t in (config.prompt, config.negative_prompt)):
            tokens = self.pipe.tokenizer.count(text)
            if tokens > MAX_TOKENS:
                self.console.warn(f"prompt cut after {MAX_TOKENS} of {tokens} tokens: {text[:60]}...")
        if not self._args.force:
            require_memory(self.pipe.memory(requests, self._args.batch_size), self.pipe.memory_limit())
        return requests

    def use_loras(self, loras: Sequence[tuple[Path, float]]) -> None:
        """Takes other LoRAs from here on. Raises as `Pipeline.read_loras`, and then keeps those in use."""
        self.pipe.read_loras(loras)
        self.loras = list(loras)

    def _lean(self, requests: Sequence[Request]) -> bool:
        """Whether a network is freed before the next is loaded."""
        if self._args.memory != "auto":
            return bool(self._args.memory == "lean")
        if not self._args.interactive:  # a process that ends with its pictures needs no network twice
            return True
        limit, self.pipe.lean = self.pipe.memory_limit(), False
        stages = self.pipe.memory(requests, self._args.batch_size)
        return limit is not None and peak(stages).total > limit

    def make(self, requests: Sequence[Request], paths: Sequence[Path]) -> None:
        """Makes and writes the pictures."""
        args = self._args
        records = [None if args.no_metadata else self._record(request.config) for request in requests]
        if not args.interactive:
            self._show_facts(requests)
        finished = {id(request): place for place, request in enumerate(requests)}

        def watch(batch: Sequence[Request], step: Step) -> None:
            if args.preview_steps and step.index % args.preview_steps == 0 and step.index < step.total:
                for i, request in enumerate(batch):
                    shown = self.pipe.picture(step.x_0[i : i + 1])
                    save_picture(shown, preview_path(paths[finished[id(request)]]))

        with self.console.progress() as bars:
            made = self.pipe.generate(
                requests, batch_size=args.batch_size, loras=self.loras, progress=bars.update, watch=watch
            )
            for (_, picture), path, facts in zip(made, paths, records, strict=True):
                write(picture, path, facts, self.console)
                if not args.no_thumbnail and path != STDOUT:
                    self.console.picture(picture, THUMBNAIL_COLUMNS)

    def _record(self, config: GenerateConfig) -> dict[str, Any]:
        return record(config, self.loras, **self._facts)

    def _show_facts(self, requests: Sequence[Request]) -> None:
        first, config = requests[0], requests[0].config
        prompts = dict.fromkeys(request.config.prompt for request in requests)
        for file, scale in self.pipe.read_loras(self.loras):
            self.console.facts(str(file.path), {**file.facts(), "used at": f"{scale:g}"})
        loras = ", ".join(f"{path} at {scale:g}" for path, scale in self.loras)
        facts = {
            "model": self.pipe.folder.path,
            "prompt": " | ".join(prompts),
            "size": f"{first.width} x {first.height}",
            "steps": len(first.sigmas) - 1,
            "guidance": f"{config.guidance:g}",
            "seed": ", ".join(str(seed) for seed in dict.fromkeys(request.config.seed for request in requests)),
            "negative": config.negative_prompt or None,
            "picture": config.init_image and f"{config.init_image}, strength {config.strength:g}",
            "mask": config.mask,
            "LoRA": loras or "none",
            "backend": f"{self._facts['backend']}, {self.pipe.precision}",
        }
        self.console.facts("generate", {name: fact for name, fact in facts.items() if fact is not None})
