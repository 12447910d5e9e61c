"""A crash or an error of the disk at any change of the file system: no good file is lost, none is half written.

ZIMAGE_FAULTS=1 pytest -m slow tests/test_faults.py     every change, instead of some of them
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.cases import random_lora
from support.networks import HAS_MLX

from zimage_ref.lora.file import write_lora

SCRIPT = Path(__file__).parent / "support" / "faults.py"
ALL = bool(os.environ.get("ZIMAGE_FAULTS"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults need processes that fork")
TRAIN = """train --model-dir model --dataset data --output lora.safetensors --rank 2 --resolution 32 --steps 3
 --save-every 2 --resume-every 1 --validation 0.25 --preview-prompt x --preview-steps 1 --preview-size 32
 --preview-every 2 --ema 0.9"""


@dataclass(frozen=True)
class Job:
    """A command, and what must be so after a fault."""

    command: str
    results: tuple[str, ...]  # patterns of the files that are the same in the end
    every: int  # a fault at each so many changes in CI
    precious: tuple[str, ...] = ()  # files that exist before, and must not be lost
    again: str = ""  # options to run it again with

    def to_json(self) -> str:
        """As `faults.py` takes it."""
        return json.dumps({"argv": self.command.split(), "results": self.results, "precious": self.precious,
                           "again": self.again.split()})  # fmt: skip


JOBS = {
    "generate": Job(
        "generate --model-dir model --backend numpy --prompt x --seed 1 --seed 2 --steps 2 --width 32 --height 32 "
        "--preview-steps 1 --output {seed}.png --overwrite",
        ("*.png",), 5, ("1.png",),
    ),
    "convert": Job(
        "convert --model-type transformer --input model --output out.npz --overwrite", ("out.npz",), 16, ("out.npz",)
    ),
    "convert-shards": Job(
        "convert --model-type vae --input model --output out --max-shard-size 60KB --overwrite", ("out/*",), 8
    ),
    "convert-lora": Job(
        "convert --model-type lora --naming burn --input fox.safetensors --output new.safetensors --overwrite",
        ("new.*",), 4, ("fox.safetensors",),
    ),
    "train": Job(TRAIN, ("lora*",), 24, again="--resume"),
    "train-again": Job(f"{TRAIN} --overwrite", ("lora*",), 30, ("lora.safetensors",)),
    "demo": Job("demo --output demo", ("demo/*.png", "demo/*.safetensors"), 60),
}  # fmt: skip
QUICK = ("convert-lora",)
LONG = ("train-again", "demo")  # minutes each


def prepared(folder: Path, job: str) -> Path:
    """The files that the jobs start with."""
    start = folder / "start"
    tiny.write_model_folder(start / "model")
    write_lora(start / "fox.safetensors", random_lora(2, 1, ["layers.0.attention.to_q"]), {"rank": 2, "alpha": 2.0})
    if job.startswith("train"):
        tiny.write_dataset(start / "data")
    if job == "train-again":
        (start / "lora.safetensors").write_bytes((start / "fox.safetensors").read_bytes())
    if job == "generate":
        tiny.photograph(32, 32, 1).save(start / "1.png")
    if job == "convert":
        (start / "out.npz").write_bytes(b"of an earlier conversion")
    return folder


def faults(folder: Path, job: str, how: str, stride: int) -> dict[str, Any]:
    arguments = [str(folder), JOBS[job].to_json(), how, str(stride), str(len(job) % stride)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    print(job, how, {name: report[name] for name in ("changes", "tried", "refused")})
    return report


@pytest.mark.parametrize("job", QUICK)
def test_some_faults_lose_nothing(job: str, tmp_path: Path) -> None:
    report = faults(prepared(tmp_path, job), job, "crash", 14)
    assert report["tried"] >= 1 and report["faults"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "error"])
@pytest.mark.parametrize("job", JOBS)
def test_a_fault_at_any_change_loses_nothing(job: str, how: str, tmp_path: Path) -> None:
    if not HAS_MLX and ("train" in job or job == "demo"):
        pytest.skip("training needs MLX")
    if job in LONG and not ALL:
        pytest.skip("takes minutes: set ZIMAGE_FAULTS=1")
    report = faults(prepared(tmp_path, job), job, how, 1 if ALL else JOBS[job].every)
    assert report["tried"] >= 3 and report["faults"] == {}
