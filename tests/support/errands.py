"""Commands as the pages give them, run on the built-in model: who reads them has a large model and more time.

The rules by which a command is made small:

    a model                 a repository's id, or a folder ~/Z-Image...: the built-in model instead
    sizes in pixels         --width, --height, --resolution: a sixteenth, at least 32; 32 if nothing says a size
    steps                   2, of denoising as of training; 1 in previews, which are 32 x 32
    ranges of blocks        a tenth, because the built-in model has five
    --nag                   with --guidance 0, which is the default of Turbo but not of the built-in model
    ~                       a folder of the test
    files that are read     made before: pictures, a mask, a dataset, LoRAs, ComfyUI's files of the built-in model
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from zimage_cli.app import main
from zimage_ref.checkpoints.hub import BUILT_IN, TINY
from zimage_ref.model.control import CONTROLNET_2_1, controlnet_parameters
from zimage_ref.training.dataset_options import MASKS

from .pages import ROOT
from .tiny import photograph, random_weights

SHRINK, SIDE = 16, 32
_MODELS = ("Tongyi-MAI/", "~/Z-Image")
_SIZES = ("--width", "--height", "--resolution")
_COMFY = {  # in ComfyUI's folder of models -> what it is of
    "diffusion_models/z_image_turbo_bf16.safetensors": "transformer",
    "text_encoders/qwen_3_4b.safetensors": "text-encoder",
    "vae/ae.safetensors": "vae",
}


class Errands:
    """Runs commands in a folder, which is the current one, and makes what they read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._home = folder, folder / "home"

    def run(self, command: str) -> int:
        """The exit code of a command line, made small. A prompt and the end are typed at it."""
        argv = self.small(shlex.split(command)[1:])
        typed, sys.stdin = sys.stdin, io.StringIO("a red star\n/quit\n")
        try:
            return main(argv)
        finally:
            sys.stdin = typed

    def small(self, argv: list[str]) -> list[str]:
        """The arguments of `zimage`, changed by the rules above; what they read is there afterwards."""
        command, *rest = argv
        changed = [command]
        for flag, value in zip(argv, rest, strict=False):
            changed.append(self._value(flag, value))
            if not value.startswith(_MODELS):
                self._provide(flag, changed[-1])
        given = {flag for flag in rest if flag.startswith("--")}
        if command == "compare":
            for path in (self.folder / value for value in rest[:2]):
                if not path.exists():
                    self.photo(path)
        if command == "generate":
            changed += ["--steps", "2"]
            if not given & {"--width", "--height", "--init-image", "--from-image"}:
                changed += ["--width", str(SIDE), "--height", str(SIDE)]
            changed += ["--guidance", "0"] if "--nag" in given else []
        elif command == "train":
            changed += ["--steps", "2", "--preview-steps", "1", "--preview-size", str(SIDE)]
            changed += [] if "--resolution" in given else ["--resolution", str(SIDE)]
            changed += self._instead_of_config(rest) if "--config" in given else []
        return changed

    def _instead_of_config(self, rest: list[str]) -> list[str]:
        """Options that take the place of a file's, which name a large model."""
        self._provide("--training-adapter", "adapter.safetensors")
        file = Path(rest[rest.index("--config") + 1])
        tables = re.findall(r'folder = "(.*?)"', file.read_text(encoding="utf-8")) if file.is_file() else []
        for folder in tables or [file.stem.removeprefix("train-")]:
            if "--dataset" not in rest:
                self._provide("--dataset", folder)
        return ["--model-dir", "tiny", "--training-adapter", "adapter.safetensors"]

    def _value(self, flag: str, value: str) -> str:
        if flag in _SIZES:
            return ",".join(str(max(SIDE, int(side) // SHRINK)) for side in value.split(","))
        if value.startswith(_MODELS):
            return "tiny"
        if flag == "--targets":
            return re.sub(r"(\d+)-(\d+)", lambda ends: f"{int(ends[1]) // 10}-{int(ends[2]) // 10}", value)
        return value.replace("~", str(self._home), 1) if value.startswith("~/") else value

    def _provide(self, flag: str, value: str) -> None:
        """Makes the file or folder that an option reads, if it is not there."""
        if flag in ("--lora", "--merge-lora", "--input", "--control") and not value.endswith(".safetensors"):
            value = value.rpartition(":")[0] or value  # a LoRA at a scale
        path = self.folder / value
        makers = {
            "--lora": self.lora, "--merge-lora": self.lora, "--training-adapter": self.lora, "--input": self._weights,
            "--model-dir": self._weights, "--dataset": self.dataset, "--init-image": self.photo,
            "--control-image": self.photo,
            "--control": self.control, "--mask": self._mask,
            "--tokenizer": self._tokenizer, "--config": self._copy, "--preserve-prompt-file": self._copy,
        }  # fmt: skip
        names_no_file = value == TINY or (flag == "--mask" and value in MASKS)  # of `zimage train`
        if flag in makers and not names_no_file and not path.exists():
            makers[flag](path)

    def lora(self, path: Path, rank: int = 2) -> Path:
        """A LoRA for the built-in model, of two layers, as most programs write one."""
        config = json.loads((BUILT_IN / "transformer" / "config.json").read_text(encoding="utf-8"))
        rng, tensors = np.random.default_rng(rank), {}
        for layer in ("layers.0.attention.to_q", "layers.1.attention.to_v"):
            for half, shape in (("A", (rank, config["dim"])), ("B", (config["dim"], rank))):
                matrix = 0.05 * rng.standard_normal(shape, np.float32)
                tensors[f"diffusion_model.{layer}.lora_{half}.weight"] = matrix
        save_file(tensors, path)
        return path

    def dataset(self, folder: Path) -> None:
        """Four small pictures with captions."""
        folder.mkdir(parents=True)
        for i in range(4):
            photograph(SIDE + 16 * (i % 2), SIDE, seed=i).save(folder / f"{i}.jpg")
            (folder / f"{i}.txt").write_text(f"a photo of [trigger], number {i}", encoding="utf-8")

    def _weights(self, path: Path) -> None:
        """A part of the built-in model as ComfyUI keeps it, all of them in its folder, or a LoRA."""
        if self._home in path.parents:
            models = self._home / "ComfyUI" / "models"
            for name, model_type in _COMFY.items():
                self._convert(model_type, models / name)
        elif path.name == "ae.safetensors":
            self._convert("vae", path)
        elif path.suffix == ".safetensors":
            self.lora(path)

    def _convert(self, model_type: str, output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        argv = ["--model-type", model_type, "--input", "tiny", "--output", str(output), "--naming", "comfy"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["convert", *argv]) == 0

    def control(self, path: Path) -> None:
        """A ControlNet 2.1 for the built-in model, of one block."""
        config = json.loads((BUILT_IN / "transformer" / "config.json").read_text(encoding="utf-8"))
        kept = {key: config[key] for key in ("dim", "n_heads", "n_refiner_layers", "norm_eps")}
        places = tuple(range(config["n_refiner_layers"]))
        own = replace(
            CONTROLNET_2_1, **kept, patch_size=config["all_patch_size"][0], control_layers_places=(0,),
            control_in_dim=2 * config["in_channels"] + 1, control_refiner_layers_places=places,
        )  # fmt: skip
        save_file(random_weights(controlnet_parameters(own)), path)

    def photo(self, path: Path) -> None:
        photograph(SIDE, SIDE, seed=1).save(path)

    def _mask(self, path: Path) -> None:
        mask = Image.new("L", (SIDE, SIDE))
        if "black" not in path.stem:
            mask.paste(255, (0, 0, SIDE // 2, SIDE // 2))
        mask.save(path)

    def _tokenizer(self, path: Path) -> None:
        shutil.copy(BUILT_IN / "tokenizer" / "tokenizer.json", path)

    def _copy(self, path: Path) -> None:
        """A file of examples/."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path.relative_to(self.folder), path)
