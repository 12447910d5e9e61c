"""Interactive generation: reads one prompt after the other, keeps the model loaded, and has commands for settings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_type_hints

from zimage_ref import ConfigError, GenerateConfig, ZImageError
from zimage_ref.errors import reason
from zimage_ref.generation.config import config_of
from zimage_ref.generation.sizes import parse_size, random_seed
from zimage_ref.options import path_and_scale
from zimage_ref.options_file import typed

from ..terminal.enhancer import Enhancer
from ..terminal.pictures import OutputNames, PictureWriter

HELP = """A line is a prompt. A line that begins with / changes the settings of the next pictures:
  /size 1024x768        width and height, or a shape such as 3:4; /size alone: the default
  /seed 7               the seed of all pictures; /seed alone: each gets a random one
  /steps 8              also /guidance /negative-prompt /sampler /shift /init-image /strength /mask /fit ...
  /steps                without a value: the default
  /lora fox.safetensors:0.8, more.safetensors    the LoRAs to use; /lora alone: none
  /show                 the settings
  /quit                 or the end of the input; Ctrl-C stops a picture under way"""
_HINTS = get_type_hints(GenerateConfig)
_DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(GenerateConfig)}


class Session:
    """The settings of the user, and the run that makes the pictures."""

    def __init__(
        self, writer: PictureWriter, names: OutputNames, config: GenerateConfig, enhancer: Enhancer, draw: bool
    ) -> None:
        """draw: whether each picture gets a random seed, until the user sets one."""
        self._draw, self._enhancer = draw, enhancer
        self._writer, self._names, self._config = writer, names, config
        self._run, self._console = writer.run, writer.console

    def loop(self) -> None:
        """Reads lines until the input ends. An error is shown in one line, and the settings stay."""
        self._console.note("a prompt makes a picture; /help lists the commands")
        while True:
            try:
                line = self._console.ask("> ")
            except UnicodeDecodeError as error:
                self._console.error(f"this line is not valid Unicode: {error.reason}")
                continue
            except (EOFError, KeyboardInterrupt):
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except ZImageError as error:
                self._console.error(str(error))
            except OSError as error:  # such as a full disk: there may be room again
                self._console.error(f"{error.filename or 'file system'}: {reason(error)}")
            except (MemoryError, UnicodeError) as error:
                self._console.error(f"this picture cannot be made: {error or type(error).__name__}")
            except KeyboardInterrupt:
                self._console.note("stopped")

    def _take(self, line: str) -> None:
        """Runs one line: a prompt or a command."""
        if line.startswith("/"):
            self._command(line)
        elif line:
            config = replace(self._config, prompt=line, original_prompt=None)
            if self._draw:
                config = replace(config, seed=random_seed())
            self._console.note(f"seed {config.seed}")
            (config,) = self._enhancer.enhanced([config])
            if config.original_prompt:
                self._console.note(config.prompt)
            requests = self._run.plan([config], self._console.warn)
            self._writer.make(requests, [self._names.free(config)])

    def _command(self, line: str) -> None:
        name, _, value = line[1:].partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name == "help":
            self._console.note(HELP)
        elif name == "show":
            self._show()
        elif name == "lora":
            self._run.use_loras([path_and_scale(part.strip()) for part in value.split(",") if part.strip()])
        elif name == "size":
            width, height = parse_size(value) if value else (None, None)
            self._config = replace(self._config, width=width, height=height)
        elif name == "seed" and value in ("", "random"):
            self._draw = True
        elif name in _DEFAULTS and name != "prompt":
            self._config = _set(self._config, name, value)
            self._draw = self._draw and name != "seed"
        else:
            raise ConfigError(f"/{name} is unknown: /help lists the commands")

    def _show(self) -> None:
        values = {name: getattr(self._config, name) for name in _DEFAULTS if name != "prompt"}
        values |= {"seed": "random"} if self._draw else {}
        loras = ", ".join(f"{path} x {scale:g}" for path, scale in self._run.loras) or "none"
        self._console.facts("next", {name: v for name, v in values.items() if v is not None} | {"LoRA": loras})


def _set(config: GenerateConfig, name: str, value: str) -> GenerateConfig:
    """`config` with the field `name` set to the text `value`. An empty text sets the default."""
    known = typed(value, _HINTS[name], f"/{name}") if value else _DEFAULTS[name]
    return config_of({field.name: getattr(config, field.name) for field in fields(config)} | {name: known})
