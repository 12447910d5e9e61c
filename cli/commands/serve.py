"""zimage serve: its options, and the engines that it gives to the server."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from zimage_mlx import blas
from zimage_ref import TrainConfig
from zimage_ref.checkpoints.hub import BUILT_IN, TINY, local_folder
from zimage_ref.checkpoints.registry import part_options
from zimage_ref.extras import optional_import
from zimage_ref.formats.quantize import BITS, Quantization
from zimage_ref.generation.provenance import ModelChoice
from zimage_ref.generation.run import open_pipeline
from zimage_ref.memory import Footprint, Mode
from zimage_ref.tiny.data import GUIDANCE, STEPS
from zimage_ref.tiny.drawings import SIDE
from zimage_ref.training.events import Event
from zimage_serve.engines import Engines
from zimage_serve.settings import KEY_VARIABLE, ServeGroup, ServeSettings

from ..terminal.backends import BACKENDS, DEFAULT, pipeline, require_mlx
from ..terminal.console import Console
from ..terminal.options import add_fields, flag, from_args, in_flags
from ..terminal.parser import CommandParser
from .demo import EPOCHS, LESSON

_PACKAGES = ("fastapi", "uvicorn", "python_multipart")
_TINY = {"width": SIDE, "height": SIDE, "steps": STEPS, "guidance": GUIDANCE}  # it draws this and nothing else
_EXAMPLES = (
    ("Serve the small built-in model, without a download:", "zimage serve"),
    ("Serve Z-Image-Turbo in 8 bits:", "zimage serve --model-dir ~/Z-Image-Turbo --quantize 8"),
    (
        "Serve your home network. The key is read from the environment:",
        "zimage serve --model-dir ~/Z-Image-Turbo --host 0.0.0.0 --allow-host studio.local",
    ),
    ("Serve an agent through stdin and stdout:", "zimage serve --mcp"),
)


def add_options(parser: CommandParser) -> None:
    """The options of `zimage serve`."""
    parser.examples = _EXAMPLES
    add, model = parser.option, ServeGroup.MODEL
    add("--model-dir", f"Folder with a Z-Image model, or the name of a repository on Hugging Face. {TINY} is the small "
        "one in this package.", model, type=Path, default=Path(TINY), metavar="MODEL")  # fmt: skip
    add("--quantize", "Bits of the large matrices. They are quantized while they load.", model,
        type=int, choices=BITS, metavar="BITS")  # fmt: skip
    add("--dtype", "Precision of the networks, such as bfloat16 or float32.", model,
        essential=False, shown="the engine's", metavar="NAME")  # fmt: skip
    for part, help in part_options().items():
        add(flag(part), in_flags(help), model, essential=False, type=Path, metavar="PATH")
    add("--backend", "Engine.", model, choices=BACKENDS, shown=f"{DEFAULT} on this computer", metavar="NAME")
    add_fields(parser, ServeSettings)
    add("--mcp", "Serve an agent by the Model Context Protocol through stdin and stdout, instead of HTTP.",
        ServeGroup.ADDRESS, action="store_true")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    if not args.api_key:
        args.api_key = os.environ.get(KEY_VARIABLE, "")
    settings = from_args(ServeSettings, args)
    for package in (*_PACKAGES, "mcp") if args.mcp else _PACKAGES:
        optional_import(package, "zimage serve --mcp" if args.mcp else "zimage serve")
    server = import_module("zimage_serve.server")  # it needs these packages
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choice = _choice(args)
    backend = args.backend or DEFAULT
    pipeline(backend)  # tells early if the engine cannot be used
    if backend == "mlx" and (note := blas.advice()):
        console.note(note)
    engines = engines_of(backend, choice)
    if args.mcp:
        server.serve_agent(settings, engines)
    else:
        server.serve(settings, engines, lambda address: console.note(f"serving {address} (Ctrl-C ends it)"))


def engines_of(backend: str, choice: ModelChoice) -> Engines:
    """What computes in a server of the model `choice`."""
    model = Path(choice.model or TINY)
    built_in = local_folder(model) == BUILT_IN
    return Engines(
        model_dir=model,
        parts=choice.parts,
        open=lambda: open_pipeline(pipeline(backend), choice),
        trainer=_Trainer(),
        backend=backend,
        defaults=_TINY if built_in else {},
        training={**LESSON, "epochs": EPOCHS} if built_in else {},
    )


def _choice(args: argparse.Namespace) -> ModelChoice:
    parts = {name: path for name in part_options() if (path := getattr(args, name)) is not None}
    return ModelChoice(args.model_dir, None, args.dtype, args.quantize, parts)


@dataclass(frozen=True)
class _Trainer:
    """Training by MLX. Raises BackendError if MLX is not installed."""

    def train(self, config: TrainConfig, should_stop: Callable[[], bool]) -> Iterator[Event]:
        events: Iterator[Event] = require_mlx("training").train(config, should_stop)
        return events

    def precision(self, config: TrainConfig) -> tuple[str, Quantization | None]:
        found: tuple[str, Quantization | None] = require_mlx("training").resolve_base_precision(config)
        return found

    def footprint(self, mode: Mode) -> Footprint:
        return pipeline("mlx").footprint(mode)
